"""Routers that observe a member: the same distribution by every strategy, and what a router may not look at."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from toys import (
    END,
    OPTIONS,
    Recorder,
    ReportingToy,
    assert_same_distribution,
    engine,
    make_ensemble,
    member_distribution,
    named,
    toys,
)

from mixlm.decoding.auto import Auto
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, EngineError, GenerationInterruptedError, UnsupportedError
from mixlm.generation.dispatch import Dispatcher
from mixlm.generation.member import address
from mixlm.loading import load
from mixlm.routing import Observation, Observes, PromptContext
from mixlm.routing.observation import top_tokens
from mixlm.types import Candidates, Sampling
from mixlm.verification.check import check

PLAIN: Any = {"temperature": 1.0, "top_k": 0}
PLACES = [(), (b"a",), (b"ab", b" c", b"b")]


class Observing:
    """Weights that change a great deal with what is observed: by the likeliest tokens, or by the hidden state."""

    def __init__(self, members: int, member: int = 0, *, hidden: bool = False, top_k: int = 3) -> None:
        self.members = members
        self.observes = Observes(member, top_k, hidden)
        self.seen: list[Observation] = []

    def begin(self, context: PromptContext) -> Any:
        def route(state: Any, observation: Observation) -> np.ndarray:
            self.seen.append(observation)
            return self.weights(observation)

        return route

    def weights(self, observation: Observation) -> np.ndarray:
        signal = observation.ids[0] + 10 * observation.logprobs[0]
        if observation.hidden is not None:
            signal = signal + 3 * float(observation.hidden[0])
        scores = np.exp(2 * np.sin(signal * np.arange(1, self.members + 1)))
        return scores / scores.sum()


def plain_weights(ensemble: Ensemble, router: Observing, ids: Any) -> np.ndarray:
    """The weights behind a member's ids, computed a second, plain way."""
    logits = ensemble.members[router.observes.member].engine.table(tuple(ids)).astype(np.float32)  # type: ignore[attr-defined]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: router.observes.top_k]
    probabilities = np.exp(logits[order].astype(np.float64))
    logprobs = np.log(probabilities / probabilities.sum())
    hidden = logits.astype(np.float16) if router.observes.hidden else None
    return router.weights(Observation(np.array(order), logprobs, hidden))


def at(ensemble: Ensemble, method: str, options: Any, pieces: Any) -> tuple[Any, Any]:
    """A text that stands at a given place, and what generates with a method."""
    settings = ensemble.settings(raw=True, seed=0, method=method, **options)
    context = ensemble.context(settings)
    sequence = context.begin_sequence(ensemble.encode_prompt("ab", settings))
    for piece in pieces:
        sequence.state.append(
            next(symbol for symbol in range(ensemble.unit.end) if ensemble.unit.symbol_bytes(symbol) == piece)
        )
    return context, sequence


def expected(ensemble: Ensemble, router: Observing, options: Any, pieces: Any) -> tuple[np.ndarray, dict[bytes, float]]:
    """The target `Σ λ_i(s) K_i A_i p_i` with the weights of what is observed at the state."""
    texts = []
    for member in ensemble.members:
        if ensemble.unit.name == "token":
            ids = [member.engine.vocabulary.tokens.index(piece) for piece in pieces]
        else:
            ids = member.engine.encoder.encode(b"".join(pieces)).ids
        texts.append((member.engine.prompts.raw("ab").tolist(), ids))
    prompt, ids = texts[router.observes.member]
    weights = plain_weights(ensemble, router, [*prompt, *ids])
    distribution: dict[bytes, float] = defaultdict(float)
    for weight, member, (prompt, ids) in zip(weights, ensemble.members, texts, strict=True):
        for data, probability in member_distribution(member.engine, Sampling(**options), prompt, ids).items():  # type: ignore[arg-type]
            distribution[data] += weight * probability
    return weights, dict(distribution)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("unit", ["token", "piece"])
