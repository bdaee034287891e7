from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from rich.console import Console

from mixlm.errors import ModelLoadError
from mixlm.models.cache import (
    INFO_FILE,
    ModelMetadata,
    cache_root,
    find,
    install,
    installed,
    model_folder,
)
from mixlm.terminal import ProgressDisplay

INFO = ModelMetadata("here", "00", "bfloat16", "llama", (0,), (1,), 64, "Test licence")


def build(folder: Path) -> ModelMetadata:
    (folder / "config.json").write_text("{}")
    (folder / "weights").touch(0o600)
    return INFO


def test_the_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path / "a"))
    assert cache_root() == tmp_path / "a"
    monkeypatch.delenv("MIXLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "mixlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "mixlm"


def test_nothing_is_installed_in_a_cache_that_does_not_exist():
    assert installed() == []
    assert find("") is find("../x") is find(".hidden") is None


def test_an_installed_model_is_found_with_readable_files(quiet):
    model = install("m", build, quiet)
    assert model == find("m")
    assert [model] == installed()
    assert model.path == model_folder("m")
    assert (model.source, model.dtype, model.licence) == ("here", "bfloat16", "Test licence")
    assert {path.stat().st_mode & 0o777 for path in model.path.iterdir()} == {0o644}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_build_that_fails_leaves_nothing(quiet, error):
    def failing(folder: Path) -> ModelMetadata:
        build(folder)
        assert installed() == []
        raise error

    with pytest.raises(error):
        install("m", failing, quiet)
    assert list(model_folder("").iterdir()) == []


def test_what_a_killed_build_left_is_cleared(quiet):
    left = model_folder(".m.building-x")
    (left / "target").mkdir(parents=True)
    assert installed() == []
    install("m", build, quiet)
    assert not left.exists()


def test_a_full_disk_names_the_cache(quiet):
    def full(_: Path) -> ModelMetadata:
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelLoadError, match="No space left on device") as caught:
        install("m", full, quiet)
    assert "MIXLM_CACHE" in (caught.value.hint or "")


def test_a_folder_that_mixlm_did_not_make_is_left_alone(quiet):
    model_folder("m").mkdir(parents=True)
    (model_folder("m") / "mine").touch()
    with pytest.raises(ModelLoadError, match="in the way"):
        install("m", build, quiet)
    assert (model_folder("m") / "mine").exists()


def test_a_model_that_cannot_be_used_is_named_and_hides_no_other(quiet):
    model = install("m", build, quiet)
    install("n", build, quiet)
    (model_folder("n") / INFO_FILE).write_text('{"from": "the future"}')
    assert installed() == [model]
    with pytest.raises(ModelLoadError, match=r"n/mixlm.json cannot be read: it has from"):
        find("n")


def _install_in_a_process(start, built) -> None:
    def counted(folder: Path) -> ModelMetadata:
        with built.get_lock():
            built.value += 1
        return build(folder)

    start.wait()
    install("m", counted, ProgressDisplay(Console(quiet=True)))


@pytest.mark.slow
def test_two_processes_build_a_model_once():
    context = multiprocessing.get_context("spawn")
    start, built = context.Barrier(2), context.Value("i", 0)
    workers = [context.Process(target=_install_in_a_process, args=(start, built)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert built.value == 1
