from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import (
    END,
    OPTIONS,
    SHARED,
    VOCABULARIES,
    driven,
    engine,
    exact_distribution,
    fixed,
    make_ensemble,
    toys,
    written,
)

from mixlm.core.combinations.average import Average
from mixlm.core.rng import Noise
from mixlm.decoding.greedy import greedy
from mixlm.decoding.single import single
from mixlm.engines.requests import LogitsRequest
from mixlm.errors import UnsupportedError
from mixlm.generation.target import RuleTarget, average_target

PLAIN = OPTIONS["plain"]


def piece_of(ensemble, symbol: int) -> bytes:
    return END if symbol == ensemble.unit.end else ensemble.unit.symbol_bytes(symbol)


def chosen(ensemble, options=(), pieces=()):
    options = {"method": "greedy", **dict(options)}
    return driven(greedy(average_target()), written(ensemble, options, "ab", pieces), ensemble.weights, Noise(0))


@pytest.mark.slow
@settings(max_examples=400)
@given(seed=st.integers(0, 2**40))
def test_the_choice_is_the_most_likely_symbol_of_the_average(seed):
    rng = np.random.default_rng(seed)
    members = int(rng.integers(1, 6))
    unit = str(rng.choice(["token", "piece"]))
    vocabularies = VOCABULARIES if unit == "piece" else [SHARED] * 5
    engines = [engine(vocabularies[i], int(rng.integers(10_000))) for i in range(members)]
    weights = rng.dirichlet(np.full(members, 0.7)) * (rng.random(members) < 0.8)
    weights[rng.integers(members)] += 0.1
    pieces = [bytes([byte]) for byte in rng.choice(list(b"abc "), size=rng.integers(4))]
    ensemble = make_ensemble(engines, weights, unit=unit)
    choice, rounds = chosen(ensemble, pieces=pieces)
    distribution = exact_distribution(ensemble, PLAIN, "ab", pieces)
    probability = distribution[piece_of(ensemble, choice.symbol)]
    assert probability > max(distribution.values()) - 1e-12
    # The log-probability is the average's when every member was asked, else a lower bound.
    if len(rounds) == np.count_nonzero(ensemble.weights):
        assert np.isclose(np.exp(choice.logprob), probability, rtol=1e-9)
    else:
        assert np.exp(choice.logprob) < probability + 1e-12
    assert ensemble.weights[choice.member] > 0


def test_it_is_not_the_choice_of_the_heaviest_member():
    ensemble = make_ensemble([fixed({b"a": 0.6, b"b": 0.4}), fixed({b"c": 0.6, b"b": 0.4})], [0.5, 0.5])
    choice, _ = chosen(ensemble)
    assert ensemble.unit.symbol_bytes(choice.symbol) == b"b"
    assert np.isclose(np.exp(choice.logprob), 0.4)


def test_members_are_asked_from_the_heaviest_on_until_the_rest_cannot_change_the_winner():
    sure, unsure = {b"a": 0.9, b"b": 0.1}, {b"b": 0.5, b"c": 0.5}
    cases = [
        ([0.8, 0.1, 0.1], [sure, unsure, unsure], [0]),
        ([0.1, 0.1, 0.8], [unsure, unsure, sure], [2]),
        # 0.5 x 0.8 is no more than what the others have; with the second, 0.4 + 0.27 - 0.05 is.
        ([0.5, 0.3, 0.2], [sure, sure, unsure], [0, 1]),
        ([0.4, 0.3, 0.3], [unsure, sure, unsure], [0, 1, 2]),
        ([1.0, 0.0, 0.0], [unsure, sure, sure], [0]),
    ]
    for weights, distributions, expected in cases:
        ensemble = make_ensemble([fixed(distribution) for distribution in distributions], weights)
        _, rounds = chosen(ensemble)
        assert [request.member for [request] in rounds] == expected


def test_members_that_do_not_run_are_not_looked_at():
    class Recording(RuleTarget):
        def distribution(self, step, member, *, normalize=True):
            looked_at.append(member)
            return super().distribution(step, member, normalize=normalize)

    looked_at: list[int] = []
    sure, unsure = fixed({b"a": 0.9, b"b": 0.1}), fixed({b"b": 0.5, b"c": 0.5})
    ensemble = make_ensemble([sure, unsure, unsure], [0.8, 0.1, 0.1])
    state = written(ensemble, {"method": "greedy"}, "ab", ())
    driven(greedy(Recording(Average())), state, ensemble.weights, Noise(0))
    assert looked_at == [0]


@pytest.mark.parametrize("method", ["greedy", "layered"])
def test_a_member_that_leaves_no_symbol_is_an_error_also_where_the_others_decide(method):
    def forbid(ids, logits):
        return np.full_like(logits, -np.inf)

    others = [fixed({b"b": 1.0}), fixed({b"c": 1.0})]
    ensemble = make_ensemble([fixed({b"a": 1.0}), *others], [0.4, 0.35, 0.25]).with_logits_processors({"m0": forbid})
    with pytest.raises(UnsupportedError, match="m0 gives no probability"):
        ensemble.generate("ab", raw=True, method=method, max_tokens=1, seed=0)


@pytest.mark.parametrize("order", [1, -1])
def test_of_equal_symbols_the_lowest_is_taken(order):
    distributions = [{b"b": 0.5, b"c": 0.5}, {b"c": 0.5, b"b": 0.5}][::order]
    ensemble = make_ensemble([fixed(distribution) for distribution in distributions])
    assert piece_of(ensemble, chosen(ensemble)[0].symbol) == b"b"


def test_the_end_of_a_text_can_be_the_most_likely():
    ensemble = make_ensemble([fixed({END: 0.4, b"a": 0.6}), fixed({END: 0.4, b"b": 0.6})])
    choice, _ = chosen(ensemble)
    assert choice.symbol == ensemble.unit.end


def test_options_change_the_average_that_is_looked_at():
    ensemble = make_ensemble([fixed({b"a": 0.6, b"b": 0.4}), fixed({b"c": 0.55, b"b": 0.45})])
    assert piece_of(ensemble, chosen(ensemble)[0].symbol) == b"b"
    assert piece_of(ensemble, chosen(ensemble, {"top_k": 1})[0].symbol) == b"a"


def test_with_a_draft_the_log_probability_is_the_average_s():
    members = [fixed({b"a": 0.9, b"b": 0.1}), fixed({b"a": 0.5, b"b": 0.5})]
    ensemble = make_ensemble(members, [0.8, 0.2])
    for draft, expected in (("none", 0.72), ("m0", 0.82), ("m1", 0.82)):  # alone, the first member decides
        completion = ensemble.generate("ab", raw=True, method="greedy", draft=draft, max_tokens=6)
        assert np.allclose(np.exp([token.logprob for token in completion.tokens]), expected)


@pytest.mark.parametrize("member", range(3))
def test_one_member_alone_takes_its_own_most_likely_symbol(member):
    ensemble = toys("piece", 3)
    writing = written(ensemble, {"method": "greedy"}, "ab", [])
    choice, [[request]] = driven(single(member, greedy(average_target())), writing, ensemble.weights, Noise(0))
    assert isinstance(request, LogitsRequest)
    assert request.member == choice.member == member
    distribution = exact_distribution(make_ensemble([ensemble.members[member].engine], unit="piece"), PLAIN, "ab")
    assert piece_of(ensemble, choice.symbol) == max(distribution, key=distribution.get)