def test_mixture_and_conventional_sample_the_average_with_observed_weights(unit, options, hidden):
    router = Observing(3, 1, hidden=hidden)
    ensemble = toys(unit, 3, router=router)
    seen = []
    for pieces in PLACES:
        weights, target = expected(ensemble, router, OPTIONS[options], pieces)
        seen.append(weights)
        mixed: dict[bytes, float] = defaultdict(float)
        for coin in range(3):
            noise = Recorder(coin)
            context, sequence = at(ensemble, "mixture", OPTIONS[options], pieces)
            [choice] = context.decode_step(sequence, noise)
            assert choice.member == coin
            np.testing.assert_allclose(noise.weights, weights, atol=1e-12)
            for key, probability in named(ensemble, noise.symbols, np.exp(noise.logprobs)).items():
                mixed[key] += weights[coin] * probability
        assert_same_distribution(mixed, target)
        noise = Recorder()
        context, sequence = at(ensemble, "conventional", OPTIONS[options], pieces)
        context.decode_step(sequence, noise)
        assert_same_distribution(named(ensemble, noise.symbols, np.exp(noise.logprobs)), target)
    assert len({tuple(weights.round(6)) for weights in seen}) > 1  # they do depend on the state


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("unit", ["token", "piece"])
def test_equal_noise_gives_equal_text_by_every_strategy_and_batch(unit, hidden):
    ensemble = toys(unit, 3, router=Observing(3, 1, hidden=hidden))
    options = {"raw": True, "seed": 4, "max_tokens": 24, "ignore_end": True, **PLAIN}

    def written(completion):
        return [(token.data, token.member, token.logprob) for token in completion.tokens]

    expected = written(ensemble.generate("ab", method="mixture", **options))
    assert len({member for _, member, _ in expected}) == 3
    for draft in ("m0", "m1", "m2", "lookup", None):
        for block in (1, 4):
            drafts = {"draft": draft} if draft is not None else {}
            completion = ensemble.generate("ab", method="speculative", block=block, **drafts, **options)
            assert written(completion) == expected
    assert written(ensemble.generate("ab", method="auto", **options)) == expected
    texts = ["ab", "b", "abc", "a b"]
    together = ensemble.generate(texts, method="speculative", **options)
    for number, text in enumerate(texts):
        assert written(together[number]) == written(
            ensemble.generate(text, method="mixture", sequence=number, **options)
        )


@pytest.mark.parametrize("method", ["mixture", "speculative"])
def test_the_observed_member_runs_once_a_position_and_its_samples_cost_nothing(method):
    ensemble = toys("token", 2, router=Observing(2, 0))
    settings = (
        ensemble.settings(raw=True, seed=1, max_tokens=40, ignore_end=True, method=method, block=4, **PLAIN)
        if (method == "speculative")
        else ensemble.settings(raw=True, seed=1, max_tokens=40, ignore_end=True, method=method, **PLAIN)
    )
    context = ensemble.context(settings)
    done = context.start(ensemble.encode_prompt("ab", settings)).finish()
    own = sum(token.member == "m1" for token in done.tokens)
    small, large = (session.stats for session in context.sessions)
    assert 0 < own < 40
    if method == "mixture":
        assert len(small.forwards) == 40  # one a position, whoever writes it
        assert len(large.forwards) == own
    else:
        assert len(large.forwards) < own
        assert done.usage.drafted > 0


def test_auto_drafts_with_the_member_that_runs_anyway():
    ensemble = toys("token", 2, router=Observing(2, 0))
    settings = ensemble.settings(raw=True, seed=1, max_tokens=4, method="auto", **PLAIN)
    strategy = ensemble.context(settings).strategy
    assert isinstance(strategy, Auto)
    draft, block = strategy.plan(np.array([0.3, 0.7]), is_trial=True)
    assert (draft.member, block > 0) in {(0, True), (-1, False)}


@pytest.mark.slow
def test_check_passes_with_an_observing_router():
    report = check(
        toys("piece", 2, router=Observing(2, 0, hidden=True)), "ab", samples=600, options={"raw": True, **PLAIN}
    )
    assert report.equal, report


def test_a_member_that_samples_itself_writes_one_token_a_request():
    engines = [engine(seed=1), engine(seed=2, samples_itself=True)]
    ensemble = make_ensemble(engines, router=Observing(2, 0))
    requests = []
    engines[1].generate = None  # type: ignore[attr-defined]
    stream = ensemble.stream("ab", raw=True, seed=3, max_tokens=20, ignore_end=True, **PLAIN)
    while not stream.finished:
        waiting = stream.requests()
        requests += [request for request in waiting if request.member == 1]
        if not stream.finished:
            stream.resume(Dispatcher().respond(address(waiting, stream.members, stream.sessions)))
    assert {type(request).__name__ for request in requests} == {"GenerateRequest"}
    assert {request.max_tokens for request in requests} == {1}
    assert sum(token.member == "m1" for token in stream.completion.tokens) == len(requests)


