from __future__ import annotations

import threading

import numpy as np
import pytest
from toys import (
    END,
    OPTIONS,
    Recorder,
    assert_same_distribution,
    driven,
    exact_distribution,
    fixed,
    make_ensemble,
    named,
    toys,
    written,
)

from mixlm.binding import LoadedMember
from mixlm.core.combinations.average import Average
from mixlm.core.rng import Noise
from mixlm.core.sampling import dense_distribution
from mixlm.decoding.conventional import conventional
from mixlm.engines.requests import LogitsRequest
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import MemoryLimitError, UnsupportedError
from mixlm.generation.target import RuleTarget, average_target
from mixlm.types import Candidates, Sampling

PLACES = [(), (b"a",), (b"ab", b" c", b"ab", b"b")]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("members", [1, 2, 3, 5])
@pytest.mark.parametrize("unit", ["token", "piece"])
def test_the_distribution_is_the_average(unit, members, name):
    ensemble = toys(unit, members)
    for pieces in PLACES:
        noise = Recorder()
        driven(conventional(average_target()), written(ensemble, OPTIONS[name], "ab", pieces), ensemble.weights, noise)
        assert_same_distribution(
            named(ensemble, noise.symbols, np.exp(noise.logprobs)),
            exact_distribution(ensemble, OPTIONS[name], "ab", pieces),
        )


def test_every_member_with_a_weight_is_asked_once_and_all_at_the_same_moment():
    ensemble = toys("piece", 5)
    writing = written(ensemble, {}, "ab", [b"a"])
    weights = np.array([0.5, 0, 0.25, 0, 0.25])
    _, [requests] = driven(conventional(average_target()), writing, weights, Noise(0))
    assert [type(request) for request in requests] == [LogitsRequest] * 3
    assert [request.member for request in requests] == [0, 2, 4]
    assert [len(session.stats.forwards) for session in writing.sessions] == [1, 0, 1, 0, 1]


def test_the_choice_has_the_averages_log_probability_and_names_who_gave_most_of_it():
    ensemble = make_ensemble([fixed({b"a": 0.9, b"b": 0.1}), fixed({b"a": 0.2, b"c": 0.8})], [0.25, 0.75])
    shares = {b"a": (0.25 * 0.9 + 0.75 * 0.2, 0), b"b": (0.025, 0), b"c": (0.6, 1)}
    seen = set()
    for position in range(200):
        writing = written(ensemble, {"temperature": 1}, "", [])
        choice, _ = driven(conventional(average_target()), writing, ensemble.weights, Noise(0, 0, position))
        data = ensemble.unit.symbol_bytes(choice.symbol)
        assert np.isclose(np.exp(choice.logprob), shares[data][0])
        assert choice.member == shares[data][1]
        seen.add(data)
    assert seen == set(shares)


def test_a_rule_of_ones_own_that_is_derived_of_the_average_combines_as_it_says():
    class Upside(Average):
        def combine(self, probs, weights):
            return probs[0][::-1]

    part = Candidates(np.array([3, 4]), np.log([0.9, 0.1]))
    for members in (1, 2):
        combined = RuleTarget(Upside()).combine(range(members), [part] * members, np.full(members, 1 / members))
        np.testing.assert_allclose(np.exp(combined.logprobs), [0.1, 0.9])


@pytest.mark.parametrize("unit", ["token", "piece"])
def test_truncating_after_mixing_is_truncating_the_plain_average(unit):
    ensemble = toys(unit, 3)
    after = Sampling(temperature=0.6, top_k=3)
    noise = Recorder()
    options = {"method": "conventional", "mix_then_truncate": True, "temperature": 0.6, "top_k": 3}
    writer = ensemble.context(ensemble.settings(**options))
    driven(writer.strategy, written(ensemble, options, "ab", [b"a"]), ensemble.weights, noise)
    plain = exact_distribution(ensemble, OPTIONS["plain"], "ab", [b"a"])
    cut = dense_distribution(np.log(list(plain.values())), after, np.zeros(0, dtype=np.int64))
    expected = {key: p for key, p in zip(plain, cut, strict=True) if p > 0}
    assert len(expected) == 3
    assert_same_distribution(named(ensemble, noise.symbols, np.exp(noise.logprobs)), expected)


def test_truncating_before_and_after_mixing_are_two_distributions():
    ensemble = make_ensemble([fixed({b"a": 0.6, b"b": 0.4}), fixed({b"c": 0.6, b"b": 0.4})])
    distributions = []
    for options in ({}, {"mix_then_truncate": True}):
        noise, settings = Recorder(), {"method": "conventional", "top_k": 1, "temperature": 1.0, **options}
        writer = ensemble.context(ensemble.settings(**settings))
        driven(writer.strategy, written(ensemble, settings, "", []), ensemble.weights, noise)
        distributions.append(named(ensemble, noise.symbols, np.exp(noise.logprobs)))
    assert_same_distribution(distributions[0], {b"a": 0.5, b"c": 0.5})
    assert_same_distribution(distributions[1], {b"b": 1.0})


def test_the_mass_of_all_ends_is_one_symbol():
    ensemble = make_ensemble([fixed({END: 0.5, b"a": 0.5}), fixed({END: 0.25, b"a": 0.75}, [b"b", b"a"])], unit="piece")
    noise = Recorder()
    driven(conventional(average_target()), written(ensemble, {"temperature": 1}, "a", []), ensemble.weights, noise)
    assert_same_distribution(named(ensemble, noise.symbols, np.exp(noise.logprobs)), {END: 0.375, b"a": 0.625}, 1e-7)


def test_engines_on_devices_of_their_own_work_at_once():
    meeting = threading.Barrier(2, timeout=10)

    class Waiting(ToyEngine):
        """Answers only when the other one has been asked too."""

        def respond(self, requests):
            meeting.wait()
            return super().respond(requests)

    engines = [Waiting(seed=1, name="a"), Waiting(seed=2, name="b")]
    in_turn = Ensemble([LoadedMember(ToyEngine(seed=i), f"m{i}") for i in (1, 2)])
    for i, engine in enumerate(engines):
        engine.device = f"device {i}"
    at_once = Ensemble([LoadedMember(engine, engine.name) for engine in engines])
    options = {"method": "conventional", "seed": 3, "max_tokens": 8}
    assert at_once.generate("hello", **options).text == in_turn.generate("hello", **options).text


def test_a_failing_engine_among_several_is_heard():
    class Failing(ToyEngine):
        def respond(self, requests):
            raise MemoryLimitError("no memory left")

    first, other = ToyEngine(seed=1, name="a"), Failing(seed=2, name="b")
    other.device = "another"
    pair = Ensemble([LoadedMember(first, "a"), LoadedMember(other, "b")])
    with pytest.raises(MemoryLimitError):
        pair.generate("hello", method="conventional")


def test_options_of_single_members_are_not_dropped_by_mixing_first():
    pair = Ensemble([LoadedMember(ToyEngine(seed=1), "a"), LoadedMember(ToyEngine(seed=2), "b", {"temperature": 0.3})])
    with pytest.raises(UnsupportedError, match="options of their own"):
        pair.generate("hello", method="conventional", mix_then_truncate=True)
    options = {"method": "conventional", "mix_then_truncate": True, "temperature": 0.5, "max_tokens": 2, "seed": 1}
    assert pair.generate("hello", ignore_end=True, **options).usage.tokens == 2
