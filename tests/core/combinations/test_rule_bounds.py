"""What rules claim to know early, against random distributions and against a search that tries to break it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from adversary import breaks, coin_margin, envelope_margin, random_rows, random_weights
from bounds import coin_share, increments, remainder
from rule_cases import RULES, plain

from mixlm.core.combinations import Combination, combination
from mixlm.errors import UnsupportedError
from mixlm.types import Floats

Case = tuple[Floats, Floats, list[int]]


def cases(rule: Combination, count: int, seed: int) -> Iterator[Case]:
    """Rows, weights and an order of members, where the rule is defined; often with a symbol that nobody has yet."""
    rng = np.random.default_rng(seed)
    while count:
        members = len(rule.roles) or int(rng.choice([2, 2, 3, 5]))
        rows = random_rows(rng, members, int(rng.integers(3, 13)))
        if rng.random() < 0.5:
            rows = np.hstack([rows, np.zeros((members, 1))])
        weights = random_weights(rng, members)
        count -= 1
        try:
            rule.combine(rows, weights)
        except UnsupportedError:
            continue
        yield rows, weights, rng.permutation(members).tolist()


def search_envelope(rule: Combination, count: int, steps: int, seed: int, factor: float = 1) -> float:
    rng, worst = np.random.default_rng(seed), np.inf
    for rows, weights, order in cases(rule, count, seed):
        ran = int(rng.integers(1, len(order)))
        if factor == 1 or rule.envelope(rows, weights, order[:ran]).max() > 0.01:
            margin = envelope_margin(rule, rows, weights, order[:ran], factor)
            worst = min(worst, breaks(margin, rows, order[ran:], rng, steps))
    return worst


def search_coin(rule: Combination, count: int, steps: int, seed: int, factor: float = 1) -> float:
    rng, worst = np.random.default_rng(seed), np.inf
    for rows, weights, order in cases(rule, count, seed):
        if rule.first_member(weights) is not None:
            worst = min(worst, breaks(coin_margin(rule, weights, factor), rows, order, rng, steps))
    return worst


def tosses(rule: Combination) -> bool:
    return rule.first_member(np.array([0.5, 0.5])) is not None


@pytest.mark.parametrize("name", RULES)
def test_no_completion_goes_below_the_envelope(name):
    assert search_envelope(RULES[name], 6, 30, seed=1) > -1e-9


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if tosses(rule)])
def test_no_distributions_go_below_what_a_coin_first_emits(name):
    assert search_coin(RULES[name], 4, 25, seed=2) > -1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean, top-p .5", "mean, top-p .9", "mean, T=.7, top-p .8"])
def test_bounds_of_top_p_hold_where_few_symbols_are_looked_at_one_by_one(name, monkeypatch):
    monkeypatch.setattr("mixlm.core.combinations.after._LISTED", 2)
    assert search_envelope(RULES[name], 15, 30, seed=12) > -1e-9
    assert search_coin(RULES[name], 6, 30, seed=13) > -1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_a_long_search_breaks_no_bound(name):
    assert search_envelope(RULES[name], 10, 80, seed=3) > -1e-9
    assert search_coin(RULES[name], 6, 80, seed=4) > -1e-9


@pytest.mark.parametrize("name", ["average", "max", "power 2", "power 0.5", "mean, top-k 3", "mean, T=.5"])
def test_the_search_breaks_bounds_that_are_a_little_too_large(name):
    assert search_envelope(RULES[name], 30, 60, seed=5, factor=1.05) < -1e-6


@pytest.mark.parametrize("name", ["average", "max", "power 0.5", "mean, T=.5"])
def test_the_search_breaks_coins_that_are_a_little_too_large(name):
    assert search_coin(RULES[name], 30, 60, seed=6, factor=1.05) < -1e-6


@pytest.mark.parametrize("name", RULES)
def test_the_envelope_grows_with_every_member_and_ends_at_the_combination(name):
    rule = RULES[name]
    for rows, weights, order in cases(rule, 15, seed=7):
        levels = [rule.envelope(rows, weights, order[:count]) for count in range(len(order) + 1)]
        assert all((after - before).min() > -1e-12 for before, after in pairwise(levels))
        assert levels[0].max(initial=0) == 0
        np.testing.assert_allclose(levels[-1], rule.combine(rows, weights), atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_sampling_in_layers_is_sampling_from_the_combination(name):
    """Every outcome of the uniform number: the level that it falls on, and the increment that is sampled there."""
    rule = RULES[name]
    for rows, weights, order in cases(rule, 15, seed=8):
        combined = rule.combine(rows, weights)
        assert combined.min() >= 0
        assert combined.sum() == pytest.approx(1)
        parts = increments(rule, rows, weights, order)
        assert parts.min() >= 0
        sampled = sum(part.sum() * (part / part.sum()) for part in parts if part.sum() > 0)
        np.testing.assert_allclose(sampled, combined, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if tosses(rule)])
def test_a_coin_first_samples_from_the_combination(name):
    rule = RULES[name]
    for rows, weights, _ in cases(rule, 15, seed=9):
        coin = rule.first_member(weights)
        if coin is None:
            continue
        assert coin.sum() == pytest.approx(1)
        first = [rule.first_distribution(row, weights, member) for member, row in enumerate(rows)]
        assert all(stop.min() > -1e-12 and stop.sum() < 1 + 1e-9 for stop, pi in zip(first, coin, strict=True) if pi)
        stopped = sum(pi * stop for pi, stop in zip(coin, first, strict=True) if pi)
        sampled = stopped + (1 - stopped.sum()) * remainder(rule, rows, weights)
        np.testing.assert_allclose(sampled, rule.combine(rows, weights), atol=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_no_completion_beats_a_certain_winner(name):
    rule, rng = RULES[name], np.random.default_rng(10)
    for rows, weights, order in cases(rule, 15, seed=10):
        for count in range(1, len(order)):
            unread = np.where(np.isin(np.arange(len(rows)), order[:count])[:, None], rows, np.nan)
            winner = rule.certain_winner(unread, weights, order[:count])
            if winner is None:
                continue

            def lead(trial: Floats, winner: int = winner, weights: Floats = weights) -> float:
                try:
                    combined = rule.combine(trial, weights)
                except UnsupportedError:
                    return np.inf
                return float(combined[winner] - np.delete(combined, winner).max())

            assert breaks(lead, rows, order[count:], rng, 30) > -1e-9
            break
        assert rule.certain_winner(rows, weights, order) == np.argmax(rule.combine(rows, weights))


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("average", [[0.8, 0.2, 0], [0, 0, 1]]),
        ("power 2", [[0.95, 0.05, 0], [0, 0, 1]]),
        ("mean, T=0", [[0.8, 0.2, 0], [0, 0, 1]]),
        ("union, k 10", [[0.8, 0.2, 0], [0, 0, 1]]),
        ("contrastive", [[0.95, 0.03, 0.02], [0, 0, 1]]),
        ("contrastive of the expert", [[0.5, 0.3, 0.2], [0, 0, 1]]),
        ("guidance of the prompt", [[0.5, 0.3, 0.2], [0, 0, 1]]),
        ("defer", [[0.9, 0.1, 0], [0, 0, 1]]),
    ],
)
def test_a_winner_is_known_from_the_first_member(name, rows):
    assert RULES[name].certain_winner(np.array(rows), np.array([0.7, 0.3]), [0]) == 0


def test_above_temperature_1_what_is_nearly_impossible_counts():
    rows, weights = np.array([[1 - 1e-13, 1e-13], [0.5, 0.5]]), np.array([0.5, 0.5])
    rule = combination("guidance", strength=1).with_sampling(plain(temperature=5))
    assert rule.combine(rows, weights)[1] > 1e-3
    assert (rule.envelope(rows, weights, [0]) <= rule.combine(rows, weights) + 1e-9).all()
    rows[0] = [1, 0]
    np.testing.assert_array_equal(rule.envelope(rows, weights, [0]), [1, 0])


def test_stopping_rates_of_two_equal_members():
    """Peaked rows: what each coin emits at least."""
    rows, weights = np.array([[0.9, 0.06, 0.04, 0], [0.9, 0, 0.04, 0.06]]), np.array([0.5, 0.5])

    def rate(rule: Combination) -> float:
        return float(coin_share(rule, rows, weights).sum())

    mean = combination("mean-then-truncate")
    assert rate(combination("max")) == pytest.approx(0.9 / 1.1 + 0.06 / 1.94 + 0.04 / 1.96)
    assert rate(combination("power", strength=2)) > 0.8
    assert rate(combination("power", strength=0.5)) > 0.7
    assert rate(mean.with_sampling(plain(temperature=0.7))) > 0.85
    assert rate(mean.with_sampling(plain(top_k=2))) == pytest.approx(0.9)
    assert rate(combination("union-top-k", k=2)) == pytest.approx(0.96)


@pytest.mark.parametrize("alpha", [1.2, 1 / 0.7, 3])
def test_the_tempered_coin_emits_at_least_the_bound_by_convexity(alpha):
    rng = np.random.default_rng(11)
    rule = combination("mean-then-temper").with_sampling(plain(temperature=1 / alpha))
    for _ in range(30):
        members = int(rng.choice([2, 3]))
        rows, weights = random_rows(rng, members, 6), random_weights(rng, members)
        norms = (rows**alpha).sum(axis=1)
        bound = weights**alpha / (weights * norms + 1 - weights) @ rows**alpha
        assert (coin_share(rule, rows, weights) >= bound - 1e-12).all()
