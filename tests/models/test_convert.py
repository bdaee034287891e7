from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from mixlm.errors import ConfigError, ModelLoadError, ModelNotFoundError
from mixlm.models import gguf as gguf_module
from mixlm.models.cache import find, installed, read_info
from mixlm.models.gguf import converted
from mixlm.models.header import GgufHeader, read_header
from mixlm.models.resolve import resolve
from mixlm.terminal import Stage


def test_the_header_of_a_whole_file(tmp_path, write_gguf):
    header = read_header(write_gguf(tmp_path / "a.gguf"))
    assert header == GgufHeader("llama", 64, 260, (256, 257), (256, 257))


def test_a_file_cut_off_in_its_weights(tmp_path, write_gguf):
    size = write_gguf(tmp_path / "a.gguf").stat().st_size
    cut = write_gguf(tmp_path / "b.gguf", stop_at=size - 100)
    with pytest.raises(ModelLoadError, match=rf"cut off: its tensors need .* the file has {size - 100:,}"):
        read_header(cut)


def test_a_header_is_refused_where_the_package_for_it_is_missing(tmp_path, write_gguf, monkeypatch):
    path = write_gguf(tmp_path / "a.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelLoadError, match=r"a\.gguf needs gguf .install: pip install 'mixlm\[llamacpp\]'"):
        read_header(path)


def test_a_file_with_a_malformed_vocabulary_is_named(tmp_path, write_gguf):
    path = write_gguf(tmp_path / "a.gguf", merges=[("q", "zz")])
    with pytest.raises(ModelLoadError, match=r"cannot convert .*a\.gguf .*zz"):
        gguf_module.tokenizer_folder(gguf_module.GgufModel(path, None, "a"))


@pytest.mark.parametrize("stop_at", [5, 20, 60, 3000])
def test_a_file_cut_off_in_its_header(tmp_path, write_gguf, stop_at):
    with pytest.raises(ModelLoadError, match="inside its own header"):
        read_header(write_gguf(tmp_path / "a.gguf", stop_at=stop_at))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 rest", "starts with b'PK"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "GGUF version 9; allowed: 2 or 3"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), "no GGUF value has type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 60), "inside its own header"),
    ],
)
def test_a_file_that_is_no_gguf(tmp_path, data, message):
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelLoadError, match=message):
        converted(path)


def test_a_part_of_a_split_file(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match="part 2 of 3"):
        read_header(tmp_path / "a.gguf")


def test_a_missing_file_names_its_neighbours(tmp_path, write_gguf, quiet):
    write_gguf(tmp_path / "small.gguf")
    with pytest.raises(ModelNotFoundError) as caught:
        converted(tmp_path / "smal.gguf", display=quiet)
    assert "small.gguf" in (caught.value.hint or "")


def test_a_dtype_that_is_not_allowed(tmp_path):
    with pytest.raises(ConfigError, match="'int8' is not allowed; allowed: bfloat16"):
        converted(tmp_path / "a.gguf", "int8")


@pytest.mark.slow
def test_a_file_is_converted_once_whole_and_silently(tmp_path, write_gguf, quiet, capfd, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    path = write_gguf(tmp_path / "my model.gguf")
    # Must not be taken for the model's own.
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    folder = converted(path, "float32", quiet)
    assert capfd.readouterr() == ("", "")
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before

    assert folder.name.startswith("my-model-")
    assert folder.name.endswith("-float32")
    info = read_info(folder)
    assert info is not None
    assert (info.architecture, info.control, info.ends, info.context) == ("llama", (256, 257), (256, 257), 64)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("abcd x").input_ids) == "abcd x"
    # The vocabulary has no such token, so that this is text.
    assert max(tokenizer("<|endoftext|>").input_ids) < len(tokenizer) == 260

    monkeypatch.setattr(gguf_module, "convert_gguf", None)
    monkeypatch.setattr(gguf_module.hashlib, "sha256", None)
    assert converted(path, "float32", quiet) == folder
    assert resolve(str(path), "float32").name == "my model"
    assert resolve(folder.name).path_or_id == str(folder)


@pytest.mark.slow
def test_an_architecture_that_is_not_known(tmp_path, write_gguf, quiet):
    path = write_gguf(tmp_path / "a.gguf", architecture="quux")
    with pytest.raises(ModelLoadError, match=r"GGUF architecture 'quux'\): .*not supported"):
        converted(path, display=quiet)
    assert installed() == []


@pytest.mark.slow
def test_progress_bars_of_the_library_take_all_that_bars_take():
    from transformers.utils import logging

    with gguf_module._progress_to(Stage()), logging.tqdm([1, 2], "loading", leave=False) as bar:
        bar.set_description("reading")
        assert list(bar) == [1, 2]


@pytest.mark.slow
def test_progress_counts_tensors(tmp_path, write_gguf):
    class Seen(Stage):
        totals: ClassVar[set[int | None]] = set()

        def update(self, done: int, total: int | None = None, text: str | None = None) -> None:
            self.totals.add(total)

    (tmp_path / "out").mkdir()
    gguf_module.convert_gguf(write_gguf(tmp_path / "a.gguf"), tmp_path / "out", "bfloat16", Seen())
    assert 11 in Seen.totals


@pytest.mark.models
@pytest.mark.parametrize(("name", "control"), [("smollm2-135m", 17), ("gemma-3-270m", 6249)])
def test_the_demo_models(name, control):
    model = find(name)
    if model is None:
        pytest.skip(f"{name} is not installed")
    folder = Path(resolve(name).path_or_id)
    assert folder == model.path
    info = read_info(folder)
    assert info is not None
    assert len(info.control) == control
    config = json.loads((model.path / "config.json").read_text())
    assert info.context == config["max_position_embeddings"]
    assert config["eos_token_id"] in info.ends
    files = {path.name for path in model.path.iterdir()}
    assert files >= {"model.safetensors", "tokenizer.json"}
    assert ("chat_template.jinja" in files) is (name == "smollm2-135m")
    assert {"LICENSE", "GEMMA_TERMS.html"} & files