def test_greedy_and_log_probabilities_of_the_ensemble_follow_the_observed_weights():
    router = Observing(2, 1)
    ensemble = toys("token", 2, router=router)
    options = {"raw": True, "max_tokens": 8, "ignore_end": True, **PLAIN}
    plain = ensemble.generate("ab", method="greedy", **{**options, "temperature": 0})
    drafted = ensemble.generate("ab", method="greedy", draft="m1", block=3, **{**options, "temperature": 0})
    assert [token.data for token in drafted.tokens] == [token.data for token in plain.tokens]
    completion = ensemble.generate("ab", method="mixture", seed=2, logprobs_of="ensemble", **options)
    for position, token in enumerate(completion.tokens[:4]):
        before = [token.data for token in completion.tokens[:position]]
        _, target = expected(ensemble, router, PLAIN, before)
        without_end = sum(probability for data, probability in target.items() if data != END)
        assert np.exp(token.logprob) <= target[token.data] / without_end + 1e-9


def test_weights_from_a_member_that_did_not_run_would_change_the_distribution():
    """Two positions, enumerated: weights by whether member 1 happened to run at the first of them."""
    rng = np.random.default_rng(0)
    first, second = rng.dirichlet(np.ones(3), size=2), rng.dirichlet(np.ones(3), size=(3, 2))
    weights, ran, idle = np.array([0.5, 0.5]), np.array([0.9, 0.1]), np.array([0.1, 0.9])
    mixture, conventional = np.zeros((3, 3)), np.zeros((3, 3))
    for u in range(3):
        for z in (0, 1):
            mixture[u] += weights[z] * first[z, u] * ((ran if z == 1 else idle) @ second[u])
        conventional[u] = (weights @ first[:, u]) * (ran @ second[u])  # there, every member runs
    assert np.abs(mixture - conventional).sum() / 2 > 0.05
    # So a router names one member, and that one always runs.
    for members in ([0, 1], (0,), None, "m0", True, -1):
        with pytest.raises(ConfigError, match="it must be the index of one member"):
            Observes(members)  # type: ignore[arg-type]


def test_a_route_is_given_nothing_of_who_wrote_the_text():
    router = Observing(2, 0)
    ensemble = toys("token", 2, router=router)
    texts = {}
    for seed in range(40):
        router.seen.clear()
        done = ensemble.generate("ab", raw=True, seed=seed, max_tokens=2, ignore_end=True, **PLAIN)
        if len(router.seen) == 2:
            seen = texts.setdefault(done.tokens[0].data, ([], set()))
            seen[0].append(router.seen[1])
            seen[1].add(done.tokens[0].member)
    both = [seen for seen, members in texts.values() if len(members) == 2]
    assert both
    for seen in both:  # whichever member wrote the first token, the second state looks the same
        for observation in seen:
            np.testing.assert_array_equal(observation.ids, seen[0].ids)
            np.testing.assert_array_equal(observation.logprobs, seen[0].logprobs)


class Failing(ToyEngine):
    def alive(self) -> bool:
        return False


def test_where_the_observed_member_stops_answering_the_text_ends_there():
    def fail(ids, last):
        raise EngineError("gone")

    for failing, ends in ((0, True), (1, False)):
        engines = [Failing(engine().vocabulary.tokens[:6], seed=i) for i in range(2)]
        ensemble = make_ensemble(engines, router=Observing(2, 0))
        stream = ensemble.stream("ab", raw=True, seed=3, max_tokens=12, ignore_end=True, on_failure="drop", **PLAIN)
        next(stream)
        engines[failing].on_forward = fail  # type: ignore[assignment]
        if ends:
            with pytest.raises(GenerationInterruptedError, match="the router observes m0, which has stopped answering"):
                list(stream)
        else:
            list(stream)
            assert len(stream.completion.tokens) == 12


