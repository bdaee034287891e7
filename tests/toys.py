"""Toy ensembles small enough to enumerate, and their distributions computed a second, plain way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from scipy import stats

from mixlm.binding import LoadedMember
from mixlm.core.sampling import TokenHistory, dense_distribution
from mixlm.engines.base import TextInterface
from mixlm.engines.topk_only import TopKOnlyEngine, TopKOnlySession
from mixlm.engines.toy import Table, ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.generation.dispatch import Dispatcher
from mixlm.generation.member import address
from mixlm.generation.sequence import DecodeStep, SequenceState, Strategy
from mixlm.types import Candidates, Sampling

Distribution = dict[bytes, float]
END = b""  # no token has these bytes

SHARED = (b"a", b"ab", b"b", b" c", b"c", b" ")
# The same byte strings under other ids, some of them under two; every member can read every text.
VOCABULARIES = (
    SHARED,
    (b" ", b"b", b"ab", b"a", b"ab", b"c"),
    (b"c", b"a", b" c", b"b", b" ", b"ba", b"abc", b"a"),
    (b"b", b"a", b"c", b" "),
    (b"abc", b"c", b" ", b"b", b"a", b" c", b" c", b" c"),
)
WEIGHTS = (0.35, 0.1, 0.25, 0.2, 0.1)
OPTIONS = {
    "plain": {"temperature": 1.0, "top_k": 0},
    "defaults": {},
    "temperature": {"temperature": 0.4, "top_k": 0},
    "top_k": {"temperature": 1.0, "top_k": 3},
    "top_p": {"temperature": 1.0, "top_k": 0, "top_p": 0.83},
    "min_p": {"temperature": 1.5, "top_k": 0, "min_p": 0.11},
    "repetition": {"temperature": 1.0, "top_k": 0, "repetition_penalty": 2.0},
    "presence": {"temperature": 1.0, "top_k": 0, "presence_penalty": 0.5},
    "frequency": {"temperature": 1.0, "top_k": 0, "frequency_penalty": 0.25},
    "all": {
        "repetition_penalty": 2.0,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.25,
        "temperature": 0.8,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.03,
    },
}


def table(vocab: int, seed: int, order: int = 3) -> Table:
    """Random logits on a grid that float32 holds exactly, so that single and double precision agree."""

    @cache
    def row(context: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([seed, *context])
        return np.round(rng.normal(scale=1.5, size=vocab) * 1024) / 1024

    return lambda context: row(context[-order:])


def engine(tokens: Sequence[bytes] = SHARED, seed: int = 0, **options: Any) -> ToyEngine:
    return ToyEngine(tokens, table(len(tokens) + 2, seed), **options)


def fixed(probabilities: Mapping[bytes, float], tokens: Sequence[bytes] = SHARED, **options: Any) -> ToyEngine:
    """An engine that gives the same probabilities at every position; END is the end of text."""
    size = len(tokens) + 2
    logits = np.full(size, -np.inf)
    for data, probability in probabilities.items():
        logits[size - 1 if data == END else list(tokens).index(data)] = np.log(probability)
    return ToyEngine(tokens, lambda _: logits, **options)


class ReportingSession(TopKOnlySession):
    """A toy's table, of which the largest are reported."""

    def __init__(self, reporting: ReportingToy) -> None:
        super().__init__(reporting)
        self._toy = reporting.toy
        self._counts = reporting.counts

    def top_tokens(self, ids, count, among=None):
        self._counts.append(count)
        logits = self._toy.table(tuple(ids.tolist())).astype(np.float32).astype(np.float64)
        top = np.argsort(-logits, kind="stable")[:count]
        return Candidates(top, logits[top] - np.logaddexp.reduce(logits))


class ReportingToy(TopKOnlyEngine):
    """A toy that reports so many tokens, or at most so many. counts: how many were requested, in order."""

    extra_tokens = 0

    def __init__(self, toy: ToyEngine, limit: int, max_top_k: int | None = None) -> None:
        super().__init__(toy.name, TextInterface(toy.vocabulary, toy.encoder, toy.prompts), toy.context_length)
        self.toy = toy
        self.top_k_limit = limit
        self.max_top_k = max_top_k
        self.counts: list[int] = []

    def session(self):
        return ReportingSession(self)


