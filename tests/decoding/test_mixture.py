from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from toys import (
    END,
    OPTIONS,
    Recorder,
    assert_drawn_from,
    assert_same_law,
    counted,
    driven,
    engine,
    ensemble,
    exact_law,
    named,
    toys,
    written,
)

from mixlm.core.rng import Noise
from mixlm.decoding.mixture import mixture
from mixlm.engines.base import SampleRequest

PLACES = [(), (b"a",), (b"ab", b" c", b"ab", b"b")]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("members", [2, 3, 5])
@pytest.mark.parametrize("unit", ["token", "piece"])
def test_the_law_over_coins_and_draws_is_the_average(unit, members, name):
    those = toys(unit, members)
    for pieces in PLACES:
        law = defaultdict(float)
        for coin in range(members):
            noise = Recorder(coin)
            choice, _ = driven(mixture, written(those, OPTIONS[name], "ab", pieces), those.weights, noise)
            np.testing.assert_array_equal(noise.weights, those.weights)
            assert choice.member == coin
            for key, probability in named(those, noise.symbols, np.exp(noise.logprobs)).items():
                law[key] += those.weights[coin] * probability
        assert_same_law(law, exact_law(those, OPTIONS[name], "ab", pieces))


@pytest.mark.parametrize("unit", ["token", "piece"])
def test_members_with_options_of_their_own_follow_the_average_too(unit):
    those = toys(unit, 3, own=[OPTIONS["top_k"], OPTIONS["all"], OPTIONS["min_p"]])
    law = defaultdict(float)
    for coin in range(3):
        noise = Recorder(coin)
        driven(mixture, written(those, {}, "ab", [b"a"]), those.weights, noise)
        for key, probability in named(those, noise.symbols, np.exp(noise.logprobs)).items():
            law[key] += those.weights[coin] * probability
    assert_same_law(law, exact_law(those, {}, "ab", [b"a"]))


def test_exactly_one_member_is_asked_and_for_one_draw():
    those = toys("piece", 5)
    for position in range(50):
        writing = written(those, {}, "ab", [b"a", b"b"])
        noise = Noise(1, 0, position)
        choice, rounds = driven(mixture, writing, those.weights, noise)
        [[request]] = rounds
        assert isinstance(request, SampleRequest)
        assert request.member == choice.member == noise.coin(those.weights)
        assert [len(session.stats.forwards) for session in writing.sessions] == [
            int(i == choice.member) for i in range(5)
        ]


def test_the_choice_has_the_drawn_members_log_probability():
    those = toys("piece", 3)
    for position in range(30):
        choice, _ = driven(mixture, written(those, {}, "ab", [b"a"]), those.weights, Noise(2, 0, position))
        alone = ensemble([those.members[choice.member].engine])
        piece = END if choice.symbol == those.unit.end else those.unit.symbol_bytes(choice.symbol)
        assert np.isclose(np.exp(choice.logprob), exact_law(alone, {}, "ab", [b"a"])[piece], rtol=1e-9)


def test_a_member_that_was_not_drawn_catches_up_with_exactly_what_it_missed():
    those = ensemble([engine(seed=1), engine(seed=2)])
    writing = written(those, {}, "ab", [])
    prompt = writing.state.ids(0).size
    for coin, symbol in ((0, 1), (0, 2), (0, 0), (1, 3), (0, 1)):
        driven(mixture, writing, those.weights, Recorder(coin))
        writing.state.append(symbol)
    logs = [[(one.tokens, one.cached) for one in session.stats.forwards] for session in writing.sessions]
    assert logs == [[(prompt, 0), (1, prompt), (1, prompt + 1), (2, prompt + 2)], [(prompt + 3, 0)]]


FIRST = {"top_k": 4, "temperature": 0.9}


@pytest.mark.parametrize("unit", ["token", "piece"])
@pytest.mark.parametrize("method", ["mixture", "conventional"])
def test_replies_follow_the_exact_law_token_by_token(unit, method):
    those = toys(unit, 3)
    first = exact_law(those, FIRST, "ab")
    joint = {}
    for piece, probability in first.items():
        if piece == END:
            joint[END, END] = probability
        else:
            behind = exact_law(those, FIRST, "ab", [piece])
            joint |= {(piece, second): probability * behind[second] for second in behind}

    def reply(sequence: int) -> tuple[bytes, bytes]:
        options = {"method": method, "raw": True, "seed": 5, "sequence": sequence, "max_tokens": 2, **FIRST}
        written = [one.data for one in those.generate("ab", **options).tokens]
        return (*written, END, END)[:2]

    counts = counted(reply, 3000)
    assert_drawn_from(counts, joint)
    for place in (0, 1):
        seen, law = defaultdict(int), defaultdict(float)
        for key, count in counts.items():
            seen[key[place]] += count
        for key, probability in joint.items():
            law[key[place]] += probability
        assert_drawn_from(seen, law)
