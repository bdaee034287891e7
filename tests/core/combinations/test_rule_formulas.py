"""Rules against formulas written as plain sums, by enumeration, and against other implementations."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
from adversary import random_rows, random_weights
from rule_cases import RULES, plain

from mixlm.core.combinations import combination
from mixlm.core.sampling import dense_distribution
from mixlm.errors import UnsupportedError
from mixlm.types import Candidates, Floats

NOTHING = np.zeros(0, dtype=np.int64)


def random_cases(count: int, members: int | None = None, positive: bool = False):
    rng = np.random.default_rng(members or 0)
    for _ in range(count):
        n = members or int(rng.choice([2, 3, 5]))
        rows = random_rows(rng, n, int(rng.integers(3, 9)))
        if positive:
            rows = rows + 1e-6
            rows /= rows.sum(axis=1, keepdims=True)
        yield rows, random_weights(rng, n)


def scaled(values: list[float]) -> list[float]:
    return [value / sum(values) for value in values]


def test_means_are_plain_sums_and_products():
    for rows, weights in random_cases(40, positive=True):
        columns = rows.T.tolist()

        def check(name: str, plain_values: list[float], rows: Floats = rows, weights: Floats = weights, **parameters):
            actual = combination(name, **parameters).combine(rows, weights)
            np.testing.assert_allclose(actual, scaled(plain_values), rtol=1e-9)

        def mean(column: list[float], r: float, weights: Floats = weights) -> float:
            return sum(w * p**r for w, p in zip(weights, column, strict=True)) ** (1 / r)

        check("average", [mean(column, 1) for column in columns])
        check("max", [max(column) for column in columns])
        check("min", [min(column) for column in columns])
        for r in (-2, 0.5, 1, 3):
            check("power", [mean(column, r) for column in columns], strength=r)
        for scale in (1, len(weights)):
            exponents = [scale * w for w in weights]
            products = [math.prod(p**e for p, e in zip(column, exponents, strict=True)) for column in columns]
            check("geometric", products, strength=scale)


def test_power_means_have_the_other_rules_as_limits():
    for rows, weights in random_cases(10, positive=True):
        for r in (1e-7, 1e-14, 1e-20, -1e-14, -1e-300):
            near = combination("power", strength=r).combine(rows, weights)
            np.testing.assert_allclose(near, combination("geometric").combine(rows, weights), atol=1e-5)
        equal = np.full(len(rows), 1 / len(rows))
        for r, name in ((3000, "max"), (-3000, "min")):
            limit = combination("power", strength=r).combine(rows, equal)
            np.testing.assert_allclose(limit, combination(name).combine(rows, equal), atol=5e-3)


def test_members_of_weight_0_do_not_count():
    rows = np.array([[0.5, 0.5, 0], [0.2, 0.7, 0.1], [0, 0, 1]])
    weights = np.array([0.5, 0.5, 0])
    for name in ("average", "geometric", "power", "max", "min", "union-top-k", "vote"):
        rule = combination(name)
        np.testing.assert_allclose(rule.combine(rows, weights), rule.combine(rows[:2], weights[:2]), atol=1e-12)


def test_contrastive_is_as_published():
    """Li et al.: scores log e − log a within the plausible set. O'Brien and Lewis: (1 + β) s_e − β s_a on logits."""
    for rows, weights in random_cases(40, 2, positive=True):
        expert, amateur = (np.log(row) + shift for row, shift in zip(rows, (3.0, -1.0), strict=True))  # as logits
        for alpha, beta in ((0.1, 0.5), (0.1, 1.0), (0.4, 0.2)):
            valid = expert >= math.log(alpha) + expert.max()
            weighted = np.where(valid, (1 + beta) * expert - beta * amateur, -np.inf)
            original = np.where(valid, np.log(rows[0]) - np.log(rows[1]), -np.inf)
            rule = combination("contrastive", strength=beta, alpha=alpha)
            np.testing.assert_allclose(rule.combine(rows, weights), softmax(weighted), rtol=1e-9)
            rule = combination("contrastive", strength=1, alpha=alpha, form="original")
            np.testing.assert_allclose(rule.combine(rows, weights), softmax(original), rtol=1e-9)


def softmax(scores: Floats) -> Floats:
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


def test_an_amateurs_temperature_is_a_strength_of_the_original_form():
    for rows, weights in random_cases(10, 2, positive=True):
        colder = np.stack([rows[0], softmax(np.log(rows[1]) / 0.5)])
        original = combination("contrastive", strength=1, form="original").combine(colder, weights)
        scaled_strength = combination("contrastive", strength=2, form="original").combine(rows, weights)
        np.testing.assert_allclose(original, scaled_strength, rtol=1e-9)