def test_what_an_engine_or_a_unit_does_not_give_is_refused_with_the_ensemble():
    with pytest.raises(ConfigError, match="observes member 2, and the ensemble has 2"):
        toys("token", 2, router=Observing(2, 2))
    with pytest.raises(UnsupportedError, match=r"the router observes m0, and in the unit word"):
        toys("token", 2, router=Observing(2)).with_unit("word")
    few = engine()
    few.top_k_limit = 2
    with pytest.raises(UnsupportedError, match="by its 3 most likely tokens, and its engine reports 2"):
        make_ensemble([few, engine()], router=Observing(2, 0))
    blind = engine()
    blind.hidden_size = None  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match="by its hidden state, which toy does not give"):
        make_ensemble([blind, engine()], router=Observing(2, 0, hidden=True))
    sized = Observing(2, 0, hidden=True)
    sized.observes = Observes(0, 3, hidden=True, hidden_size=5)
    with pytest.raises(ConfigError, match="hidden states of 5 numbers, and its have 8"):
        make_ensemble([engine(), engine()], router=sized)
    with pytest.raises(ConfigError, match="by its 1000000000 most likely tokens, and its vocabulary has 8"):
        make_ensemble([engine(), engine()], router=Observing(2, 0, top_k=10**9))
    with pytest.raises(ConfigError, match="but nothing of it"):
        Observes(0, top_k=0)
    wrong = Observing(2)
    wrong.observes = 0  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"it must be mixlm\.routing\.Observes"):
        make_ensemble([engine(), engine()], router=wrong)


def test_what_an_engine_reports_beyond_what_it_promises_to_sample_from_is_observed_too() -> None:
    texts = []
    for limited in (False, True):
        engines = [engine(seed=1), engine(seed=2)]
        if limited:
            engines[0] = ReportingToy(engines[0], 3)  # type: ignore[call-overload]
            engines[0].extra_tokens = 2  # type: ignore[attr-defined]
        ensemble = make_ensemble(engines, router=Observing(2, 0, top_k=5))
        done = ensemble.generate("ab", raw=True, seed=1, max_tokens=30, top_k=2)
        texts.append([(token.data, token.member) for token in done.tokens])
    assert texts[0] == texts[1]
    with pytest.raises(UnsupportedError, match="by its 6 most likely tokens, and its engine reports 5"):
        ensemble.with_router(Observing(2, 0, top_k=6))


def test_the_likeliest_tokens_are_in_a_fixed_order_whatever_form_the_logits_have():
    row = np.array([1.0, 3.0, 3.0, -np.inf, 2.0, 3.0], dtype=np.float32)
    ids, logprobs = top_tokens(row, 2)
    assert ids.tolist() == [1, 2]
    np.testing.assert_allclose(logprobs, np.log([0.5, 0.5]))
    filtered = Candidates(np.array([0, 1, 2, 4, 5]), row[[0, 1, 2, 4, 5]].astype(np.float64))
    for k in (1, 2, 3, 5):
        for left, right in zip(top_tokens(row, k), top_tokens(filtered, k), strict=True):
            np.testing.assert_array_equal(left, right)
    ids, logprobs = top_tokens(row, 8)
    assert ids.tolist() == [1, 2, 5, 4, 0, -1, -1, -1]
    assert np.isneginf(logprobs[5:]).all()
    assert np.exp(logprobs).sum() == pytest.approx(1)


def test_a_whole_vocabulary_is_never_partitioned(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's introselect takes 2 ms for a vocabulary of 262,144, and 50 for one row in eight."""
    row = np.random.default_rng(0).normal(size=262_144).astype(np.float32)
    row[[5, 70_000, 9]] = row.max()
    order = np.lexsort((np.arange(row.size), -row))[:20]
    partition, sizes = np.partition, []

    def recorded(values: np.ndarray, k: int) -> np.ndarray:
        sizes.append(values.size)
        return partition(values, k)

    monkeypatch.setattr(np, "partition", recorded)
    np.testing.assert_array_equal(top_tokens(row, 20).ids, order)
    assert max(sizes) <= 262_144 / 32


def test_layered_refuses_such_a_router_before_anything_runs(tmp_path: Any) -> None:
    ensemble = toys("token", 2, router=Observing(2, 1))
    message = "the router observes m1, and layered orders members"
    with pytest.raises(UnsupportedError, match=message):
        ensemble.context(ensemble.settings(method="layered"))
    with pytest.raises(UnsupportedError, match=message):
        ensemble.generate("a", method="layered", max_tokens=1)
    with pytest.raises(UnsupportedError, match="the router observes toy:2, and layered"):
        load("toy:1", "toy:2", method="layered", router=Observing(2, 1))
