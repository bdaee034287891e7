"""Tokenizers made from GGUF files give the ids that llama.cpp gives."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import unicodedata
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from ggufs import write_tiny_gguf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mixlm.errors import ModelLoadError, UnsupportedError
from mixlm.models.cache import TOKENIZER_VERSION, read_info, write_info
from mixlm.models.gguf import ensure_tokenizer
from mixlm.models.gguf_tokenizer import PRE_TOKENIZERS, _last_merges, write_tokenizer
from mixlm.models.header import read_metadata
from mixlm.models.resolve import resolve

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


def unusual_texts(count: int) -> list[str]:
    """Texts of letters, spaces and any characters of Unicode that have been assigned for some time."""
    rng = random.Random(2)
    planes = [(0xA0, 0x24F), (0x300, 0xD7FF), (0xE000, 0xFFFD), (0x10000, 0x1FFFF)]
    parts = ["'s", "'LL", "12", "ab", "Ab", "日本", "e\u0301", "한국", "ſ", "\r\n", "\u2028", "\x85", "İ", "ǅ", "👍🏽"]
    parts += ["\u0903", "٣", "৪", "_", "\u200d", "  ", "    ", "12345678", "IMGIMGABZ", "<sentinel:7>"]

    def character() -> str:
        while True:
            found = chr(rng.randint(*rng.choice(planes)))
            if unicodedata.category(found) not in ("Cn", "Cs"):
                return found

    choices = [lambda: chr(rng.randint(32, 126)), lambda: " ", lambda: "\n", character, lambda: rng.choice(parts)]
    return ["".join(rng.choice(choices)() for _ in range(rng.randint(2, 30))) for _ in range(count)]


def llama_cpp_ids(files: Sequence[Path], texts: Sequence[str], ways: str = "plain") -> list[list[list[list[int]]]]:
    """The ids that llama.cpp gives, by file, way and text: one process for all of them."""
    pytest.importorskip("xllamacpp")
    path = files[0].with_name("texts.json")
    path.write_text(json.dumps(texts))
    command = [sys.executable, Path(__file__).with_name("llama_cpp_tokens.py"), path, ways, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=True)
    ids: list[list[list[list[int]]]] = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("IDS"))[3:]
    )
    return ids


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, tuple[Path, list[list[list[int]]]]]]:
    """Texts, and by pre-tokenizer a file whose merges reach across whatever it may cut, and llama.cpp's ids."""
    source = Path(json.__file__).read_text()
    texts = [*TEXTS, *random_texts(75), *unusual_texts(125), *(source[i : i + 120] for i in range(0, 3000, 120))]
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2500, initial_alphabet=alphabet, show_progress=False, max_token_length=6)
    whole.train_from_iterator(texts, trainer)
    merges = [(left, right) for left, right in json.loads(whole.to_str())["model"]["merges"]]
    folder = tmp_path_factory.mktemp("merged")
    files = {
        name: write_tiny_gguf(folder / f"{number}.gguf", pre=name, merges=merges)
        for number, name in enumerate(PRE_TOKENIZERS)
    }
    ids = llama_cpp_ids([*files.values()], texts, "plain,whole")
    return texts, {name: (file, ids[number]) for number, (name, file) in enumerate(files.items())}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_cuts_as_llama_cpp_does(tmp_path: Path, merged, name: str) -> None:
    texts, by_name = merged
    file, ways = by_name[name]
    write_tokenizer(read_metadata(file), tmp_path, "a.gguf")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    for whole, expected in zip((False, True), ways, strict=True):
        for text, ids in zip(texts, expected, strict=True):
            assert tokenizer.encode(text, add_special_tokens=whole).ids == ids, (text, whole)


def sentencepiece(*more: tuple[str, int]) -> list[tuple[str, int]]:
    """Pieces of a short text, in a random order, with all of its characters."""
    corpus = "the▁river▁turns▁under▁the▁old▁bridge▁▁123\n\nab▁abc"
    pieces = sorted({corpus[i : i + length] for length in range(2, 7) for i in range(len(corpus) - length)})
    random.Random(3).shuffle(pieces)
    return [*more, *((piece, 1) for piece in [*pieces[:150], *sorted(set(corpus))] if piece not in dict(more))]