def make_ensemble(
    engines: Sequence[ToyEngine],
    weights: Sequence[float] | None = None,
    *,
    sampling: Sequence[Any] = (),
    **options: Any,
) -> Ensemble:
    member_options = sampling or [{} for _ in engines]
    members = [
        LoadedMember(engine, f"m{i}", mine)
        for i, (engine, mine) in enumerate(zip(engines, member_options, strict=True))
    ]
    return Ensemble(members, weights, **options)


def toys(unit: str, members: int, **options: Any) -> Ensemble:
    """An ensemble of random toys: one vocabulary for the unit `token`, several for `piece`."""
    vocabularies = VOCABULARIES[:members] if unit == "piece" else [SHARED] * members
    engines = [engine(tokens, seed=10 + i) for i, tokens in enumerate(vocabularies)]
    return make_ensemble(engines, WEIGHTS[:members], unit=unit, **options)


def member_distribution(
    engine: ToyEngine,
    sampling: Sampling,
    prompt: Sequence[int],
    ids: Sequence[int],
    without: Callable[[bytes], bool] = lambda _: False,
) -> Distribution:
    """One member's distribution over byte strings, by the dense reference and a plain loop. without: tokens to mask."""
    logits = engine.table((*prompt, *ids)).astype(np.float32)
    vocabulary = engine.vocabulary
    control = vocabulary.special_ids - vocabulary.end_ids
    masked = [i for i in range(vocabulary.size) if i not in control and without(vocabulary.tokens[i])]
    banned = np.array(sorted([*control, *masked]), dtype=np.int64)
    history = TokenHistory.from_tokens(np.array(prompt, dtype=np.int64), np.array(ids, dtype=np.int64))
    distribution: Distribution = defaultdict(float)
    for i, probability in enumerate(dense_distribution(logits, sampling, banned, history)):
        if probability > 0:
            distribution[END if i in vocabulary.end_ids else vocabulary.tokens[i]] += float(probability)
    return dict(distribution)


def exact_distribution(
    ensemble: Ensemble, options: Mapping[str, Any], prompt: str, pieces: Sequence[bytes] = ()
) -> Distribution:
    """The ensemble's distribution `Σ λ_i K_i A_i p_i` behind a raw prompt and the pieces written so far."""
    distribution: Distribution = defaultdict(float)
    for weight, member in zip(ensemble.weights, ensemble.members, strict=True):
        toy = member.engine
        if ensemble.unit.name == "token":
            ids = [toy.vocabulary.tokens.index(piece) for piece in pieces]
        else:
            ids = toy.encoder.encode(b"".join(pieces)).ids
        read = toy.prompts.raw(prompt).tolist()
        for data, probability in member_distribution(
            toy, Sampling(**{**member.sampling, **options}), read, ids
        ).items():
            distribution[data] += weight * probability
    return dict(distribution)


def rule_distribution(ensemble: Ensemble, options: Mapping[str, Any], pieces: Sequence[bytes] = ()) -> Distribution:
    """A rule's dense sum over the members' distributions after the prompt "ab", by the toys' tables."""
    settings = ensemble.settings(raw=True, **options)
    rows = []
    for member in ensemble.members:
        toy = member.engine
        if ensemble.unit.name == "token":
            ids = [toy.vocabulary.tokens.index(piece) for piece in pieces]
        else:
            ids = toy.encoder.encode(b"".join(pieces)).ids
        read = toy.prompts.raw("ab").tolist()
        rows.append(member_distribution(toy, settings.member_sampling(member.sampling), read, ids))
    keys = sorted({key for row in rows for key in row})
    probs = np.array([[row.get(key, 0.0) for key in keys] for row in rows])
    rule = settings.combination
    after = settings.combined_sampling({})
    combined = (rule if after is None else rule.with_sampling(after)).combine(probs, ensemble.weights)
    return {key: float(p) for key, p in zip(keys, combined, strict=True) if p > 0}


