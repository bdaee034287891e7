"""Small stand-ins for wheels, pip and GGUF files."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mixlm.models import CatalogModel, Reporter, fetch
from mixlm.models.catalog import CATALOG, Member
from mixlm.models.header import GgufHeader

CONTENT = b"GGUF" + bytes(range(256)) * 20
HIDDEN, ROWS = 32, 260


def _write_gguf(path: Path, *, architecture: str = "llama", stop_at: int | None = None) -> Path:
    """Write a one-layer model with a byte vocabulary; `stop_at` cuts the file off there."""
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(ROWS)
    writer.add_tokenizer_model("gpt2")
    # The 256 single-character names that byte-level vocabularies give to bytes.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = [chr(byte) for byte in plain] + [chr(256 + number) for number in range(256 - len(plain))]
    writer.add_token_list([*names, "<end>", "<turn>", "ab", "cd"])
    writer.add_token_types([3 if token in (256, 257) else 1 for token in range(ROWS)])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    writer.add_eot_token_id(257)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (ROWS, HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {f"blk.0.{norm}_norm": (HIDDEN,) for norm in ("attn", "ffn")}
    shapes |= {f"blk.0.attn_{part}": (HIDDEN, HIDDEN) for part in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{part}": (HIDDEN, HIDDEN) for part in ("gate", "up", "down")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if stop_at is not None:
        path.write_bytes(path.read_bytes()[:stop_at])
    return path


def _catalog_model(content: bytes = CONTENT) -> CatalogModel:
    """A catalog model in two parts, with its licence in a wheel of its own."""
    return CatalogModel(
        name="tiny",
        title="Tiny",
        parts=(Member("tiny-part1==1.0", "tiny/a.part0"), Member("tiny-part2==1.0", "tiny/a.part1")),
        licence_files=(Member("tiny-licence==1.0", "tiny/LICENSE"),),
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
def quiet() -> Reporter:
    return Reporter(show=False)


@pytest.fixture
def write_gguf() -> Callable[..., Path]:
    return _write_gguf


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> CatalogModel:
    """A model in the catalog whose conversion only writes a config.json."""
    model = _catalog_model()
    monkeypatch.setitem(CATALOG, model.name, model)

    def convert(path: Path, target: Path, *_: object) -> GgufHeader:
        assert path.read_bytes() == CONTENT
        (target / "config.json").write_text("{}")
        return GgufHeader("llama", 64, 4, (0,), (0, 1))

    monkeypatch.setattr(fetch, "convert_gguf", convert)
    return model


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(fetch.subprocess, "run", fake)
    return fake