TURNS = (("<|user|>", 3), ("<|end|>", 3), ("<|endoftext|>", 3), ("<tool>", 4), ("▁▁▁", 4))
SENTENCEPIECE = {
    "a space in front": {"pieces": sentencepiece(*TURNS)},
    "no space in front": {"pieces": sentencepiece(*TURNS), "space_prefix": False},
    "unused tokens": {"pieces": sentencepiece(*TURNS, ("riv", 5), ("bri", 5))},
    "Phi-3": {"pieces": sentencepiece(*TURNS), "model_name": "Phi-3-mini-4k"},
}


@pytest.mark.slow
def test_sentencepiece_is_read_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    files = [write_tiny_gguf(tmp_path / f"{i}.gguf", **options) for i, options in enumerate(SENTENCEPIECE.values())]
    rng = random.Random(4)
    parts = ["a", "ab", "the", " ", "  ", "\n", "1", "é", "<|user|>", "<|end|>", "<tool>", "river", " the", "</s>"]
    texts = ["".join(rng.choice(parts) for _ in range(rng.randint(1, 12))) for _ in range(80)]
    texts += ["<|user|>\nthe river<|end|>\n<|assistant|>", "<|endoftext|>  a", "<tool> x", "the<unk> <unk>a"]
    for kind, file, ways in zip(SENTENCEPIECE, files, llama_cpp_ids(files, texts, "plain,special"), strict=True):
        write_tokenizer(read_metadata(file), tmp_path, "a.gguf")
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        for special, expected in zip((False, True), ways, strict=True):
            tokenizer.encode_special_tokens = not special
            for text, ids in zip(texts, expected, strict=True):
                assert tokenizer.encode(text, add_special_tokens=False).ids == ids, (kind, text, special)


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
    with pytest.raises(error, match=message) as refused:
        write_tokenizer(metadata, tmp_path, "a.gguf")
    assert "did you mean" not in str(refused.value)  # nobody typed it


def test_sentencepiece_with_equal_scores_is_refused(tmp_path: Path) -> None:
    metadata = read_metadata(write_tiny_gguf(tmp_path / "a.gguf", pieces=sentencepiece()))
    write_tokenizer(metadata, tmp_path, "a.gguf")
    equal = [-1000.0] * len(metadata["tokenizer.ggml.scores"])
    with pytest.raises(UnsupportedError, match=r"a\.gguf has equal scores for tokens such as"):
        write_tokenizer(metadata | {"tokenizer.ggml.scores": equal}, tmp_path, "a.gguf")


@pytest.mark.slow
def test_a_tokenizer_of_an_older_version_is_made_anew(tmp_path: Path, write_gguf: Callable[..., Path], quiet) -> None:
    from dataclasses import replace

    from mixlm.models.gguf import converted

    folder = converted(write_gguf(tmp_path / "a.gguf"), "float32", quiet)
    info = read_info(folder)
    assert info is not None
    assert info.tokenizer == TOKENIZER_VERSION
    expected = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text("{}")
    write_info(folder, replace(info, tokenizer=1))
    ensure_tokenizer(folder, tmp_path / "a.gguf")
    assert (folder / "tokenizer.json").read_text() == expected
    assert read_info(folder) == info


def test_only_the_last_merge_of_each_token_is_kept_and_gives_the_same_ids() -> None:
    rng = random.Random(5)
    for trial in range(6):
        letters = "abc▁"[: 2 + trial % 3]
        spellings = {"".join(rng.choice(letters) for _ in range(rng.randint(2, 6))) for _ in range(60)}
        tokens = ["<unk>", *letters, *rng.sample(sorted(spellings), len(spellings))]
        merges = [
            (token[:cut], token[cut:])
            for token in tokens
            for cut in range(1, len(token))
            if token[:cut] in tokens and token[cut:] in tokens
        ]
        kept = _last_merges(merges)
        assert len({left + right for left, right in kept}) == len(kept) < len(merges)
        vocabulary = {token: i for i, token in enumerate(tokens)}
        whole, less = (Tokenizer(models.BPE(vocabulary, each, unk_token="<unk>")) for each in (merges, kept))
        for _ in range(300):
            text = "".join(rng.choice(letters) for _ in range(rng.randint(1, 30)))
            assert less.encode(text).ids == whole.encode(text).ids, text
