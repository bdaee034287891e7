"""Scores made of numbers, and toys whose scores are computed a second, plain way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from toys import END, SHARED, Recorder, driven, named, table

from mixlm.decoding.conventional import conventional
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.generation.prompt import EncodedPrompt
from mixlm.generation.target import average_target
from mixlm.scoring.passages import Passage
from mixlm.scoring.rule_scores import RuleScorer
from mixlm.scoring.scores import Scores


def made(logprobs: np.ndarray, *, text: bytes | None = None, begins: Sequence[int] | None = None) -> Scores:
    """Scores of segments of one byte; one passage by default."""
    count = len(logprobs)
    offsets = np.arange(count)
    names = tuple(f"m{i}" for i in range(logprobs.shape[1]))
    passage_starts = np.zeros(count, dtype=np.int64) if begins is None else np.array(begins, dtype=np.int64)
    table = np.asarray(logprobs, dtype=float)
    return Scores(
        names, "token", text or b"x" * count, offsets, offsets + 1, passage_starts, table, np.zeros_like(table)
    )


def rule_logprob(ensemble: Ensemble, passages: Sequence[Passage]) -> float:
    """The log-probability of passages under the rule of an ensemble."""
    return float(RuleScorer(ensemble).logprobs(passages)[0])


def probabilities(engine: ToyEngine, ids: Sequence[int]) -> np.ndarray:
    """A toy's distribution over its ids after some, in float64."""
    logits = np.asarray(engine.table(tuple(ids)), dtype=np.float32).astype(np.float64)
    mass = np.exp(logits - logits.max())
    return mass / mass.sum()


def token_scores(engine: ToyEngine, prefix: Sequence[int], data: bytes) -> list[tuple[int, float]]:
    """Where each token of a text ends, and its log-probability after the ids in front of the text."""
    ids = engine.encoder.encode(data).ids
    scores, end = [], 0
    for i, token in enumerate(ids):
        end += len(engine.vocabulary.tokens[token])
        scores.append((end, float(np.log(probabilities(engine, [*prefix, *ids[:i]])[token]))))
    return scores


def speaking(seed: int, tokens: Sequence[bytes] = SHARED) -> ToyEngine:
    """A toy that gives BOS no probability: completions never sample it, scores would count it."""
    plain = table(len(tokens) + 2, seed)

    def silent(context: tuple[int, ...]) -> np.ndarray:
        row = plain(context).copy()
        row[len(tokens)] = -np.inf
        return row

    return ToyEngine(tokens, silent)


def stepwise(toy: Ensemble, prompts: EncodedPrompt, pieces: Sequence[bytes]) -> float:
    """The log-probability of pieces, END the last of them or not, by `conventional`, step by step under the router."""
    settings = toy.settings(method="conventional", temperature=1.0, top_k=0, seed=0)
    sequence = toy.context(settings).begin_sequence(prompts)
    symbols = {
        END if symbol == toy.unit.end else toy.unit.symbol_bytes(symbol): symbol
        for symbol in range(toy.unit.end, -1, -1)
    }
    total = 0.0
    for piece in pieces:
        recorder = Recorder()
        driven(conventional(average_target()), sequence, sequence.route(sequence.state), recorder)
        total += np.log(named(toy, recorder.symbols, np.exp(recorder.logprobs))[piece])
        if piece != END:
            sequence.state.append(symbols[piece])
    return float(total)
