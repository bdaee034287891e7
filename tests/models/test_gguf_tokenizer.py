"""Tokenizers made from GGUF files give the ids that llama.cpp gives."""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mixlm.errors import ModelLoadError, UnsupportedError
from mixlm.models import resolve
from mixlm.models.cache import TOKENIZER_VERSION, read_info, write_info
from mixlm.models.convert import with_tokenizer
from mixlm.models.gguf_tokenizer import PRE_TOKENIZERS, write_tokenizer
from mixlm.models.header import read_metadata

Tokenize = Callable[[str], list[int]]
TEXTS = (
    *(
        "\n\n1",
        "1. one\n2. two\n\n3. three",
        "½ cup",
        "a  b   c",
        "   lead",
        "trail   ",
        "don't I'LL we've",
        "x=1234567",
    ),
    *(
        "日本語のテキスト123",
        "😀👍🏽",
        "e\u0301tude",
        "tabs\t\tand\r\nnew",
        "<|im_start|>user",
        " ",
        "▁a ▁",
        "a\r\n\r\nb",
    ),
)
ALPHABET = "abc XYZ  \n\n\t0123456789.,!?'’-—½²Ⅳñéßжд日本語한국어😀\u0301\u200d<|>_▁/\\\r"


def random_texts(count: int) -> list[str]:
    rng = random.Random(1)
    return ["".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, 40))) for _ in range(count)]


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma-3-270m"])
def both(request: pytest.FixtureRequest, demo_models: dict[str, Path]) -> tuple[Tokenize, Tokenize]:
    """llama.cpp's own tokenization of a demo model, and that of the folder that mixlm made."""
    xllamacpp = pytest.importorskip("xllamacpp")
    folder = Path(resolve(request.param).path_or_id)
    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "model.gguf")
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    server = xllamacpp.Server(params)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True

    def expected(text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
        request = urllib.request.Request(f"{server.listening_address}/tokenize", body)
        with urllib.request.urlopen(request) as response:
            ids: list[int] = json.load(response)["tokens"]
        return ids

    return expected, lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.models
def test_the_ids_are_those_of_llama_cpp(both: tuple[Tokenize, Tokenize]) -> None:
    expected, actual = both
    source = Path(json.__file__).read_text()
    for text in (*TEXTS, *random_texts(300), *(source[i : i + 150] for i in range(0, len(source) - 150, 150))):
        assert actual(text) == expected(text), text


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_reads_and_spells_every_text(tmp_path: Path, write_gguf: Callable[..., Path], name: str):
    metadata = read_metadata(write_gguf(tmp_path / "a.gguf")) | {"tokenizer.ggml.pre": name}
    write_tokenizer(metadata, tmp_path, "a.gguf")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (*TEXTS, *random_texts(50)):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_digits_are_tokens_of_their_own_for_smollm(tmp_path: Path, write_gguf: Callable[..., Path]) -> None:
    metadata = read_metadata(write_gguf(tmp_path / "a.gguf"))
    pieces = {}
    for name in ("smollm", "gpt-2", "llama-bpe"):
        write_tokenizer(metadata | {"tokenizer.ggml.pre": name}, tmp_path, "a.gguf")
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        pieces[name] = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("\n\n12345")]
    assert pieces == {
        "smollm": ["ĊĊ", *"12345"],
        "gpt-2": ["Ċ", "Ċ", "12345"],
        "llama-bpe": ["ĊĊ", "123", "45"],
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokenizer.ggml.pre": "smolm"}, UnsupportedError, "pre-tokenizer 'smolm'"),
        ({"tokenizer.ggml.pre": "kimi-k2"}, UnsupportedError, "pre-tokenizer 'kimi-k2'"),
        ({"tokenizer.ggml.model": "rwkv"}, UnsupportedError, "the kind 'rwkv'"),
        ({"tokenizer.ggml.tokens": []}, ModelLoadError, "has no tokenizer"),
        ({"tokenizer.ggml.model": "llama"}, ModelLoadError, "has no scores"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    tmp_path: Path, write_gguf: Callable[..., Path], change: dict, error: type[Exception], message: str
) -> None:
    metadata = read_metadata(write_gguf(tmp_path / "a.gguf")) | change
    with pytest.raises(error, match=message):
        write_tokenizer(metadata, tmp_path, "a.gguf")


def test_a_tokenizer_of_an_older_version_is_made_anew(tmp_path: Path, write_gguf: Callable[..., Path], quiet) -> None:
    from dataclasses import replace

    from mixlm.models import converted

    folder = converted(write_gguf(tmp_path / "a.gguf"), "float32", quiet)
    info = read_info(folder)
    assert info is not None
    assert info.tokenizer == TOKENIZER_VERSION
    expected = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text("{}")
    write_info(folder, replace(info, tokenizer=1))
    with_tokenizer(folder, tmp_path / "a.gguf")
    assert (folder / "tokenizer.json").read_text() == expected
    assert read_info(folder) == info
