"""An engine of another package: the example, found by its entry point, keeps the contract of every engine."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from mixlm.config import parse_config
from mixlm.engines import EngineSpec, load
from mixlm.engines.contract import *  # noqa: F403
from mixlm.engines.registry import engine_names
from mixlm.errors import ConfigError, MixlmError, ModelNotFoundError, UnsupportedError
from mixlm.loading import load as load_ensemble
from mixlm.loading import load_config

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ngram_engine"
CORPUS = EXAMPLE / "README.md"


@pytest.fixture
def install(tmp_path, monkeypatch) -> Callable[[dict[str, str]], None]:
    """Puts what pip would write beside the example's module on the path."""

    def write(points: dict[str, str]) -> None:
        info = tmp_path / "mixlm_ngram-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mixlm-ngram\nVersion: 0.1\n")
        lines = "".join(f"{name} = {value}\n" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[mixlm.engines]\n{lines}")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.syspath_prepend(str(EXAMPLE))
        monkeypatch.delitem(sys.modules, "mixlm_ngram", raising=False)

    return write


@pytest.fixture
def installed(install) -> None:
    install(tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["entry-points"]["mixlm.engines"])


@pytest.fixture
def engine(installed):
    return load(EngineSpec(f"ngram:{CORPUS}", ""))


def test_it_writes_with_another_member_by_its_prefix_or_by_its_name(installed):
    pair = load_ensemble(f"ngram:{CORPUS}", "toy:1")
    assert pair.names == ("README", "toy:1")
    assert "n-gram" in repr(pair)
    assert len(pair.generate("the ", seed=1, max_tokens=5, ignore_end=True).tokens) == 5
    named = load_config(parse_config({"members": [{"model": str(CORPUS), "engine": "ngram"}]}, "here"))
    assert named.generate("An engine", raw=True, top_k=1, seed=0, max_tokens=9).text == " in a pac"


def test_its_name_is_among_those_that_are_listed(installed):
    assert engine_names() == ("auto", "hf", "llamacpp", "vllm", "remote", "ngram")


def test_an_unknown_name_is_refused_with_those_that_are_there(installed):
    for name, hint in (("ngrams", "did you mean 'ngram'"), ("xyz", "once that package is installed"), ("toy", "")):
        with pytest.raises(
            ConfigError, match=f"engine of member a is '{name}'.* llamacpp, vllm, remote, ngram.*{hint}"
        ):
            load_config(parse_config({"members": [{"model": "toy:1", "name": "a", "engine": name}]}, "here"))


def test_what_the_engine_itself_refuses_is_its_own_error(installed, tmp_path):
    with pytest.raises(ModelNotFoundError, match="there is no text file"):
        load_ensemble(f"ngram:{tmp_path / 'nothing.txt'}")
    with pytest.raises(UnsupportedError, match="takes no adapter"):
        load(EngineSpec(f"ngram:{CORPUS}", "", adapter="x"))


def test_options_of_loading_that_it_does_not_name_are_refused(installed, monkeypatch):
    spec = EngineSpec(f"ngram:{CORPUS}", "", revision="v1", attn="sdpa")
    with pytest.raises(UnsupportedError, match=r"revision and attn are given, and ngram:.* runs in the engine ngram"):
        load(spec)
    monkeypatch.setattr(importlib.import_module("mixlm_ngram"), "LOADING_OPTIONS", ("revision", "attn"), raising=False)
    assert load(spec).name == "README"


@pytest.mark.parametrize(
    ("value", "message"),
    [("absent_module", "No module named"), ("math", "load"), ("mixlm_ngram:Path", "load"), ("absurd", "a str")],
)
def test_an_entry_point_that_names_no_engine_is_refused_with_its_package(install, tmp_path, value, message):
    install({"broken": value})
    (tmp_path / "absurd.py").write_text("load = repr")
    with pytest.raises(MixlmError, match=rf"engine broken of mixlm-ngram .*{message}"):
        load(EngineSpec("x", "", engine="broken"))


def test_a_package_cannot_replace_an_engine_of_mixlm(install):
    install({"hf": "mixlm_ngram", "toy": "mixlm_ngram", "auto": "mixlm_ngram"})
    assert engine_names() == ("auto", "hf", "llamacpp", "vllm", "remote")
    assert type(load(EngineSpec("toy:1", ""))).__name__ == "ToyEngine"
