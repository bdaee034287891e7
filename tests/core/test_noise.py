from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from toys import assert_sampled_from, counted

from mixlm.core import rng
from mixlm.core.rng import Noise

SYMBOLS = np.array([0, 1, 49151, 2**40])


@pytest.mark.parametrize(
    ("noise", "gumbel", "coin"),
    [
        (Noise(0), [-0.08509219704059506, -0.7304409176511977, 0.39128212967631576, -0.9107462914081998], 6),
        (Noise(1, 2, 3), [3.8950838967198407, 1.3505897493882155, 2.116136771335933, 3.7918911715203727], 202),
        (Noise(2**63, 5, 7), [1.8126162515139148, 0.03837892248561514, 2.2582762346435983, 1.271134778611541], 540),
        (Noise(2**64 - 1), [0.9950622969195311, 5.185827557174435, 1.0285218267263, 0.7059538761710169], 321),
    ],
)
def test_the_noise_of_a_key_never_changes(noise, gumbel, coin):
    np.testing.assert_allclose(noise.gumbel(SYMBOLS), gumbel, rtol=1e-12)
    assert noise.coin(np.full(1000, 1e-3)) == coin


def test_a_symbol_has_the_same_noise_in_any_set_of_symbols():
    noise = Noise(3, 1, 4)
    some = np.array([7, 70_000, 3])
    np.testing.assert_array_equal(noise.gumbel(some), noise.gumbel(np.arange(100_000))[some])


def test_every_part_of_the_key_counts():
    keys = [Noise(0, 0, 0), Noise(1, 0, 0), Noise(0, 1, 0), Noise(0, 0, 1), Noise(1, 1, 0), Noise(0, 1, 1)]
    keys += [Noise(2**63), Noise(2**63 + 1), Noise(2**32), Noise(0, 2**32), Noise(0, 0, 2**32)]
    assert len({tuple(noise.gumbel(SYMBOLS)) for noise in keys}) == len(keys)


def test_another_position_keeps_seed_and_sequence():
    assert Noise(5, 6, 7).at(8) == Noise(5, 6, 8)


def test_rounds_of_a_position_have_different_noise():
    noise = Noise(5, 6, 7)
    turns = [noise, noise.next_round(), noise.next_round().next_round(), noise.at(8), noise.at(8).next_round()]
    assert len({tuple(turn.gumbel(SYMBOLS)) for turn in turns}) == len({turn.uniform() for turn in turns}) == 5
    assert noise.next_round().at(7) == noise


@pytest.mark.slow
def test_the_second_sample_of_a_position_says_nothing_about_the_first():
    uniform = np.full(4, 0.25)
    pairs = counted(
        lambda i: (Noise(1, i).sample(SYMBOLS, uniform), Noise(1, i).next_round().sample(SYMBOLS, uniform)), 8_000
    )
    assert_sampled_from(pairs, {(a, b): 1 / 16 for a in range(4) for b in range(4)})
    coins = counted(lambda i: (Noise(1, i).coin(uniform), Noise(1, i).next_round().coin(uniform)), 8_000)
    assert_sampled_from(coins, {(a, b): 1 / 16 for a in range(4) for b in range(4)})


def keys(count: int, vary: str) -> list[Noise]:
    return [Noise(**{"seed": 11, "sequence": 3, "position": 5, vary: i}) for i in range(count)]


@pytest.mark.parametrize("vary", ["seed", "sequence", "position"])
def test_coins_follow_their_weights(vary):
    weights = np.array([0.05, 0.5, 0.15, 0.3])
    noises = keys(6_000, vary)
    assert_sampled_from(counted(lambda i: noises[i].coin(weights), len(noises)), dict(enumerate(weights)))


@pytest.mark.slow
@pytest.mark.parametrize("vary", ["seed", "sequence", "position"])
@pytest.mark.parametrize(
    "symbols", [np.arange(6), 262_144 + np.arange(6), np.array([0, 1, 2**16, 2**31, 2**40, 2**62])]
)
def test_samples_follow_their_probabilities(vary, symbols):
    probabilities = np.array([0.4, 0.25, 0.2, 0.1, 0.04, 0.01])
    noises = keys(6_000, vary)
    logprobs = np.log(probabilities)
    counts = counted(lambda i: noises[i].sample(symbols, logprobs), len(noises))
    assert_sampled_from(counts, dict(enumerate(probabilities)))


