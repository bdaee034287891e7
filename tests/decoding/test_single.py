from __future__ import annotations

import numpy as np
import pytest
from toys import (
    OPTIONS,
    Recorder,
    assert_same_distribution,
    driven,
    exact_distribution,
    make_ensemble,
    named,
    toys,
    written,
)

from mixlm.core.rng import Noise
from mixlm.decoding import StrategyContext, build_strategy
from mixlm.decoding.mixture import mixture
from mixlm.decoding.single import single
from mixlm.engines.requests import LogitsRequest, SampleRequest


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("unit", ["token", "piece"])
def test_the_distribution_is_that_one_members(unit, name):
    ensemble = toys(unit, 3)
    for member in range(3):
        noise = Recorder(coin=member)
        writing = written(ensemble, OPTIONS[name], "ab", [b"a"])
        choice, [[request]] = driven(single(member, mixture), writing, ensemble.weights, noise)
        assert isinstance(request, SampleRequest)
        assert choice.member == request.member == member
        alone = make_ensemble([ensemble.members[member].engine], unit=unit)
        expected = exact_distribution(alone, OPTIONS[name], "ab", [b"a"])
        assert_same_distribution(named(ensemble, noise.symbols, np.exp(noise.logprobs)), expected)


def test_the_heaviest_member_writes_and_of_equals_the_first():
    ensemble = toys("token", 3)
    settings = ensemble.settings(method="single")
    for weights, expected in (([0.2, 0.5, 0.3], 1), ([0.4, 0.4, 0.2], 0)):
        chosen = build_strategy(settings, StrategyContext.unloaded(np.array(weights), ensemble.names, [{}] * 3))
        choice, _ = driven(chosen, written(ensemble, {}, "ab", []), ensemble.weights, Noise(0))
        assert choice.member == expected


@pytest.mark.parametrize(
    ("options", "kind"), [({"temperature": 0}, LogitsRequest), ({"temperature": 1}, SampleRequest), ({}, SampleRequest)]
)
def test_temperature_zero_makes_it_greedy(options, kind):
    ensemble = toys("token", 2)
    settings = ensemble.settings(method="single", **options)
    chosen = build_strategy(settings, StrategyContext.unloaded(ensemble.weights, ensemble.names, [{}] * 2))
    _, [[request]] = driven(chosen, written(ensemble, {}, "ab", []), ensemble.weights, Noise(0))
    assert isinstance(request, kind)
