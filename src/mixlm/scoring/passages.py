"""Given texts in parts that fit a context: what is scored, and what each member reads in front of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixlm.engines.base import Engine
from mixlm.errors import ConfigError
from mixlm.types import Ids

# Texts are read in passages of about this many bytes, each from the beginning of a context.
PASSAGE_BYTES = 6000


@dataclass(frozen=True)
class Passage:
    """A part of a text: the bytes to be scored, and in front of them what each member reads, and what an author wrote.

    before: ids a member, int64. prompt: UTF-8, empty for a bare text. ends: whether the end of the text is scored too.
    """

    data: bytes
    before: Sequence[Ids]
    prompt: bytes = b""
    ends: bool = False


def split_passages(data: bytes, size: int = PASSAGE_BYTES) -> list[bytes]:
    """Cut a text into passages of at most `size` bytes, at the last line end, space or character that allows it."""
    passages = []
    start = 0
    while len(data) - start > size:
        middle, limit = start + size // 2, start + size
        cut = data.rfind(b"\n", middle, limit) + 1 or data.rfind(b" ", middle, limit)
        if cut <= start:
            cut = limit
            # A character has at most three bytes behind its first. Longer runs of them are no text.
            while cut > max(start + 1, limit - 3) and data[cut] & 0xC0 == 0x80:
                cut -= 1
            cut = limit if data[cut] & 0xC0 == 0x80 else cut
        passages.append(data[start:cut])
        start = cut
    return [*passages, data[start:]]


def beginning(engine: Engine) -> Ids:
    """Return the ids that a member reads in front of a bare text, int64. Raises ConfigError where there are none."""
    prefix = engine.prompts.prefix(engine.vocabulary.end_ids)
    if not prefix:
        raise ConfigError(f"{engine.name} has no token that begins a text, so its first token has no probability")
    return np.array(prefix, dtype=np.int64)


def fitting_contexts(data: bytes, engines: Sequence[Engine], before: Sequence[int]) -> list[bytes]:
    """Cut a passage further where it has more tokens than a member's context."""
    fits = all(
        length + len(engine.encoder.encode(data).ids) <= engine.context_length
        for engine, length in zip(engines, before, strict=True)
    )
    if fits or len(data) < 8:
        return [data]
    return [
        part for half in split_passages(data, len(data) // 2 + 1) for part in fitting_contexts(half, engines, before)
    ]
