from __future__ import annotations

import json
import unicodedata
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from trained import ALL, BROKEN, BYTE_LEVEL, EXACT, FRAGMENTS, SPECIAL, texts, trained
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mixlm.errors import TokenizerError
from mixlm.tokenization.incremental import TokenizerEncoder, utf8_runs
from mixlm.tokenization.vocabulary import (
    TokenizerFamily,
    Vocabulary,
    byte_alphabet,
    detect_family,
    token_bytes,
    token_names,
)

NFC = normalizers.NFC()
HARD = [
    "",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈 and 👍🏽",
    "漢字かな交じり文、中文字符。한국어",
    "caf\u00e9 and cafe\u0301, n\u0303 and \u00f1, q\u0323\u0307",
    "a\tb\r\nc\rd\n\n\n  e",
    "\u00a0\u3000\u200b\ufeff",
    "The old bridge, 1250 birds; it's so. " * 270,
    "\x00 a\x00\x00b\x01\x1f\x7f",
    "a\r\n\r\nb\r\r\n\tc \r d",
    "🏴\U000e0067\U000e0062\U000e007f ❤️‍🔥 👩🏿‍🚀 🇨🇭🇨",
    "q\u0307\u0323 \u1e69 s\u0323\u0307 \u212b \ud55c\uae00 \u1112\u1161\u11ab",
    # Longer than any buffer, and in the middle of it what may be normalized across a boundary.
    "The old bridge, 1250 birds; caf\u00e9 日本 🎉\n" * 2100,
]


def test_the_byte_alphabet_is_gpt2s():
    assert byte_alphabet() == {character: byte for byte, character in bytes_to_unicode().items()}


@pytest.mark.parametrize("name", ALL)
def test_the_family_is_detected(name):
    expected = TokenizerFamily.BYTE_LEVEL if name in BYTE_LEVEL else TokenizerFamily.SENTENCEPIECE
    assert detect_family(trained(name), name) is expected


def test_a_byte_level_tokenizer_without_a_decoder_is_detected_by_its_pre_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    assert detect_family(tokenizer, "x") is TokenizerFamily.BYTE_LEVEL


@pytest.mark.parametrize(
    ("decoder", "shown"),
    [
        (decoders.WordPiece(), "WordPiece"),
        (decoders.BPEDecoder(), "BPEDecoder"),
        (decoders.CTC(), "CTC"),
        (None, "none"),
    ],
)
def test_other_families_are_refused_by_name(decoder, shown):
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        tokenizer.decoder = decoder
    with pytest.raises(TokenizerError, match=f"the tokenizer of this-one cannot be mapped to bytes.*{shown}"):
        detect_family(tokenizer, "this-one")


@pytest.mark.parametrize("name", ALL)
def test_special_tokens_have_no_bytes_and_every_other_token_has(name):
    tokenizer = trained(name)
    tokens, special = token_bytes(tokenizer, detect_family(tokenizer, name), name)
    assert {tokenizer.token_to_id(spelling) for spelling in SPECIAL} <= special
    assert not special & set(tokens)
    assert special | set(tokens) == set(tokenizer.get_vocab(with_added_tokens=True).values())
    assert all(tokens.values())


def test_single_bytes_are_spelled_in_each_familys_way():
    for name in EXACT:
        tokenizer = trained(name)
        tokens, _ = token_bytes(tokenizer, detect_family(tokenizer, name), name)
        assert {bytes([b]) for b in range(256)} <= set(tokens.values())


def test_byte_spellings_are_text_where_a_tokenizer_does_not_fall_back_to_bytes():
    tokenizer = Tokenizer(models.BPE({"<0x0A>": 0, "▁a": 1, "▁": 2}, []))
    tokenizer.decoder = decoders.Metaspace()
    assert token_bytes(tokenizer, TokenizerFamily.SENTENCEPIECE, "x")[0] == {0: b"<0x0A>", 1: b" a", 2: b" "}


