from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlm.core.mixing import mix, normalized_weights, pool
from mixlm.errors import ConfigError
from mixlm.types import Candidates


def candidates(distribution: dict[int, float]) -> Candidates:
    return Candidates(np.array(list(distribution), dtype=np.int64), np.log(list(distribution.values())))


def test_weights_are_normalised_and_equal_when_left_out():
    assert normalized_weights(None, 4).tolist() == [0.25] * 4
    assert normalized_weights([3, 1], 2).tolist() == [0.75, 0.25]
    assert normalized_weights((0, 5.0), 2).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], r"1 weight \(1\) for 2 members"),
        ([], r"0 weights \(\) for 2 members"),
        ([0.5, 0.25, 0.25], r"3 weights \(0.5, 0.25, 0.25\) for 2 members"),
        ([1, -0.5], "1, -0.5; each must be a finite number"),
        ([1, float("nan")], "nan; each must be a finite number"),
        ([1, float("inf")], "inf; each must be a finite number"),
        ([0, 0], "0, 0; at least one must be greater than 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_their_values(weights, message):
    with pytest.raises(ConfigError, match=message):
        normalized_weights(weights, 2)


@pytest.mark.slow
@given(
    parts=st.lists(st.tuples(st.integers(0, 30), st.floats(-50, 0)), min_size=1, max_size=40),
    shift=st.sampled_from([0, 10**6]),
)
def test_pooling_adds_up_equal_symbols_whether_few_or_most_take_part(parts, shift):
    symbols = np.array([symbol for symbol, _ in parts], dtype=np.int64) * (1 + shift)
    logprobs = np.array([logprob for _, logprob in parts])
    pooled = pool(symbols, logprobs)
    assert pooled.ids.tolist() == sorted(set(symbols.tolist()))
    expected = [np.logaddexp.reduce(logprobs[symbols == symbol]) for symbol in pooled.ids]
    np.testing.assert_allclose(pooled.logprobs, expected, atol=1e-9)


@pytest.mark.parametrize("far", [1, 10**6])
def test_pooling_takes_probabilities_too_small_for_a_float(far):
    pooled = pool(np.array([0, far]), np.array([0.0, -2000.0]))
    assert pooled.ids[0] == 0
    assert np.exp(pooled.logprobs).sum() == 1


def test_a_mixture_is_the_weighted_sum():
    distributions = [{0: 0.5, 3: 0.5}, {3: 0.25, 7: 0.75}, {100_000: 1.0}]
    mixed = mix(
        [
            (weight, candidates(distribution))
            for weight, distribution in zip((0.5, 0.3, 0.2), distributions, strict=True)
        ]
    )
    assert mixed.ids.tolist() == [0, 3, 7, 100_000]
    np.testing.assert_allclose(np.exp(mixed.logprobs), [0.25, 0.325, 0.225, 0.2], rtol=1e-14)


def test_random_mixtures_equal_the_dense_sum():
    rng = np.random.default_rng(0)
    size, weights = 300, rng.dirichlet(np.ones(5))
    expected, parts = np.zeros(size), []
    for weight in weights:
        ids = rng.permutation(size)[: rng.integers(1, size)]
        probabilities = rng.dirichlet(np.ones(ids.size))
        expected[ids] += weight * probabilities
        parts.append((weight, Candidates(ids, np.log(probabilities))))
    mixed = mix(parts)
    np.testing.assert_array_equal(mixed.ids, np.flatnonzero(expected))
    np.testing.assert_allclose(np.exp(mixed.logprobs), expected[mixed.ids], rtol=1e-12)


def test_parts_of_weight_zero_take_no_part():
    assert mix([(0.0, candidates({1: 1.0})), (1.0, candidates({2: 1.0}))]).ids.tolist() == [2]


def test_distributions_over_the_same_symbols_need_no_table():
    generator = np.random.default_rng(0)
    symbols = np.sort(generator.choice(10**6, 9000, replace=False))
    rows = [np.log(generator.dirichlet(np.ones(9000))) for _ in range(2)]
    rows[0][7] = rows[1][7] = -900.0  # underflows
    components = [(weight, Candidates(symbols, row)) for weight, row in zip([0.3, 0.7], rows, strict=True)]
    expected = pool(np.concatenate([symbols, symbols]), np.concatenate(rows) + np.repeat(np.log([0.3, 0.7]), 9000))
    np.testing.assert_array_equal(mix(components).ids, expected.ids)
    np.testing.assert_allclose(mix(components).logprobs, expected.logprobs, atol=1e-12)
    assert expected.ids.size == 8999
    assert mix([(1.0, components[0][1])]) is components[0][1]
