from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mixlm.core import sampling as rules
from mixlm.core.sampling import TokenHistory, Transform, dense_distribution, largest_indices
from mixlm.types import Candidates, LogitBias, Sampling

NONE = np.zeros(0, dtype=np.int64)
PLAIN = {"temperature": 1.0, "top_k": 0}


def logits_of(size: int = 500, seed: int = 0, dtype=np.float64) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=3, size=size).astype(dtype)


def by_transformers(processor, logits: np.ndarray, ids=()) -> np.ndarray:
    # The processor may write into what it is given.
    scores = torch.tensor(np.array(logits)[None])
    return processor(torch.tensor([list(ids)], dtype=torch.long), scores)[0].numpy()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(3))
class TestAgainstTransformers:
    @pytest.mark.parametrize("penalty", [0.8, 1.0, 1.3, 2.0])
    def test_repetition(self, penalty, seed, dtype):
        logits = logits_of(seed=seed, dtype=dtype)
        ids = [3, 14, 3, 200, 499]
        result = rules.apply_repetition_penalty(logits, np.unique(ids), penalty)
        np.testing.assert_allclose(
            result, by_transformers(RepetitionPenaltyLogitsProcessor(penalty), logits, ids), rtol=1e-6
        )
        assert (result != logits).sum() == (4 if penalty != 1 else 0)

    @pytest.mark.parametrize("value", [0.1, 0.7, 1.0, 2.5])
    def test_temperature(self, value, seed, dtype):
        logits = logits_of(seed=seed, dtype=dtype)
        plain = Sampling(temperature=value, top_k=0, top_p=1.0, min_p=0.0)
        result = rules.dense_distribution(logits, plain, np.zeros(0, dtype=np.int64))
        warped = by_transformers(TemperatureLogitsWarper(value), logits)
        np.testing.assert_allclose(result, rules.softmax(warped), rtol=1e-5)

    @pytest.mark.parametrize("values", [[1.5], [-100, 100, 0.25]])
    def test_bias(self, values, seed, dtype):
        logits = logits_of(seed=seed, dtype=dtype)
        biases = {(7 * i + 3,): float(value) for i, value in enumerate(values)}
        bias = LogitBias(np.array([token for (token,) in biases]), np.array(list(biases.values())))
        result = rules.apply_logit_bias(logits, bias)
        # Theirs looks for sequences of several tokens in the ids, so there have to be some.
        np.testing.assert_allclose(
            result, by_transformers(SequenceBiasLogitsProcessor(biases), logits, [1, 2]), rtol=1e-6
        )
        assert (result != logits).sum() == len(values)

    @pytest.mark.parametrize("k", [1, 2, 20, 499, 500, 10_000])
    def test_top_k(self, k, seed, dtype):
        logits = logits_of(seed=seed, dtype=dtype)
        np.testing.assert_array_equal(rules.apply_top_k(logits, k), by_transformers(TopKLogitsWarper(k), logits))

    @pytest.mark.parametrize("k", [1, 5, 37, 200])
    def test_top_k_with_ties(self, k, seed, dtype):
        logits = np.round(logits_of(seed=seed, dtype=dtype))
        result = rules.apply_top_k(logits, k)
        np.testing.assert_array_equal(result, by_transformers(TopKLogitsWarper(k), logits))
        assert np.isfinite(result).sum() >= k

    @pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.95, 0.999])
    def test_top_p(self, p, seed, dtype):
        logits = logits_of(seed=seed, dtype=dtype)
        np.testing.assert_array_equal(rules.apply_top_p(logits, p), by_transformers(TopPLogitsWarper(p), logits))

    @pytest.mark.parametrize("p", [1e-6, 0.05, 0.5, 1.0])
    def test_min_p(self, p, seed, dtype):
        logits = logits_of(seed=seed, dtype=dtype)
        np.testing.assert_array_equal(rules.apply_min_p(logits, p), by_transformers(MinPLogitsWarper(p), logits))

    @pytest.mark.parametrize(
        "options",
        [
            {"repetition_penalty": 1.2, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
            {"temperature": 1.7, "top_k": 100, "top_p": 0.5},
            {"temperature": 0.3, "top_k": 0, "min_p": 0.2},
            {},
        ],
    )
    def test_the_whole_chain(self, options, seed, dtype):
        logits, ids = logits_of(seed=seed, dtype=dtype), [1, 5, 7, 5]
        chosen = Sampling(**options)
        # The order of transformers' own `generate`: biases first, temperature behind the penalties.
        bias = LogitBias(np.array([5, 60, 300]), np.array([-3.0, 2.5, 1.0]))
        chain = LogitsProcessorList(
            [
                SequenceBiasLogitsProcessor(
                    {(token,): value for token, value in zip(*map(np.ndarray.tolist, bias), strict=True)}
                ),
                RepetitionPenaltyLogitsProcessor(chosen.repetition_penalty),
            ]
        )
        chain.append(TemperatureLogitsWarper(chosen.temperature))
        if chosen.top_k:
            chain.append(TopKLogitsWarper(chosen.top_k))
        chain.append(TopPLogitsWarper(chosen.top_p))
        chain.append(MinPLogitsWarper(chosen.min_p))
        expected = torch.softmax(torch.tensor(by_transformers(chain, logits.astype(np.float64), ids)), -1).numpy()
        history = TokenHistory.from_tokens(np.array(ids[:2]), np.array(ids[2:]))
        # Theirs holds biases in single precision.
        np.testing.assert_allclose(dense_distribution(logits, chosen, NONE, history, bias), expected, rtol=1e-6)


def test_a_history_counts_the_completion_and_sees_the_prompt_too():
    history = TokenHistory.from_tokens(np.array([9, 2, 9]), np.array([4, 2, 4, 4]))
    assert history.seen.tolist() == [2, 4, 9]
    assert history.generated.tolist() == [2, 4]
    assert history.counts.tolist() == [1, 3]


def test_presence_counts_once_and_frequency_each_time_and_only_in_the_completion():
    history = TokenHistory.from_tokens(np.array([0, 1]), np.array([1, 2, 2, 2]))
    result = rules.apply_count_penalties(np.zeros(4), history, 0.5, 0.25)
    assert result.tolist() == [0, -0.75, -1.25, 0]


def test_top_p_keeps_the_token_that_reaches_the_mass():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert np.isfinite(rules.apply_top_p(logits, 0.6)).tolist() == [True, True, False, False]
    assert np.isfinite(rules.apply_top_p(logits, 0.01)).tolist() == [True, False, False, False]
    assert np.isfinite(rules.apply_top_p(logits, 0.81)).tolist() == [True, True, True, False]


def test_min_p_is_measured_against_the_most_likely():
    result = rules.apply_min_p(np.log([0.6, 0.3, 0.1]), 0.4)
    assert np.isfinite(result).tolist() == [True, True, False]


def test_softmax_holds_very_large_logits_and_sums_to_one():
    assert rules.softmax(np.array([1e4, 1e4, -1e4])).tolist() == [0.5, 0.5, 0]


def test_no_rule_changes_the_logits_it_is_given():
    logits, history = logits_of(), TokenHistory.from_tokens(np.array([1]), np.array([2, 3]))
    before = logits.copy()
    chosen = Sampling(1.5, 0.5, 0.5, 0.7, 10, 0.9, 0.1)
    dense_distribution(logits, chosen, np.array([4]), history)
    Transform(chosen, np.array([4]))(logits, history)
    rules.apply_top_p(logits, 0.5)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [3, 63, 64, 65, 1000, 5003])
