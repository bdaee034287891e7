from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from toys import (
    END,
    OPTIONS,
    Recorder,
    assert_same_distribution,
    assert_sampled_from,
    counted,
    driven,
    engine,
    exact_distribution,
    make_ensemble,
    named,
    toys,
    written,
)

from mixlm.core.rng import Noise
from mixlm.decoding.mixture import mixture
from mixlm.engines.requests import SampleRequest

PLACES = [(), (b"a",), (b"ab", b" c", b"ab", b"b")]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("members", [2, 3, 5])
@pytest.mark.parametrize("unit", ["token", "piece"])
def test_the_distribution_over_coins_and_samples_is_the_average(unit, members, name):
    ensemble = toys(unit, members)
    for pieces in PLACES:
        distribution = defaultdict(float)
        for coin in range(members):
            noise = Recorder(coin)
            choice, _ = driven(mixture, written(ensemble, OPTIONS[name], "ab", pieces), ensemble.weights, noise)
            np.testing.assert_array_equal(noise.weights, ensemble.weights)
            assert choice.member == coin
            for key, probability in named(ensemble, noise.symbols, np.exp(noise.logprobs)).items():
                distribution[key] += ensemble.weights[coin] * probability
        assert_same_distribution(distribution, exact_distribution(ensemble, OPTIONS[name], "ab", pieces))


@pytest.mark.parametrize("unit", ["token", "piece"])
def test_members_with_options_of_their_own_follow_the_average_too(unit):
    ensemble = toys(unit, 3, sampling=[OPTIONS["top_k"], OPTIONS["all"], OPTIONS["min_p"]])
    distribution = defaultdict(float)
    for coin in range(3):
        noise = Recorder(coin)
        driven(mixture, written(ensemble, {}, "ab", [b"a"]), ensemble.weights, noise)
        for key, probability in named(ensemble, noise.symbols, np.exp(noise.logprobs)).items():
            distribution[key] += ensemble.weights[coin] * probability
    assert_same_distribution(distribution, exact_distribution(ensemble, {}, "ab", [b"a"]))


def test_exactly_one_member_gets_a_request_and_for_one_sample():
    ensemble = toys("piece", 5)
    for position in range(50):
        writing = written(ensemble, {}, "ab", [b"a", b"b"])
        noise = Noise(1, 0, position)
        choice, rounds = driven(mixture, writing, ensemble.weights, noise)
        [[request]] = rounds
        assert isinstance(request, SampleRequest)
        assert request.member == choice.member == noise.coin(ensemble.weights)
        assert [len(session.stats.forwards) for session in writing.sessions] == [
            int(i == choice.member) for i in range(5)
        ]


def test_the_choice_has_the_sampled_members_log_probability():
    ensemble = toys("piece", 3)
    for position in range(30):
        choice, _ = driven(mixture, written(ensemble, {}, "ab", [b"a"]), ensemble.weights, Noise(2, 0, position))
        alone = make_ensemble([ensemble.members[choice.member].engine])
        piece = END if choice.symbol == ensemble.unit.end else ensemble.unit.symbol_bytes(choice.symbol)
        assert np.isclose(np.exp(choice.logprob), exact_distribution(alone, {}, "ab", [b"a"])[piece], rtol=1e-9)


def test_a_member_that_was_not_sampled_catches_up_with_exactly_what_it_missed():
    ensemble = make_ensemble([engine(seed=1), engine(seed=2)])
    writing = written(ensemble, {}, "ab", [])
    prompt = writing.state.ids(0).size
    for coin, symbol in ((0, 1), (0, 2), (0, 0), (1, 3), (0, 1)):
        driven(mixture, writing, ensemble.weights, Recorder(coin))
        writing.state.append(symbol)
    logs = [[(forward.tokens, forward.cached) for forward in session.stats.forwards] for session in writing.sessions]
    assert logs == [[(prompt, 0), (1, prompt), (1, prompt + 1), (2, prompt + 2)], [(prompt + 3, 0)]]


FIRST = {"top_k": 4, "temperature": 0.9}


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["token", "piece"])
@pytest.mark.parametrize("method", ["mixture", "conventional"])
def test_completions_follow_the_exact_distribution_token_by_token(unit, method):
    ensemble = toys(unit, 3)
    first = exact_distribution(ensemble, FIRST, "ab")
    joint = {}
    for piece, probability in first.items():
        if piece == END:
            joint[END, END] = probability
        else:
            behind = exact_distribution(ensemble, FIRST, "ab", [piece])
            joint |= {(piece, second): probability * behind[second] for second in behind}

    def completion(sequence: int) -> tuple[bytes, bytes]:
        options = {"method": method, "raw": True, "seed": 5, "sequence": sequence, "max_tokens": 2, **FIRST}
        written = [token.data for token in ensemble.generate("ab", **options).tokens]
        return (*written, END, END)[:2]

    counts = counted(completion, 1000)
    assert_sampled_from(counts, joint)
    for place in (0, 1):
        seen, distribution = defaultdict(int), defaultdict(float)
        for key, count in counts.items():
            seen[key[place]] += count
        for key, probability in joint.items():
            distribution[key[place]] += probability
        assert_sampled_from(seen, distribution)
