from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixlm.errors import ModelLoadError
from mixlm.models import header as header_module
from mixlm.models.header import GgufHeader, read_header, read_metadata


def test_a_header_is_read_once_until_the_file_changes(tmp_path, write_gguf, monkeypatch, cache):
    paths: list[Path] = []
    monkeypatch.setattr(header_module, "read_metadata", lambda path: paths.append(path) or read_metadata(path))
    file = write_gguf(tmp_path / "a.gguf")
    assert read_header(file) == read_header(file) == GgufHeader.of(read_metadata(file))
    assert paths == [file]
    write_gguf(file, context=128)  # of the same size
    assert read_header(file).context == 128
    for index in cache.glob("gguf-headers*"):
        index.write_text(json.dumps({key: {"tokens": 1} for key in json.loads(index.read_text())}))
    assert read_header(file).context == 128
    with pytest.raises(ModelLoadError, match="cannot read"):
        read_header(tmp_path / "b.gguf")
