"""Where members with different tokenizers meet in a given text: the byte offsets at which all have a token boundary.

Between two such offsets lies a segment. With one vocabulary every token is a segment.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt

from mixlm.errors import ConfigError
from mixlm.tokenization.incremental import Encoder
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Floats, Ids

Offsets = npt.NDArray[np.int64]


def token_ends(vocabulary: Vocabulary, ids: Sequence[int] | Ids) -> Offsets:
    """Return where each token ends in the text that the tokens spell, in bytes: int64 (n,)."""
    return np.cumsum([len(vocabulary.tokens[i]) for i in ids], dtype=np.int64)


def encode_exactly(encoder: Encoder, vocabulary: Vocabulary, data: bytes, name: str) -> tuple[list[int], Offsets]:
    """Return a member's ids of a text, and where each of them ends in it, in bytes: int64 (n,).

    Args:
        encoder: The member's.
        vocabulary: The member's.
        data: The text.
        name: The model's, for the message.

    Raises:
        ConfigError: The tokens do not spell the text exactly.
        TokenizerError: The model has no row for one of them.
    """
    ids = encoder.encode(data).ids
    vocabulary.check_rows(ids, name)
    spelled = b"".join(vocabulary.tokens[i] for i in ids)
    if spelled != data:
        raise ConfigError(
            f"the tokens of {name} do not spell the text: {_difference(data, spelled)}",
            "its tokenizer changes or drops some characters; take them out of the text",
        )
    return ids, token_ends(vocabulary, ids)


def _difference(data: bytes, spelled: bytes) -> str:
    """Describe the first place where the tokens depart from the text."""
    pairs = zip(data, spelled, strict=False)
    offset = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(data), len(spelled)))
    while 0 < offset < len(data) and data[offset] & 0xC0 == 0x80:
        offset -= 1
    expected, actual = (text[offset : offset + 12].decode(errors="replace") for text in (data, spelled))
    return f"at {expected!r} they have {actual!r}"


def common_boundaries(boundaries: Sequence[Offsets]) -> Offsets:
    """Return the offsets at which all members have a token boundary, ascending.

    boundaries: each member's, int64 (n,), ascending.
    """
    common: Offsets = reduce(np.intersect1d, boundaries)
    return common


def first_tokens(ends: Offsets, common: Offsets) -> Offsets:
    """Return the index of a member's first token in each segment: int64 (segments,).

    Args:
        ends: Where each of the member's tokens ends, int64 (n,), ascending.
        common: Where the segments end: boundaries of the member among others.
    """
    return np.concatenate([[0], np.searchsorted(ends, common[:-1], side="right")]).astype(np.int64)


def segment_logprobs(logprobs: Floats, ends: Offsets, common: Offsets) -> Floats:
    """Return a member's log-probability of each segment, float64 (segments,), from that of each of its tokens, (n,)."""
    sums: Floats = np.add.reduceat(logprobs, first_tokens(ends, common))
    return sums


def segment_strings(text: bytes, starts: Offsets, ends: Offsets) -> list[str]:
    """Return the text of each segment.

    A character that is split between two segments belongs to the one that completes it. Bytes that are not UTF-8 are
    shown as replacement characters.
    """
    strings: list[str] = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    last = len(starts) - 1
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        final = bool(number == last or starts[number + 1] != end)
        strings.append(decoder.decode(text[start:end], final))
    return strings
