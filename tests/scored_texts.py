"""Scores made of numbers, and toys whose scores are computed a second, plain way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixlm.engines.toy import ToyEngine
from mixlm.scored import Scores


def made(logprobs: np.ndarray, *, text: bytes | None = None, begins: Sequence[int] | None = None) -> Scores:
    """Scores of segments of one byte, one passage unless told otherwise."""
    count = len(logprobs)
    places = np.arange(count)
    names = tuple(f"m{i}" for i in range(logprobs.shape[1]))
    start = np.zeros(count, dtype=np.int64) if begins is None else np.array(begins, dtype=np.int64)
    return Scores(names, "token", text or b"x" * count, places, places + 1, start, np.asarray(logprobs, dtype=float))


def probabilities(one: ToyEngine, ids: Sequence[int]) -> np.ndarray:
    """A toy's distribution over its ids behind some, in float64."""
    logits = np.asarray(one.table(tuple(ids)), dtype=np.float32).astype(np.float64)
    mass = np.exp(logits - logits.max())
    return mass / mass.sum()


def token_scores(one: ToyEngine, before: Sequence[int], data: bytes) -> list[tuple[int, float]]:
    """Where each token of a text ends, and its log-probability behind the ids in front of the text."""
    ids = one.encoder.encode(data).ids
    out, at = [], 0
    for i, token in enumerate(ids):
        at += len(one.vocabulary.tokens[token])
        out.append((at, float(np.log(probabilities(one, [*before, *ids[:i]])[token]))))
    return out