def test_proxy_is_dexperts_on_logits():
    """softmax(z_base + α (z_expert − z_antiexpert)), whatever the constants in the logits."""
    for rows, weights in random_cases(40, 3, positive=True):
        base, tuned, untuned = (np.log(row) + shift for row, shift in zip(rows, (2.0, -4.0, 1.0), strict=True))
        for strength in (0.3, 1.0, 2.0):
            actual = combination("proxy", strength=strength).combine(rows, weights)
            np.testing.assert_allclose(actual, softmax(base + strength * (tuned - untuned)), rtol=1e-9)


def test_proxy_leaves_the_base_alone_where_both_small_models_have_nothing():
    rows = np.array([[0.5, 0.3, 0.2], [0.8, 0.2, 0.0], [0.4, 0.6, 0.0]])
    actual = combination("proxy").combine(rows, np.full(3, 1 / 3))
    np.testing.assert_allclose(actual, np.array([1.0, 0.1, 0.2]) / 1.3)


def test_guidance_is_a_weighted_difference_of_log_probabilities():
    for rows, weights in random_cases(40, 2, positive=True):
        prompt, negative = np.log(rows)
        for scale in (0.0, 0.5, 1.0, 1.5, 3.0):
            actual = combination("guidance", strength=scale).combine(rows, weights)
            np.testing.assert_allclose(actual, softmax(negative + scale * (prompt - negative)), rtol=1e-8, atol=1e-300)


@pytest.mark.slow
def test_guidance_is_what_transformers_computes():
    torch = pytest.importorskip("torch")
    from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

    class Processor(UnbatchedClassifierFreeGuidanceLogitsProcessor):
        """With the logits after the negative prompt given."""

        def get_unconditional_logits(self, input_ids):
            return self.unconditional_logits

    for rows, weights in random_cases(10, 2, positive=True):
        processor = Processor(1.7, model=None)
        processor.unconditional_logits = torch.log(torch.tensor(rows[1])).add(5)[None, None]
        scores = processor(torch.zeros(1, 1, dtype=torch.long), torch.log(torch.tensor(rows[0]))[None] - 2)
        expected = torch.softmax(scores[0], dim=-1).numpy()
        np.testing.assert_allclose(combination("guidance", strength=1.7).combine(rows, weights), expected, rtol=1e-9)


def test_gac_takes_the_most_likely_of_the_average_and_samples_what_is_asked():
    for rows, weights in random_cases(20):
        average = [sum(w * p for w, p in zip(weights, column, strict=True)) for column in rows.T.tolist()]
        published = combination("gac").with_sampling(plain(temperature=0.0)).combine(rows, weights)
        assert published[average.index(max(average))] == 1
        assert published.sum() == 1
        sampled = combination("gac").with_sampling(plain(temperature=0.8, top_p=0.9)).combine(rows, weights)
        with np.errstate(divide="ignore"):
            expected = dense_distribution(np.log(np.array(average)), plain(temperature=0.8, top_p=0.9), NOTHING)
        np.testing.assert_allclose(sampled, expected, atol=1e-12)


