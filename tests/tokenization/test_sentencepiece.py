"""Folders with nothing but a `tokenizer.model`: SentencePiece's BPE and unigram, with and without byte fallback."""

from __future__ import annotations

import io
import json
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from test_encoding import CUTS, PROSE, Counting, assert_grows, assert_many_are_stable, assert_many_grow, steps
from test_tokens import HARD
from tokenizers import Tokenizer, decoders, models, normalizers
from trained import CORPUS, any_bytes, texts

from mixlm.engines.tokenizer_setup import load_tokenizer
from mixlm.tokenization.incremental import IncrementalEncoder, TokenizerEncoder
from mixlm.tokenization.prompt_encoder import PromptEncoder
from mixlm.tokenization.vocabulary import TokenizerFamily, detect_family, has_byte_fallback, token_bytes

KINDS = [f"{model} {bytes_} {norm}" for model in ("bpe", "unigram") for bytes_ in ("bytes", "unknown")
         for norm in ("identity", "nmt_nfkc")]  # fmt: skip
EXACT = [kind for kind in KINDS if "bytes identity" in kind]


@lru_cache
def train(kind: str, *, prefix: bool = True, extra: bool = False) -> bytes:
    """A SentencePiece model of a few lines, as its file. extra: whether extra spaces are removed."""
    model, bytes_, norm = kind.split()
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        model_type=model,
        vocab_size=500 if bytes_ == "bytes" else 240,
        byte_fallback=bytes_ == "bytes",
        normalization_rule_name=norm,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=extra,
        hard_vocab_limit=False,
        character_coverage=0.98,
        minloglevel=2,
    )
    return out.getvalue()


class LoadedTokenizer(NamedTuple):
    """A tokenizer from a folder, with its encoders."""

    backend: Tokenizer
    encoder: TokenizerEncoder
    tokens: dict[int, bytes]
    special: frozenset[int]
    raw: PromptEncoder


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    known: dict[str, LoadedTokenizer] = {}

    def load(kind: str, **options: bool) -> LoadedTokenizer:
        key = json.dumps([kind, options])
        if key not in known:
            folder: Path = tmp_path_factory.mktemp("spm")
            (folder / "tokenizer.model").write_bytes(train(kind, **options))
            (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
            backend = load_tokenizer(str(folder), "bare").backend
            assert detect_family(backend, "bare") is TokenizerFamily.SENTENCEPIECE
            tokens, special = token_bytes(backend, TokenizerFamily.SENTENCEPIECE, "bare")
            encoder = TokenizerEncoder(backend, TokenizerFamily.SENTENCEPIECE)
            raw = PromptEncoder(encoder, {}, lambda _: "")
            known[key] = LoadedTokenizer(backend, encoder, tokens, special, raw)
        return known[key]

    return load


def spelled(loaded: LoadedTokenizer, data: bytes) -> bytes:
    return b"".join(loaded.tokens[i] for i in loaded.encoder.encode(data).ids)


@pytest.mark.parametrize("kind", KINDS)
def test_every_single_byte_has_a_token_where_characters_fall_back_to_bytes(loaded, kind):
    tokenizer = loaded(kind)
    assert has_byte_fallback(tokenizer.backend) is ("bytes" in kind)
    single = {data for data in tokenizer.tokens.values() if len(data) == 1}
    assert ({bytes([b]) for b in range(256)} <= single) is ("bytes" in kind)
    assert not any(data.startswith(b"<0x") for data in tokenizer.tokens.values())


@pytest.mark.parametrize("kind", EXACT)
@given(data=any_bytes)
@example(data="日本\x00語🎉é\r\n".encode()[:-4])
@example(data=b"a <0x0A><<0x0A>> b c <0x0")
def test_any_bytes_are_spelled_by_their_tokens(loaded, kind, data):
    if "▁".encode() not in data:
        assert spelled(loaded(kind), data) == data


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_hard_texts_are_spelled_by_their_tokens(loaded, kind, text):
    assert spelled(loaded(kind), text.encode()) == text.encode()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "bytes nmt_nfkc" in kind])
@given(text=texts.filter(lambda text: "▁" not in text))
def test_a_normalized_text_is_spelled_by_its_tokens(loaded, kind, text):
    tokenizer = loaded(kind)
    assert tokenizer.encoder.normalizers == "Precompiled"
    normalized = tokenizer.backend.normalizer.normalize_str(text).removeprefix("▁")
    assert spelled(tokenizer, text.encode()) == normalized.replace("▁", " ").encode()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "unknown" in kind])
