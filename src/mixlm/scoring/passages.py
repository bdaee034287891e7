"""Given texts in passages that fit a context: what is scored, and each member's tokens in front of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mixlm.core.options import GenerationOptions
from mixlm.engines.base import Engine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from mixlm.generation.prompt import Prompt
from mixlm.types import Ids

Before = Literal["begin", "end"]
# Texts are scored in passages of about this many bytes, each from the beginning of a context.
PASSAGE_BYTES = 6000


@dataclass(frozen=True)
class Passage:
    """A part of a text, and what is in front of it.

    data: the bytes to score. prefixes: each member's ids in front of them, int64 (n,). prompt: the prompt as its author
    wrote it, UTF-8; empty for a bare text. scores_end: whether end-of-text is scored too.
    """

    data: bytes
    prefixes: Sequence[Ids]
    prompt: bytes = b""
    scores_end: bool = False


def split_passages(data: bytes, size: int = PASSAGE_BYTES) -> list[bytes]:
    """Split a text into passages of at most `size` bytes, at the last line end, space or character that allows it."""
    passages = []
    start = 0
    while len(data) - start > size:
        middle, limit = start + size // 2, start + size
        cut = data.rfind(b"\n", middle, limit) + 1 or data.rfind(b" ", middle, limit)
        if cut <= start:
            cut = limit
            # A character has at most three continuation bytes. Longer runs of them are not text.
            while cut > max(start + 1, limit - 3) and data[cut] & 0xC0 == 0x80:
                cut -= 1
            cut = limit if data[cut] & 0xC0 == 0x80 else cut
        passages.append(data[start:cut])
        start = cut
    return [*passages, data[start:]]


def text_prefix(engine: Engine, before: Before = "begin") -> Ids:
    """Return a member's ids in front of a text without a prompt, int64 (n,).

    Args:
        engine: The member's.
        before: "begin" for its BOS, or end-of-text if it has none; "end" for end-of-text.

    Raises:
        ConfigError: It has no such token.
    """
    ends = engine.vocabulary.end_ids
    prefix = engine.prompts.prefix(ends) if before == "begin" else sorted(ends)[:1]
    if not prefix:
        raise ConfigError(f"{engine.name} has no token that begins a text, so its first token has no probability")
    return np.array(prefix, dtype=np.int64)


def bare_passages(texts: Sequence[bytes], engines: Sequence[Engine], before: Before = "begin") -> list[Passage]:
    """Return texts in passages that fit every context. before: what stands in front of each; see `text_prefix`."""
    prefixes = [text_prefix(engine, before) for engine in engines]
    return [
        Passage(part, prefixes)
        for text in texts
        for whole in split_passages(text)
        for part in split_to_fit(whole, engines, [len(ids) for ids in prefixes])
    ]


def answer_passages(
    ensemble: Ensemble, pairs: Sequence[tuple[Prompt, str]], settings: GenerationOptions, *, ends: bool
) -> list[Passage]:
    """Return answers after their prompts. ends: whether the end of each answer is scored too."""
    passages = []
    for prompt, answer in pairs:
        prompts = ensemble.encode_prompt(prompt, settings)
        passages.append(Passage(answer.encode(errors="replace"), prompts.ids, prompts.text, ends))
    return passages


def split_to_fit(data: bytes, engines: Sequence[Engine], prefix_lengths: Sequence[int]) -> list[bytes]:
    """Split a passage further until it fits each member's context. prefix_lengths: tokens in front, by member."""
    fits = all(
        length + len(engine.encoder.encode(data).ids) <= engine.context_length
        for engine, length in zip(engines, prefix_lengths, strict=True)
    )
    if fits or len(data) < 8:
        return [data]
    return [
        part
        for half in split_passages(data, len(data) // 2 + 1)
        for part in split_to_fit(half, engines, prefix_lengths)
    ]