@pytest.mark.parametrize("name", ["mean-then-truncate", "mean-then-temper"])
def test_the_mean_is_transformed_by_the_dense_reference(name):
    options = [{"temperature": 0.6}, {"temperature": 1.4}]
    if name == "mean-then-truncate":
        options += [{"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.2}, {"temperature": 0.7, "top_k": 3, "top_p": 0.8}]
    for rows, weights in random_cases(15):
        for values in options:
            with np.errstate(divide="ignore"):
                expected = dense_distribution(np.log(weights @ rows), plain(**values), NOTHING)
            actual = combination(name).with_sampling(plain(**values)).combine(rows, weights)
            np.testing.assert_allclose(actual, expected, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 4, 20])
def test_unite_is_a_plain_sum_over_the_union(k):
    for rows, weights in random_cases(20):
        union = set()
        for row in rows.tolist():
            threshold = sorted(row, reverse=True)[min(k, len(row)) - 1]
            union |= {u for u, p in enumerate(row) if p > 0 and p >= threshold}
        expected = [0.0] * rows.shape[1]
        for weight, row in zip(weights, rows.tolist(), strict=True):
            total = sum(row[u] for u in union)
            for u in union:
                expected[u] += weight * row[u] / total
        np.testing.assert_allclose(combination("union-top-k", k=k).combine(rows, weights), expected, atol=1e-12)


@pytest.mark.parametrize("members", [2, 3, 4])
def test_votes_are_counted_over_every_outcome(members):
    rng = np.random.default_rng(members)
    for _ in range(6):
        rows, weights = random_rows(rng, members, 4), random_weights(rng, members)
        expected = np.zeros(4)
        for outcome in itertools.product(range(4), repeat=members):
            votes: Counter[int] = Counter()
            for member, symbol in enumerate(outcome):
                votes[symbol] += weights[member]
            winners = [symbol for symbol, count in votes.items() if count > max(votes.values()) - 1e-9]
            chance = math.prod(rows[member][symbol] for member, symbol in enumerate(outcome))
            for symbol in winners:
                expected[symbol] += chance / len(winners)
        np.testing.assert_allclose(combination("vote").combine(rows, weights), expected, atol=1e-12)


def test_two_equal_votes_are_the_average_and_a_majority_decides_alone():
    rows = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    vote = combination("vote")
    np.testing.assert_allclose(vote.combine(rows, np.array([0.5, 0.5])), rows.mean(axis=0))
    np.testing.assert_allclose(vote.combine(rows, np.array([0.4, 0.6])), rows[1])
    np.testing.assert_allclose(vote.envelope(rows, np.array([0.4, 0.6]), [1]), rows[1])


def test_deferral_is_a_chain_of_choices():
    def accept(q: Floats) -> Floats:
        return np.minimum(1.5 * q, 1)

    for rows, weights in random_cases(20):
        expected, reaches = [0.0] * rows.shape[1], 1.0
        for row in rows[:-1].tolist():
            kept = [min(1.5 * p, 1) * p for p in row]
            expected = [e + reaches * k for e, k in zip(expected, kept, strict=True)]
            reaches *= 1 - sum(kept)
        expected = [e + reaches * p for e, p in zip(expected, rows[-1].tolist(), strict=True)]
        np.testing.assert_allclose(combination("defer", accept=accept).combine(rows, weights), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("by", "strength", "kept"),
    [("top", 0.6, 0.0), ("top", 0.5, 1.0), ("entropy", 1.0, 0.0), ("entropy", 1.1, 1.0), ("token", 0.3, 0.8)],
)
def test_what_deferral_looks_at(by, strength, kept):
    rows, weights = np.array([[0.5, 0.3, 0.2], [0, 0, 1]]), np.array([0.5, 0.5])
    rule = combination("defer", by=by, strength=strength)
    assert rule.envelope(rows, weights, [0]).sum() == pytest.approx(kept)
    assert rule.envelope(rows, weights, [1]).sum() == 0  # the first member has not been heard


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("geometric", [[1, 0], [0, 1]]),
        ("min", [[1, 0], [0, 1]]),
        ("power", [[1, 0], [0, 1]]),
        ("contrastive", [[0.5, 0.5], [1, 0]]),
        ("proxy", [[0.5, 0.5], [0.5, 0.5], [1, 0]]),
        ("guidance", [[0.5, 0.5], [1, 0]]),
    ],
)
def test_where_a_rule_is_not_defined_nothing_is_returned(name, rows):
    rule = combination(name, strength=-1) if name == "power" else combination(name)
    with pytest.raises(UnsupportedError, match=f"rule {name} (is not defined here|divides by)"):
        rule.combine(np.array(rows, dtype=float), np.full(len(rows), 1 / len(rows)))


@pytest.mark.parametrize("name", sorted(name for name, rule in RULES.items() if rule.is_product))
def test_products_in_logarithms_and_of_proportions_where_one_vocabulary_is_needed(name):
    rng = np.random.default_rng(7)
    rule = RULES[name]
    defined = 0
    for _ in range(60):
        members = len(rule.roles) or int(rng.choice([2, 3]))
        rows, weights = random_rows(rng, members, 6), random_weights(rng, members)
        with np.errstate(divide="ignore"):
            logprobs = [np.log(row) + 3.0 * rule.shared_vocabulary for row in rows]
        try:
            expected = rule.combine(rows, weights)
        except UnsupportedError as error:
            with pytest.raises(UnsupportedError, match=f"^{re.escape(str(error))}$"):
                rule.from_logprobs(logprobs, weights)
            continue
        defined += 1
        columns, actual = rule.from_logprobs(logprobs, weights)
        np.testing.assert_allclose(np.exp(actual), expected[columns], atol=1e-9)
        assert expected[columns].sum() == pytest.approx(1)
        parts = {row: Candidates(np.flatnonzero(part > 0), np.log(part[part > 0])) for row, part in enumerate(rows)}
        for row in range(members):
            lower = rule.envelope(np.where(np.arange(members)[:, None] == row, rows, 0.0), weights, [row])
            assert not (rule.is_open({row: parts[row]}, weights) and lower.any())
    assert defined > 10
