"""Tables of tokenizers in the cache: the same tokenizer, and never that of another file."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer
from trained import trained

from mixlm.engines.tokenizer_setup import load_tokenizer
from mixlm.models import tokenizer_tables
from mixlm.models.tokenizer_tables import parse_tokenizer


@pytest.fixture
def folder(cache, monkeypatch):
    monkeypatch.setattr(tokenizer_tables, "_FEWEST", 1)
    folder = cache / "models" / "m"
    folder.mkdir(parents=True)
    trained("gemma").save(str(folder / "tokenizer.json"))
    return folder


def tables(folder):
    return list(folder.glob("*.tables"))


def test_a_tokenizer_is_the_same_from_its_tables(folder, monkeypatch):
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).to_str()
    first = load_tokenizer(str(folder), "m")
    assert len(tables(folder)) == 1
    monkeypatch.setattr(tokenizer_tables, "_pack", None)  # would be called where they are not used
    second = load_tokenizer(str(folder), "m")
    assert first.backend.to_str() == second.backend.to_str() == expected
    assert dict(first.vocabulary) == dict(second.vocabulary) != {}


def test_tables_hold_for_their_file_alone(folder):
    content = (folder / "tokenizer.json").read_bytes()
    data = parse_tokenizer(content, folder)
    other = json.loads(content)
    other["model"]["merges"].pop()
    changed = json.dumps(other).encode()
    assert len(parse_tokenizer(changed, folder)["model"]["merges"]) == len(data["model"]["merges"]) - 1
    [file] = tables(folder)
    packed = bytearray(file.read_bytes())
    packed[-1] ^= 1
    file.write_bytes(packed)
    for _ in range(2):
        assert json.loads(json.dumps(parse_tokenizer(changed, folder))) == other


def test_what_tables_do_not_hold_is_read_as_ever(folder, tmp_path):
    content = (folder / "tokenizer.json").read_bytes()
    data = json.loads(content)
    vocabulary, merges = data["model"]["vocab"], data["model"]["merges"]
    for model in (
        {"vocab": {**vocabulary, "a\0b": len(vocabulary)}, "merges": merges},
        {"vocab": {**vocabulary, "gap": len(vocabulary) + 1}, "merges": merges},
        {"vocab": vocabulary, "merges": [" ".join(merge) for merge in merges]},
        {"vocab": [["a", 0.5]], "type": "Unigram"},
    ):
        form = {**data, "model": {**data["model"], **model}}
        assert parse_tokenizer(json.dumps(form).encode(), folder) == form
    assert parse_tokenizer(b"[1]", folder) == [1]
    assert not tables(folder)
    assert parse_tokenizer(content, tmp_path) == data
    assert not tables(tmp_path)
