"""Tokenizers of every family, trained on a few lines, and texts that are hard for them."""

from __future__ import annotations

import json
from functools import lru_cache
from random import Random

from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mixlm.tokenization.incremental import TokenizerEncoder
from mixlm.tokenization.vocabulary import detect_family

CORPUS = [
    "The river turns under the old stone bridge, and the birds fly over it.",
    "It's 2024; they've paid 1,250.75 for 3 books (don't ask why)!",
    "def main(argv):\n    if len(argv) > 1:\n        return argv[1]\n\n\treturn None\r\n",
    "Größe, naïve café, señor; Zürich — “quoted” … fin.",
    "日本語のテキストと中文文本。한국어 문장도 있다.",
    "Привет, мир! Как дела? Ελληνικά και עברית.",
    "👍🏽 👩‍👩‍👧 🎉🎉 ok <|x|> </x> [INST]",
] * 3
SPECIAL = ("<|im_start|>", "<|im_end|>", "<s>", "</s>")
LIKE_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FRAGMENTS = [
    *("the", " the", " river", "it's", "'ve", "'", " ", "  ", "\n", "\n\n", "\t", "\r\n", "1", "250", ".", ",", "é"),
    *("e\u0301", "\u0301", "\u0327", "日本", "語", "한국", "\u1112\u1161\u11ab", "👍🏽", "👩\u200d👧", "🎉"),
    *("Ж", "ß", "ﬁ", "\u00a0", "\u3000", "x", "<|im_end|>", "<|im_start|>", "</s>", "<|im_", "end|>", "<0x0A>"),
    *("[INST]", "return", "    "),
]  # fmt: skip
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=30).map("".join)
BROKEN = ["🎉".encode()[:3], "日".encode()[:2], "é".encode()[:1], b"\xff", b"\x80", b"\xed\xa0\x80"]
any_bytes = st.lists(
    st.sampled_from([*(fragment.encode() for fragment in FRAGMENTS), *BROKEN])
    | st.text(max_size=3).map(str.encode)
    | st.binary(min_size=1, max_size=3),
    max_size=25,
).map(b"".join)


def random_pieces(rng: Random) -> list[bytes]:
    """A text in pieces as members might generate it: some end inside a word or a character, some are not text."""
    pieces = []
    for _ in range(rng.randint(1, 14)):
        kind = rng.random()
        if kind < 0.75:
            piece = rng.choice(FRAGMENTS).encode()
        elif kind < 0.95:
            piece = chr(rng.choice([rng.randint(0x20, 0x2FF), rng.randint(0x300, 0xD7FF)])).encode()
        else:
            piece = rng.choice(BROKEN)
        cut = rng.randrange(len(piece)) if rng.random() < 0.3 else 0
        pieces += [part for part in (piece[:cut], piece[cut:]) if part]
    return pieces


def _special_tokens() -> list[AddedToken]:
    return [AddedToken(spelling, special=True, normalized=False) for spelling in SPECIAL]


def _byte_level(pre_tokenizer, *, normalizer=None, post_processor=None, plain=()) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(_special_tokens())
    tokenizer.add_tokens([AddedToken(content, special=False, normalized=False) for content in plain])
    return tokenizer


def _gpt2() -> Tokenizer:
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def _split() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(LIKE_GPT4), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt4() -> Tokenizer:
    return _byte_level(_split(), normalizer=normalizers.NFC())


def _trimmed() -> Tokenizer:
    return _byte_level(_split(), post_processor=processors.ByteLevel(trim_offsets=True))


def _tools() -> Tokenizer:
    return _byte_level(_split(), normalizer=normalizers.NFC(), plain=("<tool_call>", "</tool_call>"))


def _digits() -> Tokenizer:
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return _byte_level(pre_tokenizers.Sequence(parts))


def _prefixed() -> Tokenizer:
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))


def _sentencepiece(normalizer, decoder, *, plain=()) -> Tokenizer:
    """BPE over "▁"-marked text with one token for each byte."""
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    base.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, limit_alphabet=90, show_progress=False))
    learned = json.loads(base.to_str())["model"]
    head = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁▁", "▁▁▁▁"]
    names = [*head, *(name for name in learned["vocab"] if name not in head)]
    merges = [("▁", "▁"), ("▁▁", "▁▁"), *(tuple(merge) for merge in learned["merges"])]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    merges = [pair for pair in dict.fromkeys(merges) if all(part in vocab for part in (*pair, "".join(pair)))]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("<unk>", special=True, normalized=False), *_special_tokens()])
    tokenizer.add_tokens([AddedToken(content, special=False, normalized=False) for content in plain])
    return tokenizer


def _sentencepiece_decoder(*more) -> decoders.Decoder:
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more])


def _llama2() -> Tokenizer:
    steps = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _sentencepiece(steps, _sentencepiece_decoder(decoders.Strip(" ", 1, 0)))


def _gemma() -> Tokenizer:
    return _sentencepiece(normalizers.Replace(" ", "▁"), _sentencepiece_decoder(), plain=("\n\n", "\n\n\n", "<b>"))


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(_special_tokens())
    return tokenizer


BYTE_LEVEL = {
    "gpt2": _gpt2,
    "gpt4": _gpt4,
    "trimmed": _trimmed,
    "tools": _tools,
    "digits": _digits,
    "prefixed": _prefixed,
}
SENTENCEPIECE = {"llama2": _llama2, "gemma": _gemma}
# Every character can be spelled.
EXACT = {**BYTE_LEVEL, **SENTENCEPIECE}
ALL = {**EXACT, "unigram": _unigram}


@lru_cache
def _trained(name: str) -> str:
    return ALL[name]().to_str()


def trained(name: str) -> Tokenizer:
    """A fresh copy: an encoder changes its tokenizer."""
    return Tokenizer.from_str(_trained(name))


def encoder(tokenizer: Tokenizer) -> TokenizerEncoder:
    return TokenizerEncoder(tokenizer, detect_family(tokenizer, "a test's"))