class Recorder:
    """Stands in for noise: a coin of choice, and a note of the distribution that a symbol is sampled from."""

    def __init__(self, coin: int = 0) -> None:
        self._coin = coin
        self.weights: np.ndarray | None = None
        self.symbols = np.zeros(0, dtype=np.int64)
        self.logprobs = np.zeros(0)

    def coin(self, weights: np.ndarray) -> int:
        self.weights = weights
        return self._coin

    def sample(self, symbols: np.ndarray, logprobs: np.ndarray) -> int:
        self.symbols, self.logprobs = symbols, logprobs
        return 0


def named(ensemble: Ensemble, symbols: np.ndarray, probabilities: np.ndarray) -> Distribution:
    """A distribution over symbols as one over byte strings; a symbol that comes twice is an error."""
    unit = ensemble.unit
    assert len(set(symbols.tolist())) == len(symbols)
    keys = [END if symbol == unit.end else unit.symbol_bytes(symbol) for symbol in symbols.tolist()]
    return dict(zip(keys, probabilities.tolist(), strict=True))


def written(ensemble: Ensemble, options: Mapping[str, Any], prompt: str, pieces: Sequence[bytes]) -> SequenceState:
    """A text that stands at a given place."""
    settings = ensemble.settings(raw=True, seed=0, **options)
    writing = ensemble.context(settings).begin_sequence(ensemble.encode_prompt(prompt, settings))
    for piece in pieces:
        known = range(ensemble.unit.end)
        writing.state.append(next(symbol for symbol in known if ensemble.unit.symbol_bytes(symbol) == piece))
    return writing


def driven(strategy: Strategy, writing: SequenceState, weights: np.ndarray, noise: Any) -> tuple[Any, list[list[Any]]]:
    """Drive a strategy by hand. Returns its choice and the requests it made, round by round."""
    flow = strategy(DecodeStep(weights, noise, writing.views, lambda symbol: iter(())))
    rounds = []
    try:
        requests = next(flow)
        while True:
            rounds.append(requests)
            requests = flow.send(Dispatcher().respond(address(requests, writing.members, writing.sessions)))
    except StopIteration as done:
        [choice] = done.value
        return choice, rounds


def assert_same_distribution(actual: Distribution, expected: Distribution, tolerance: float = 1e-12) -> None:
    for key in actual.keys() | expected.keys():
        assert abs(actual.get(key, 0.0) - expected.get(key, 0.0)) < tolerance, key


def assert_sampled_from(counts: Mapping[Any, int], distribution: Mapping[Any, float]) -> None:
    """Chi-square; outcomes expected fewer than five times are taken together.

    Of n samples in 10 (30) cells, a distribution at a total variation of 3.8 (4.4) / √n or more is refused with
    probability 0.99 at least: 0.16 (0.18) with 600, 0.12 (0.14) with 1000. (Pearson's statistic has a noncentrality of
    4 n d² or more at a total variation of d.)
    """
    assert set(counts) <= set(distribution), "something was drawn that the law excludes"
    total = sum(counts.values())
    often = [key for key in distribution if distribution[key] * total >= 5]
    rare = [key for key in distribution if key not in often]
    seen = [counts.get(key, 0) for key in often]
    expected = [distribution[key] * total for key in often]
    if rare and sum(distribution[key] for key in rare) * total >= 1:
        seen.append(sum(counts.get(key, 0) for key in rare))
        expected.append(sum(distribution[key] for key in rare) * total)
    scale = sum(seen) / sum(expected)
    p = stats.chisquare(seen, [count * scale for count in expected]).pvalue
    assert p > 1e-4, (p, seen, expected)


def counted(draw: Callable[[int], Any], sequences: int) -> dict[Any, int]:
    counts: dict[Any, int] = defaultdict(int)
    for sequence in range(sequences):
        counts[draw(sequence)] += 1
    return dict(counts)