def test_largest_finds_what_a_full_sort_finds(size, ties):
    for seed in range(5):
        x = logits_of(size, seed, np.float32)
        if ties:
            x = np.round(x)
        x[:: seed + 2] = -np.inf
        for k in (1, 2, 7, 40, size - 1, size, size + 1):
            ranked = np.sort(x)[::-1]
            expected = np.flatnonzero((x >= ranked[min(k, size) - 1]) & (x > -np.inf))
            np.testing.assert_array_equal(np.sort(largest_indices(x, k)), expected)


def as_dense(candidates: rules.Candidates, size: int) -> np.ndarray:
    assert np.unique(candidates.ids).size == candidates.ids.size
    out = np.zeros(size)
    out[candidates.ids] = np.exp(candidates.logprobs)
    return out


def random_case(seed: int) -> tuple[np.ndarray, Sampling, np.ndarray, TokenHistory | None, LogitBias | None]:
    """Logits of any size and precision, with and without ties, and any combination of options."""
    rng = np.random.default_rng(seed)
    size = int(rng.choice([rng.integers(3, 40), rng.integers(3, 5000)]))
    logits = rng.normal(scale=4, size=size)
    if grid := rng.choice([0, 0, 0.5, 2.0]):
        logits = np.round(logits / grid) * grid

    def off_or(off: float, values: list[float]) -> float:
        return off if rng.random() < 0.6 else float(rng.choice(values))

    # Off the round numbers, where a cut would hang on the last bit.
    share = (int(rng.integers(999)) + 0.37) / 1000
    options = Sampling(
        repetition_penalty=off_or(1, [0.7, 1.1, 2.0]),
        presence_penalty=off_or(0, [-0.5, 1.5]),
        frequency_penalty=off_or(0, [-0.3, 0.3]),
        temperature=float(rng.choice([0.01, 0.3, 1.0, 2.7])),
        top_k=int(off_or(0, [1, 2, 20, 100, 3000, 10_000])),
        top_p=off_or(1, [share, 0.99037]),
        min_p=off_or(0, [share, 0.00137]),
    )
    banned = np.flatnonzero(rng.random(size) < rng.choice([0, 0.1, 0.9]))[: size - 1]
    history = (
        TokenHistory.from_tokens(rng.integers(size, size=5), rng.integers(size, size=20))
        if rng.random() < 0.5
        else None
    )
    some = rng.permutation(size)[: rng.integers(1, 4)]
    bias = LogitBias(some, rng.choice([-100.0, -2.5, 3.0, 50.0], size=some.size)) if rng.random() < 0.3 else None
    return logits.astype(rng.choice([np.float32, np.float64])), options, banned, history, bias


