from __future__ import annotations

import pytest

from mixlm.config import METHODS
from mixlm.core.options import GenerationOptions
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.types import Sampling


def settings(**options) -> GenerationOptions:
    return GenerationOptions().with_options(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mixtur"}, "method is 'mixtur'; it must be one of mixture, .*did you mean 'mixture'"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be a whole number, 1 or more"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"seed": -1}, "seed is -1; it must be a whole number, 0 or more"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": None}, "seed is None"),
        ({"sequence": -1}, "sequence is -1"),
        ({"temprature": 1}, "unknown option 'temprature' .did you mean 'temperature'"),
        ({"max_token": 1}, "unknown option 'max_token' .did you mean 'max_tokens'"),
        ({"sampling": {}}, "unknown option 'sampling'"),
        ({"whatever": 1}, "unknown option 'whatever'"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_what_is_allowed(options, message):
    with pytest.raises(ConfigError, match=message):
        settings(**options)


def test_seeds_of_64_bits_are_allowed():
    assert settings(seed=2**64 - 1, sequence=2**63).seed == 2**64 - 1


def test_a_reply_without_a_seed_gets_one_of_its_own():
    assert len({settings().seed for _ in range(20)}) == 20
    assert GenerationOptions(seed=5).with_options({"seed": 0}).seed == 0


@pytest.mark.parametrize(("stop", "expected"), [("a", ("a",)), (["a", "b"], ("a", "b")), ((), ())])
def test_stop_is_one_string_or_several(stop, expected):
    assert settings(stop=stop).stop == expected


@pytest.mark.parametrize("method", [one for one in METHODS if one != "conventional"])
def test_mixing_before_truncating_is_for_conventional_only(method):
    with pytest.raises(UnsupportedError, match=f"no exact form in {method}.*--method conventional"):
        settings(method=method, mix_then_truncate=True)
    assert settings(method="conventional", mix_then_truncate=True).mix_then_truncate


def test_a_calls_options_go_over_a_members_own_over_the_defaults():
    found = settings(top_k=5).member_sampling({"top_k": 9, "temperature": 0.4})
    assert found == Sampling(top_k=5, temperature=0.4)
    assert settings().member_sampling({}) == Sampling()


def test_options_add_up_over_calls():
    twice = settings(top_k=5, max_tokens=7).with_options({"top_p": 0.5})
    assert twice.sampling == {"top_k": 5, "top_p": 0.5}
    assert twice.max_tokens == 7


def test_a_turn_has_the_same_seed_and_noise_of_its_own():
    turn = settings(seed=3, sequence=10).with_turn(2)
    assert (turn.seed, turn.sequence) == (3, 12)


@pytest.mark.parametrize("method", ["mixture", "conventional"])
@pytest.mark.parametrize("own", [{}, {"temperature": 0}])
def test_temperature_zero_where_a_symbol_is_drawn_names_greedy(method, own):
    chosen = settings(method=method) if own else settings(method=method, temperature=0)
    with pytest.raises(UnsupportedError, match=r"temperature is 0.*--method greedy"):
        chosen.member_sampling(own)


def test_greedy_looks_at_the_plain_average_unless_told_otherwise():
    assert settings(method="greedy").member_sampling({}) == Sampling(temperature=1.0, top_k=0)
    assert settings(method="greedy", temperature=0).member_sampling({}) == Sampling(temperature=1.0, top_k=0)
    found = settings(method="greedy", temperature=0.5).member_sampling({"repetition_penalty": 1.2})
    assert found == Sampling(repetition_penalty=1.2, temperature=0.5, top_k=0)


def test_a_single_member_at_temperature_zero_takes_the_most_likely():
    assert settings(method="single", temperature=0).is_greedy({})
    assert settings(method="single").is_greedy({"temperature": 0})
    assert not settings(method="single", temperature=1).is_greedy({"temperature": 0})
    assert not settings(method="mixture", temperature=0).is_greedy({})


def test_after_mixing_takes_over_all_but_the_penalties():
    chosen = settings(method="conventional", mix_then_truncate=True, top_k=3, temperature=0.5, presence_penalty=1)
    assert chosen.member_sampling({}) == Sampling(temperature=1.0, top_k=0, presence_penalty=1)
    assert chosen.mixed_sampling({}) == Sampling(top_k=3, temperature=0.5)
    assert settings(method="conventional").mixed_sampling({}) is None
    with pytest.raises(UnsupportedError, match=r"temperature is 0.*--method greedy"):
        settings(method="conventional", mix_then_truncate=True, temperature=0).mixed_sampling({})


@pytest.mark.parametrize("option", [{"temperature": -1}, {"top_p": 0}, {"top_k": -2}])
def test_a_sampling_option_out_of_range_is_refused(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        settings(**option).member_sampling({})
