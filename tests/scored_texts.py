"""Scores made of numbers, and toys whose scores are computed a second, plain way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from toys import END, SHARED, Recorder, driven, named, table

from mixlm.decoding.conventional import conventional
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import EncodedPrompt, Ensemble
from mixlm.scoring.scores import Scores


def made(logprobs: np.ndarray, *, text: bytes | None = None, begins: Sequence[int] | None = None) -> Scores:
    """Scores of segments of one byte, one passage unless told otherwise."""
    count = len(logprobs)
    places = np.arange(count)
    names = tuple(f"m{i}" for i in range(logprobs.shape[1]))
    start = np.zeros(count, dtype=np.int64) if begins is None else np.array(begins, dtype=np.int64)
    table = np.asarray(logprobs, dtype=float)
    return Scores(names, "token", text or b"x" * count, places, places + 1, start, table, np.zeros_like(table))


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


def speaking(seed: int, tokens: Sequence[bytes] = SHARED) -> ToyEngine:
    """A toy that gives the token that begins a text no probability: replies never draw it, scores would count it."""
    plain = table(len(tokens) + 2, seed)

    def silent(context: tuple[int, ...]) -> np.ndarray:
        row = plain(context).copy()
        row[len(tokens)] = -np.inf
        return row

    return ToyEngine(tokens, silent)


def stepwise(those: Ensemble, prompts: EncodedPrompt, pieces: Sequence[bytes]) -> float:
    """The log-probability of pieces, END the last of them or not, by `conventional`, step by step under the router."""
    settings = those.settings(method="conventional", temperature=1.0, top_k=0, seed=0)
    writing = those.context(settings).begin_sequence(prompts)
    symbols = {
        END if one == those.unit.end else those.unit.symbol_bytes(one): one for one in range(those.unit.end, -1, -1)
    }
    total = 0.0
    for piece in pieces:
        seen = Recorder()
        driven(conventional, writing, writing.route(writing.state), seen)
        total += np.log(named(those, seen.symbols, np.exp(seen.logprobs))[piece])
        if piece != END:
            writing.state.append(symbols[piece])
    return float(total)