@pytest.mark.slow
@settings(max_examples=600)
@given(seed=st.integers(0, 2**40))
def test_the_fast_transform_is_the_dense_rule(seed):
    logits, options, banned, history, bias = random_case(seed)
    result = Transform(options, banned, bias)(logits, history)
    expected = dense_distribution(logits, options, banned, history, bias)
    # Penalties and biases are taken in the precision of the logits, and a small temperature enlarges what that loses.
    exact = logits.dtype == np.float64 or (history is None and bias is None)
    tolerance = 1e-10 if exact else 5e-6 / min(options.temperature, 1)
    np.testing.assert_allclose(as_dense(result, logits.size), expected, atol=tolerance)


@pytest.mark.parametrize("options", [PLAIN, {}, {**PLAIN, "top_p": 0.5}, {**PLAIN, "min_p": 0.5}])
def test_one_token_left_is_certain(options):
    logits = np.full(1000, -np.inf, dtype=np.float32)
    logits[437] = -3
    result = Transform(Sampling(**options), np.array([1, 2]))(logits)
    assert result.ids.tolist() == [437]
    assert result.logprobs.tolist() == [0]
    assert dense_distribution(logits, Sampling(**options), np.array([1, 2]))[437] == 1


@pytest.mark.parametrize("options", [PLAIN, {}, {**PLAIN, "top_p": 0.999}, {**PLAIN, "min_p": 1e-9}])
def test_banned_ids_are_never_candidates(options):
    logits = logits_of(3000, dtype=np.float32)
    banned = np.argsort(logits)[-50:]
    assert not np.isin(Transform(Sampling(**options), banned)(logits).ids, banned).any()


def test_top_p_finds_its_mass_among_more_than_the_first_few_values():
    logits = np.random.default_rng(0).normal(scale=0.01, size=5000)
    result = Transform(Sampling(temperature=1.0, top_k=0, top_p=0.9), NONE)(logits)
    assert 4400 < result.ids.size < 4600
    np.testing.assert_allclose(
        as_dense(result, 5000), dense_distribution(logits, Sampling(1, 0, 0, 1.0, 0, 0.9), NONE), atol=1e-15
    )


@pytest.mark.parametrize("seed", range(20))
def test_filtering_the_reported_tokens_gives_the_distribution_of_the_whole(seed):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-6, 6, 300).astype(np.float32) / 2  # many are equal
    banned = np.sort(rng.choice(300, 40, replace=False))
    transform = Transform(Sampling(temperature=0.7, top_k=int(rng.integers(1, 30)), top_p=0.9), banned)
    order = rng.permutation(np.argsort(-logits, kind="stable")[:200])
    whole = transform(logits)
    cut = transform(transform.top_k_filter.apply(Candidates(order, logits[order])))
    assert cut.ids.tolist() == whole.ids.tolist()
    assert cut.logprobs.tolist() == whole.logprobs.tolist()