def test_a_token_outside_the_byte_alphabet_is_refused():
    tokenizer = Tokenizer(models.BPE({"a b": 0}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    with pytest.raises(TokenizerError, match="token 0 of x, 'a b', is not spelled in the byte-level alphabet"):
        token_bytes(tokenizer, TokenizerFamily.BYTE_LEVEL, "x")


def _bytes_without_a_space() -> Tokenizer:
    names = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "a", "b"]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _words_with_a_space(*, byte_fallback: bool) -> Tokenizer:
    """A unigram model that spells the spaces of the text that is tried at load, and no other ones."""
    pieces = [(f"<0x{b:02X}>", -20.0) for b in range(256 if byte_fallback else 0)]
    pieces += [(piece, -2.0) for piece in ("a", "b", "c", "x", "1", ".", "\n", "▁b", "▁▁", "▁c")]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *pieces], 0, byte_fallback))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _changed(name: str, change) -> Tokenizer:
    tokenizer = trained(name)
    change(tokenizer)
    return tokenizer


def _in_parts(tokenizer: Tokenizer) -> None:
    parts = [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)


def _strips_a_token(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Strip(left=False, right=True)
    tokenizer.add_tokens([AddedToken("\n\n", normalized=True)])


def _words_apart(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])


@pytest.mark.parametrize(
    ("tokenizer", "shown"),
    [
        (_bytes_without_a_space(), "has no token for the space"),
        (_words_with_a_space(byte_fallback=True), "has no token for the space"),
        (_words_with_a_space(byte_fallback=False), "has no token for the space"),
        (_changed("gpt2", lambda t: setattr(t.model, "dropout", 0.1)), "drops merges at random"),
        (_changed("gpt2", lambda t: setattr(t.model, "end_of_word_suffix", "</w>")), "carry the mark '</w>'"),
        (_changed("gpt2", lambda t: setattr(t.model, "continuing_subword_prefix", "##")), "carry the mark '##'"),
        (_changed("gpt2", _strips_a_token), r"leaves nothing of the added token '\\n\\n'"),
        (_changed("gpt2", _in_parts), "ByteLevel pre-tokenizer puts a space in front of every part that Digits leaves"),
        (_changed("unigram", _words_apart), "Metaspace pre-tokenizer puts a space .* WhitespaceSplit leaves"),
        (_changed("unigram", lambda t: setattr(t, "decoder", decoders.Metaspace("_"))), "decodes .* as "),
    ],
)
def test_a_tokenizer_whose_tokens_do_not_tell_the_text_is_refused(tokenizer, shown):
    with pytest.raises(TokenizerError, match=f"(the tokenizer of x|x's tokenizer).*{shown}"):
        token_bytes(tokenizer, detect_family(tokenizer, "x"), "x")


def test_added_tokens_that_are_not_special_are_text():
    tokenizer = trained("tools")
    tokens, _ = token_bytes(tokenizer, TokenizerFamily.BYTE_LEVEL, "tools")
    assert tokens[tokenizer.token_to_id("<tool_call>")] == b"<tool_call>"


class Pieces:
    """A tokenizer with its token bytes and its encoder."""

    def __init__(self, tokenizer: Tokenizer, special: list[int] | None = None) -> None:
        if special:
            from mixlm.engines.tokenizer_setup import _make_special

            _make_special(tokenizer, special)
        kind = detect_family(tokenizer, "a test's")
        self.tokens, self.special = token_bytes(tokenizer, kind, "a test's")
        self.encoder = TokenizerEncoder(tokenizer, kind)

    def __call__(self, text: str) -> bytes:
        return b"".join(self.tokens[i] for i in self.encoder.encode(text.encode()).ids)


def normalized(name: str, text: str) -> bytes:
    return (unicodedata.normalize("NFC", text) if name in ("gpt4", "tools") else text).encode()


# SentencePiece itself spells a space like this, and reads it as one.
readable = texts.filter(lambda text: "▁" not in text)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
@given(text=readable)
def test_the_pieces_of_a_text_join_to_its_bytes(name, text):
    assert Pieces(trained(name))(text) == normalized(name, text)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("text", HARD)
def test_the_pieces_of_a_hard_text_join_to_its_bytes(name, text):
    assert Pieces(trained(name))(text) == normalized(name, text)


def test_a_unigram_tokenizer_spells_the_text_it_was_trained_on():
    assert (
        Pieces(trained("unigram"))("The river turns under the old bridge.") == b"The river turns under the old bridge."
    )


@pytest.fixture(scope="module")
def demo(demo_models) -> dict[str, Pieces]:
    tokenizers = {}
    for name, folder in demo_models.items():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizers[name] = Pieces(tokenizer, json.loads((folder / "mixlm.json").read_text())["control"])
    return tokenizers


