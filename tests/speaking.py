"""Toys with real tokenizers."""

from __future__ import annotations

from functools import cache

from toys import table
from trained import SENTENCEPIECE, encoder, trained

from mixlm.engines.toy import ToyEngine
from mixlm.tokenization.vocabulary import TokenizerFamily, token_bytes


@cache
def speaking(kind: str, seed: int) -> ToyEngine:
    """A random table over a trained tokenizer's vocabulary."""
    tokenizer = trained(kind)
    family = TokenizerFamily.SENTENCEPIECE if kind in SENTENCEPIECE else TokenizerFamily.BYTE_LEVEL
    spelled, control = token_bytes(tokenizer, family, kind)
    tokens = tuple(b"" if i in control else spelled.get(i, b"") for i in range(max(spelled) + 1))
    toy = ToyEngine(tokens, table(len(tokens) + 2, seed), name=f"{kind}:{seed}")
    toy.encoder = encoder(trained(kind))
    toy.prompts._encoder = toy.encoder
    return toy