def test_without_bytes_what_is_not_in_the_vocabulary_is_the_unknown_token(loaded, kind):
    tokenizer = loaded(kind)
    known = "The river turns under the old stone bridge"
    assert spelled(tokenizer, known.encode()) == known.encode()
    ids = tokenizer.encoder.encode("the\U0001f9ca".encode()).ids
    assert ids[-1] == tokenizer.backend.token_to_id("<unk>")
    assert ids[-1] in tokenizer.special


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", ["</s>", "a</s><s>b", "<<s>/s>", "<unk>", "x <unk></s", "\uff1c/s\uff1e", "<\uff0fs>", "<0x41><0x0A>"]
)
def test_text_is_never_read_as_a_special_token_or_a_byte_token(loaded, kind, text):
    tokenizer = loaded(kind)
    ids = tokenizer.encoder.encode(text.encode()).ids
    unknown = tokenizer.backend.token_to_id("<unk>")
    assert not {i for i in ids if i != unknown} & tokenizer.special
    if "bytes identity" in kind:
        assert spelled(tokenizer, text.encode()) == text.encode()
    elif "bytes" in kind:
        assert spelled(tokenizer, text.encode()) == unicodedata.normalize("NFKC", text).encode()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@given(parts=st.lists(st.sampled_from(["<", "/s>", "0x0A>", "</s>", "<0x", "41>", " ", "a", "unk>"])), lengths=CUTS)
def test_lookalikes_that_come_in_parts_have_the_ids_of_the_whole(loaded, kind, parts, lengths):
    assert_grows(loaded(kind).encoder, steps("".join(parts).encode(), lengths))


@pytest.mark.parametrize("kind", KINDS)
@given(data=any_bytes, lengths=CUTS)
@example(data=b"\x01the the", lengths=[6])  # a normalizer drops the first character
def test_a_growing_text_has_the_ids_of_the_whole(loaded, kind, data, lengths):
    assert_grows(loaded(kind).encoder, steps(data, lengths))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_random_pieces_have_the_ids_of_the_whole_and_what_is_stable_stays(loaded, kind):
    assert_many_grow(loaded(kind).encoder)
    assert_many_are_stable(loaded(kind).encoder)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "bpe" in kind])
def test_only_the_end_of_a_long_text_is_encoded_again(loaded, kind):
    counting = Counting(loaded(kind).encoder)
    incremental = IncrementalEncoder(counting)
    data = PROSE.encode()
    for end in range(7, len(data), 7):
        incremental.update(data[:end])
    assert max(counting.lengths) < 100


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"prefix": True, "extra": False}, "doubled"),
        ({"prefix": True, "extra": True}, "first"),
        ({"prefix": False, "extra": False}, "never"),
    ],
)
def test_a_raw_prompt_has_the_ids_of_sentencepiece_itself(loaded, kind, options, rule):
    tokenizer = loaded(kind, **options)
    assert tokenizer.encoder.leading_space == rule
    reference = sentencepiece.SentencePieceProcessor(model_proto=train(kind, **options))
    cases = [
        "The river",
        "a",
        "It's 2024; they've paid 1,250.75 for 3 books",
        "Größe, naïve café",
        "日本語のテキスト",
        " a b",
    ]
    if not options["extra"]:
        cases += ["  two  spaces ", " ", "   "]
    for text in cases:
        ours = tokenizer.raw.raw(text).tolist()
        theirs = reference.encode(text)
        pieces = [[reference.id_to_piece(i) for i in ids] for ids in (ours, theirs)]
        assert pieces[0] == pieces[1], text


@pytest.mark.slow
def test_a_class_that_knows_the_model_is_left_alone(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train("bpe bytes identity"))
    for name, rule in (("GemmaTokenizer", "never"), ("LlamaTokenizer", "first")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma" if "Gemma" in name else "llama"}))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        backend = load_tokenizer(str(tmp_path), "known").backend
        assert TokenizerEncoder(backend, TokenizerFamily.SENTENCEPIECE).leading_space == rule


def test_ways_that_are_equally_likely_are_told_apart_as_in_the_whole():
    # A sum of scores is rounded by what stands before it: two spaces and three, or three and two?
    pieces = [("<unk>", 0.0), ("▁", -3.1), ("▁▁", -3.7), ("▁▁▁", -4.3), *((letter, -2.3) for letter in "abc")]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    encoder = TokenizerEncoder(tokenizer, TokenizerFamily.SENTENCEPIECE)
    for text in ("a" * 30 + " " * 5 + "b", "abc" * 9 + "     c     a     b"):
        assert_grows(encoder, steps(text.encode(), [1] * len(text)))