@pytest.mark.slow
@pytest.mark.parametrize("vary", ["seed", "sequence", "position"])
def test_coin_and_sample_of_a_position_are_independent(vary):
    noises = keys(6_000, vary)
    weights, logprobs, symbols = np.full(3, 1 / 3), np.log(np.full(4, 0.25)), np.arange(4)
    table = np.zeros((3, 4))
    for noise in noises:
        table[noise.coin(weights), noise.sample(symbols, logprobs)] += 1
    assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("vary", ["seed", "sequence", "position"])
def test_neighbouring_keys_are_independent(vary):
    noises = keys(6_000, vary)
    logprobs, symbols = np.log(np.full(4, 0.25)), np.arange(4)
    samples = [noise.sample(symbols, logprobs) for noise in noises]
    coins = [noise.coin(np.full(4, 0.25)) for noise in noises]
    for first, second in ((samples[:-1], samples[1:]), (coins[:-1], coins[1:]), (samples[:-1], coins[1:])):
        table = np.zeros((4, 4))
        np.add.at(table, (first, second), 1)
        assert stats.chi2_contingency(table).pvalue > 1e-4


def test_noise_of_one_position_is_gumbel_over_a_whole_vocabulary():
    values = np.concatenate([Noise(1, 0, position).gumbel(np.arange(50_000)) for position in range(4)])
    assert stats.kstest(values, stats.gumbel_r.cdf).pvalue > 1e-4
    assert np.isfinite(values).all()


def test_a_weight_of_zero_is_never_chosen():
    for weights, allowed in (
        ([0, 1, 0], {1}),
        ([0, 0.5, 0, 0.5, 0], {1, 3}),
        ([1e-300, 0], {0}),
        ([0, 1e-9, 1], {1, 2}),
    ):
        assert {noise.coin(np.array(weights, dtype=float)) for noise in keys(500, "position")} <= allowed


@pytest.mark.parametrize("key", [0, 2**64 - 1])
def test_the_ends_of_the_range_choose_no_weight_of_zero(key, monkeypatch):
    monkeypatch.setattr(rng, "_key", lambda *_: key)
    assert Noise(0).coin(np.array([0, 0.3, 0.7, 0])) == (1 if key == 0 else 2)


def test_weights_need_not_sum_to_one():
    assert [noise.coin(np.array([2.0, 6.0])) for noise in keys(100, "seed")] == [
        noise.coin(np.array([0.25, 0.75])) for noise in keys(100, "seed")
    ]


def _invert(x: int) -> int:
    """Invert the finalizer of SplitMix64."""
    mask = 2**64 - 1
    x ^= (x >> 31) ^ (x >> 62)
    x = x * pow(0x94D049BB133111EB, -1, 2**64) & mask
    x ^= (x >> 27) ^ (x >> 54)
    x = x * pow(0xBF58476D1CE4E5B9, -1, 2**64) & mask
    return x ^ (x >> 30) ^ (x >> 60)


@pytest.mark.parametrize("bits", [0, 2**64 - 1])
def test_uniform_numbers_never_reach_zero_or_one(bits):
    key = (_invert(_invert(bits)) - rng._GOLDEN) % 2**64
    [uniform] = rng._uniform(key, np.array([0]))
    assert 0 < uniform < 1


@pytest.mark.parametrize("scale", [0.1, 2.0, 5.0])
def test_of_a_whole_vocabulary_only_what_may_win_is_looked_at(scale):
    generator = np.random.default_rng(5)
    symbols = np.sort(generator.choice(10**6, 20_000, replace=False))
    for seed in range(30):
        logprobs = generator.normal(scale=scale, size=symbols.size)
        logprobs[:50] += 4 * scale
        noise = Noise(seed)
        assert noise.sample(symbols, logprobs) == np.argmax(logprobs + noise.gumbel(symbols))
    # Of twenty thousand rare symbols, some win.
    logprobs = np.full(symbols.size, -10.0)
    logprobs[0] = 0.0
    wins = sum(Noise(seed).sample(symbols, logprobs) > 0 for seed in range(100))
    expected = 1 - 1 / (1 + 19_999 * np.exp(-10))
    assert abs(wins / 100 - expected) < 0.2