def has_bytes(tokenizer: Pieces, text: str) -> bool:
    """Whether the vocabulary has a token for every single byte of the text: some lack rare ones."""
    single = {data for data in tokenizer.tokens.values() if len(data) == 1}
    return all(bytes([b]) in single for b in text.encode())


@pytest.mark.models
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
@pytest.mark.parametrize("text", HARD)
def test_a_real_tokenizers_pieces_of_a_hard_text_join_to_its_bytes(demo, name, text):
    assert demo[name](text) == text.encode()


@pytest.mark.models
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
@given(text=readable | st.text(max_size=50).filter(lambda text: "▁" not in text))
def test_a_real_tokenizers_pieces_of_any_text_join_to_its_bytes(demo, name, text):
    if has_bytes(demo[name], text):
        assert demo[name](text) == text.encode()


def fuzz(rng: Random) -> bytes:
    """A short text of any characters, among them hard ones; some end inside a character or are not text at all."""
    planes = [(0, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x370, 0xD7FF), (0xE000, 0xFFFF), (0x1F000, 0x1FAFF)]
    planes += [(0x10000, 0x10FFFF), (0xE0000, 0xE01EF), (0x1100, 0x11FF), (0x2000, 0x206F)]
    parts = []
    for _ in range(rng.randint(1, 8)):
        kind = rng.random()
        if kind < 0.4:
            parts.append(rng.choice(FRAGMENTS).encode())
        elif kind < 0.9:
            first, last = rng.choice(planes)
            parts.append("".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 4))).encode())
        else:
            parts.append(rng.choice([*BROKEN, rng.randbytes(rng.randint(1, 3))]))
    whole = b"".join(parts)
    return whole[: len(whole) - rng.randint(0, 3)] if rng.random() < 0.2 else whole


@pytest.fixture(scope="module")
def everything() -> dict[str, Pieces]:
    """Every tokenizer of a model that is installed."""
    from mixlm.models.cache import installed

    folders = {model.name: model.path for model in installed() if (model.path / "tokenizer.json").is_file()}
    tokenizers = {}
    for name, folder in folders.items():
        notes = folder / "mixlm.json"
        special = json.loads(notes.read_text())["control"] if notes.is_file() else []
        tokenizers[name] = Pieces(Tokenizer.from_file(str(folder / "tokenizer.json")), special)
    return tokenizers


@pytest.mark.models
def test_thousands_of_strings_are_spelled_by_the_tokens_of_every_real_tokenizer(everything, demo_installed):
    assert len(everything) >= 2
    for name, tokenizer in everything.items():
        rng = Random(3)
        single = {data[0] for data in tokenizer.tokens.values() if len(data) == 1}
        normalizer = tokenizer.encoder.normalizers
        assert normalizer in ("none", "NFC"), name
        for _ in range(1_500):
            data = fuzz(rng).replace("▁".encode(), b"_")
            ids = tokenizer.encoder.encode(data).ids
            assert not tokenizer.special & set(ids), (name, data)
            spelled = b"".join(tokenizer.tokens[i] for i in ids)
            # Some byte-level vocabularies lack rare bytes: these alone are left out.
            runs, partial = utf8_runs(data)
            expected = [
                NFC.normalize_str(text).encode() if normalizer == "NFC" and text is not None else raw
                for text, raw in [*runs, (None, partial)]
            ]
            assert spelled == bytes(b for b in b"".join(expected) if b in single), (name, data)


def test_names_of_tokens_are_by_id_also_where_ids_have_gaps():
    whole = trained("gpt2")
    assert {name: i for i, name in token_names(whole).items()} == whole.get_vocab(with_added_tokens=True)
    gaps = Tokenizer(models.BPE({"a": 0, "b": 7, "ab": 9}, [("a", "b")]))
    gaps.add_tokens(["<x>", "b"])
    assert token_names(gaps) == {i: name for name, i in gaps.get_vocab(with_added_tokens=True).items()}


def test_a_vocabulary_has_one_row_for_each_output_row():
    vocabulary = Vocabulary.of({0: b"a", 1: b"b", 2: b"c", 9: b"z"}, 5, end_ids=[3, 7], special_ids=[1, 8])
    assert vocabulary.size == 5
    assert vocabulary.tokens == (b"a", b"", b"c", b"", b"")
    assert vocabulary.end_ids == {3}
    assert vocabulary.special_ids == {1, 3}
