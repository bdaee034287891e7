"""What rules refuse, rules of one's own, the guard, alignment, and engines that report few tokens."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import pytest
from adversary import random_rows, random_weights
from bounds import check_bounds, coin_share, increments
from rule_cases import RULES, plain

from mixlm.choices import RULES_WITH_ROLES
from mixlm.core.combinations import COMBINATIONS, Combination, Unreported, align, combination, combination_class
from mixlm.core.combinations.base import align_logprobs
from mixlm.core.combinations.contrastive import Contrastive
from mixlm.core.combinations.log_linear import Geometric, Guidance
from mixlm.core.combinations.power import Max
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.types import Candidates

ROWS, WEIGHTS = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]), np.array([0.5, 0.5])


def test_every_rule_is_known_by_its_name():
    assert len(COMBINATIONS) == 14
    assert [combination(name).name for name in COMBINATIONS] == list(COMBINATIONS)
    assert combination("unite") == combination("union-top-k")


@pytest.mark.slow
def test_a_rule_is_imported_when_it_is_asked_for():
    program = (
        "import sys; from mixlm.core.combinations import combination; before = set(sys.modules); combination('max');"
        "print(sorted(m for m in sys.modules if m.startswith('mixlm.core.combinations.')))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "combinations.power" in loaded
    assert "combinations.vote" not in loaded


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("contrastiv", {}, "there is no rule 'contrastiv'.*did you mean 'contrastive'"),
        ("zzz", {}, "there is no rule 'zzz'.*the rules are average, geometric"),
        (3, {}, "there is no rule 3"),
        ("geometric", {"strenght": 1}, "strenght is given, and .* has no such parameter.*did you mean 'strength'"),
        ("max", {"strength": 1}, "strength is given, and rule max has no such parameter.*it has no parameters"),
        ("geometric", {"strength": 0}, "strength is 0; for rule geometric it must be greater than 0"),
        ("power", {"strength": 0}, "strength is 0.*geometric"),
        ("power", {"strength": float("nan")}, "strength is nan; for rule power it must be from"),
        ("contrastive", {"strength": -1}, "strength is -1; for rule contrastive it must be 0 or more"),
        ("contrastive", {"alpha": 1.5}, "alpha is 1.5; for rule contrastive it must be from 0 to 1"),
        ("contrastive", {"form": "new"}, "form is 'new'.*weighted, original"),
        ("proxy", {"strength": "2"}, "strength is '2'; for rule proxy"),
        ("guidance", {"strength": True}, "strength is True"),
        ("union-top-k", {"k": 0}, "k is 0; for rule union-top-k it must be a whole number, 1 or more"),
        ("union-top-k", {"k": 2.5}, "k is 2.5.*whole number"),
        ("union-top-k", {"k": 2.0}, "k is 2.0.*whole number"),
        ("power", {"strength": np.complex128(2)}, "strength is .* for rule power it must be a number"),
        ("defer", {"strength": 2}, "strength is 2; for rule defer it must be from 0 to 1"),
        ("defer", {"by": "luck"}, "by is 'luck'"),
        ("defer", {"accept": 1}, "accept is 1"),
    ],
)
def test_bad_parameters_are_one_clear_sentence(name, parameters, message):
    with pytest.raises(ConfigError, match=message):
        combination(name, **parameters)


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("contrastive", 3, r"combines 2 members \(expert, amateur\), and there are 3"),
        ("proxy", 2, r"combines 3 members \(base, tuned, untuned\), and there are 2"),
        ("max", 1, "needs 2 members, and there is 1"),
        ("vote", 7, "counts at most 6 votes, and there are 7 members"),
    ],
)
def test_the_number_of_members_is_checked(name, count, message):
    with pytest.raises(ConfigError, match=message):
        combination(name).check_members(count)
    combination("average").check_members(1)


def test_options_that_a_rule_cannot_apply_are_refused():
    with pytest.raises(ConfigError, match="top_k is 0, and rule union-top-k joins"):
        combination("union-top-k").with_sampling(plain())
    with pytest.raises(ConfigError, match="top_k is 5, and rule mean-then-temper has a temperature alone"):
        combination("mean-then-temper").with_sampling(plain(top_k=5))
    assert combination("geometric").with_sampling(plain()) == combination("geometric")


def test_every_rule_says_what_it_needs():
    for name in COMBINATIONS:
        rule = combination_class(name)
        assert rule.__doc__
        assert all(parameter.init for parameter in fields(rule))
    assert [name for name in COMBINATIONS if combination(name).shared_vocabulary] == ["contrastive", "guidance"]
    assert [name for name in COMBINATIONS if combination(name).alignment != "symbols"] == ["union-top-k", "gac"]
    drafting = ["geometric", "min", "contrastive", "proxy", "guidance"]
    assert [name for name in COMBINATIONS if combination(name).speculates] == drafting
    assert combination("power", strength=-1).common_options
    assert not combination("power").common_options


def test_alignment_lays_rows_over_the_union_of_the_supports():
    first = Candidates(np.array([7, 2]), np.log([0.75, 0.25]))
    second = Candidates(np.array([2, 9]), np.log([0.5, 0.5]))
    symbols, probs = align([first, None, second])
    assert symbols.tolist() == [2, 7, 9]
    np.testing.assert_allclose(probs, [[0.25, 0.75, 0], [0, 0, 0], [0.5, 0, 0.5]])
    assert align([None, None]).probs.shape == (2, 0)


# Rules of one's own.


def test_a_function_is_a_rule():
    rule = Combination.of(lambda probs, weights: probs[0], name="first")
    np.testing.assert_allclose(rule.combine(ROWS, WEIGHTS), ROWS[0])
    assert rule.envelope(ROWS, WEIGHTS, [0]) is None
    assert rule.certain_winner(ROWS, WEIGHTS, [0]) is None
    assert rule.speculates
    known = Combination.of(lambda probs, weights: probs[0], lambda probs, weights, ran: probs[0], name="first")
    np.testing.assert_allclose(known.envelope(ROWS, WEIGHTS, [0]), ROWS[0])
    np.testing.assert_allclose(known.envelope(ROWS, WEIGHTS, [1]), 0)
    assert known.certain_winner(ROWS, WEIGHTS, [0]) == 0
    check_bounds(known, ROWS, WEIGHTS)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([0.5, 0.5], r"rule mine returned the shape \(2,\); it must be \(3,\)"),
        ([np.nan, 0.5, 0.5], "rule mine returned a value that is not finite"),
        ([-0.5, 1, 0.5], "rule mine returned the negative value -0.5"),
        ([0.5, 0.5, 0.5], "rule mine returned probabilities that sum to 1.5"),
        ([0, 0, 0], "rule mine returned probabilities that sum to 0"),
        ("abc", "rule mine returned str; it must be an array of numbers"),
        ([0.5j, 0.5, 0.5], "rule mine returned complex numbers"),
        (None, "rule mine returned"),
        ([[0.5], [0.2, 0.3]], "rule mine returned list; it must be an array of numbers"),
    ],
)
def test_what_a_function_returns_is_checked_at_every_use(result, message):
    with pytest.raises(ConfigError, match=message):
        Combination.of(lambda probs, weights: result, name="mine").combine(ROWS, WEIGHTS)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1, 1, 1], "the envelope of rule mine sums to 3"),
        ([0.1], r"envelope of rule mine returned the shape \(1,\)"),
        (None, "the envelope of rule mine returned None"),
    ],
)
def test_what_an_envelope_returns_is_checked_too(result, message):
    rule = Combination.of(lambda probs, weights: weights @ probs, lambda probs, weights, ran: result, name="mine")
    with pytest.raises(ConfigError, match=message):
        rule.envelope(ROWS, WEIGHTS, [0])


@pytest.mark.parametrize(
    ("method", "result", "message"),
    [
        ("combine", [np.nan, 0.5, 0.5], "rule mine returned a value that is not finite"),
        ("combine", [0.5, 0.2, 0.2], "rule mine returned probabilities that sum to 0.9"),
        ("bound", [-0.1, 0, 0], "the envelope of rule mine returned the negative value -0.1"),
        ("first_member", [0.5, np.nan], "first_member of rule mine returned a value that is not finite"),
        ("first_distribution", [0.5], r"first_distribution of rule mine returned the shape \(1,\)"),
    ],
)
def test_what_a_class_of_ones_own_returns_is_checked_too(method, result, message):
    own = type("Mine", (Max,), {"__module__": "mine", "name": "mine", method: lambda self, *args: np.array(result)})()
    calls = {
        "combine": lambda: own.combine(ROWS, WEIGHTS),
        "bound": lambda: own.envelope(ROWS, WEIGHTS, [0]),
        "first_member": lambda: own.first_member(WEIGHTS),
        "first_distribution": lambda: own.first_distribution(ROWS[0], WEIGHTS, 0),
    }
    with pytest.raises(ConfigError, match=message):
        calls[method]()


def test_a_class_that_replaces_a_function_takes_no_shortcut_around_it():
    own = type("Mine", (Geometric,), {"combine": lambda self, probs, weights: probs[0]})()
    assert not own.is_product
    assert Geometric().is_product
    certain = type("Certain", (Geometric,), {"bound": lambda self, *args: np.eye(3)[0]})()
    parts = {0: Candidates(np.arange(3), np.log(ROWS[0]))}
    assert Geometric().is_open(parts, WEIGHTS)
    assert not certain.is_open(parts, WEIGHTS)


def test_a_function_cannot_change_what_others_see():
    def spoil(probs, weights):
        probs[:] = 0
        return np.array([1.0, 0, 0])

    rows = ROWS.copy()
    Combination.of(spoil).combine(rows, WEIGHTS)
    np.testing.assert_array_equal(rows, ROWS)


def test_things_that_are_no_functions_are_refused():
    with pytest.raises(ConfigError, match="the rule is 3; it must be a function"):
        Combination.of(3)
    with pytest.raises(ConfigError, match="envelope is 3; it must be a function"):
        Combination.of(lambda probs, weights: probs[0], 3)
    with pytest.raises(ConfigError, match=r"the rule cannot be called with \(probs, weights\)"):
        Combination.of(lambda probs: probs[0])
    with pytest.raises(ConfigError, match=r"the rule's envelope cannot be called with \(probs, weights, ran\)"):
        Combination.of(lambda probs, weights: probs[0], lambda probs, weights: probs[0])
    with pytest.raises(ConfigError, match=r"accept cannot be called with \(distribution\)"):
        combination("defer", accept=lambda: 1.0)


def test_what_deferral_is_given_is_checked():
    with pytest.raises(ConfigError, match="accept failed: ZeroDivisionError"):
        combination("defer", accept=lambda q: 1 / 0).combine(ROWS, WEIGHTS)
    with pytest.raises(ConfigError, match="accept returned 2; it must be from 0 to 1"):
        combination("defer", accept=lambda q: q + 2 - q).combine(ROWS, WEIGHTS)
    with pytest.raises(ConfigError, match="accept returned NoneType; it must be an array of real numbers"):
        combination("defer", accept=lambda q: None).combine(ROWS, WEIGHTS)
    with pytest.raises(ConfigError, match="accept returned nan"):
        combination("defer", accept=lambda q: q * np.nan).combine(ROWS, WEIGHTS)
    with pytest.raises(ConfigError, match=r"accept returned the shape \(2,\)"):
        combination("defer", accept=lambda q: q[:2]).combine(ROWS, WEIGHTS)


# The guard.


@pytest.mark.parametrize("name", RULES)
def test_the_guard_lets_every_rule_pass(name):
    rng = np.random.default_rng(1)
    for _ in range(10):
        members = len(RULES[name].roles) or 3
        rows, weights = random_rows(rng, members, 6), random_weights(rng, members)
        try:
            RULES[name].combine(rows, weights)
        except UnsupportedError:
            continue
        check_bounds(RULES[name], rows, weights, rng.permutation(members).tolist())


def test_an_envelope_that_is_too_large_is_caught():
    rule = Combination.of(
        lambda probs, weights: weights @ probs, lambda probs, weights, ran: probs[ran[0]], name="greedy one"
    )
    with pytest.raises(
        AssertionError, match="envelope of rule greedy one after 1 of 2 members exceeds the combination"
    ):
        check_bounds(rule, ROWS, WEIGHTS)


def test_a_coin_that_emits_too_much_is_caught():
    @dataclass(frozen=True)
    class Hasty(Max):
        name: ClassVar[str] = "hasty"

        def first_distribution(self, row, weights, member, unreported=None):
            return row

    with pytest.raises(AssertionError, match="what rule hasty emits after one member exceeds the combination"):
        check_bounds(Hasty(), ROWS, WEIGHTS)


def test_increments_are_never_negative_even_where_an_envelope_shrinks():
    def shrinking(probs, weights, ran):
        return 0.5 * weights[0] * probs[0] if ran == (0,) else np.zeros(probs.shape[1])

    rule = Combination.of(lambda probs, weights: weights @ probs, shrinking)
    parts = increments(rule, np.vstack([ROWS, ROWS[:1]]), np.array([0.5, 0.3, 0.2]), [0, 1, 2])
    assert parts.min() >= 0
    assert parts[0].sum() > 0


# Engines that report their likeliest tokens alone.


def reported(rows: np.ndarray, count: int) -> np.ndarray:
    """The largest of each row."""
    out = np.zeros_like(rows)
    for part, row in zip(out, rows, strict=True):
        top = np.argsort(-row, kind="stable")[:count]
        part[top] = row[top]
    return out


@pytest.mark.parametrize("name", sorted(set(RULES) - {"vote", "defer by entropy", "defer by function"}))
def test_bounds_hold_for_whatever_was_not_reported(name):
    """Some of what is left out may belong to tokens that are never sampled, and some to symbols that are reported."""
    rule, rng = RULES[name], np.random.default_rng(2)
    for _ in range(40):
        members = len(rule.roles) or int(rng.choice([2, 3]))
        rows, weights = random_rows(rng, members, 8), random_weights(rng, members)
        try:
            combined = rule.combine(rows, weights)
        except UnsupportedError:
            continue
        part = reported(rows, int(rng.choice([3, 5, 8]))) * rng.choice([1, 0.999, 0.7], members)[:, None]
        # Another token of a reported symbol is no likelier than those that are reported.
        split = (rng.random(part.shape) < 0.2) & (part > 0) & rng.choice([True, False])
        part = np.where(split, np.maximum(part / 2, part - least(part)), part)
        for count in range(1, members + 1):
            ran = rng.permutation(members)[:count].tolist()
            seen = np.where(np.isin(np.arange(members), ran)[:, None], part, 0.0)
            unreported = Unreported.of(seen, ran, (seen == 0) | split, tokens=2 if split.any() else 1)
            lower = rule.envelope(seen, weights, ran, unreported)
            assert (lower <= combined + 1e-9).all()
            winner = rule.certain_winner(seen, weights, ran, unreported)
            assert winner is None or combined[winner] > combined.max() - 1e-9


@pytest.mark.parametrize("name", sorted(name for name, rule in RULES.items() if rule.takes_reports))
def test_bounds_of_reports_come_close_to_the_rule(name):
    """What engines leave open gets small as they report more; then so does what the envelope leaves."""
    rule, rng = RULES[name], np.random.default_rng(5)
    for _ in range(10):
        members = len(rule.roles) or int(rng.choice([2, 3]))
        rows = rng.permutation(20.0 ** -np.arange(12)) * rng.uniform(0.5, 1, (members, 12))
        rows, weights = rows / rows.sum(axis=1, keepdims=True), np.full(members, 1 / members)
        ran, part = list(range(members)), reported(rows, 11)
        lower = rule.envelope(part, weights, ran, Unreported.of(part, ran))
        combined = rule.combine(rows, weights)
        assert (lower <= combined + 1e-9).all()
        assert lower.sum() > 1 - 1e-6


def least(rows: np.ndarray) -> np.ndarray:
    """The least positive value of each row."""
    return np.where(rows > 0, rows, np.inf).min(axis=1, keepdims=True)


def test_what_is_unreported():
    rows = np.array([[0.5, 0.3, 0], [0.2, 0.1, 0.1], [0, 0, 0], [0.5, 0.5, 0], [0.5, 0.4, 0.1]])
    mass, ceiling, open_symbols = Unreported.of(rows, [0, 1, 3])
    np.testing.assert_allclose(mass, [0.2, 0.6, 0, 0, 0], atol=1e-11)
    np.testing.assert_allclose(ceiling, [0.2, 0.1, 0, 0, 0], atol=1e-11)
    assert mass[3] > 0
    assert open_symbols.sum(axis=1).tolist() == [1, 0, 0, 1, 0]
    upper = Unreported.of(rows, [0, 1, 3]).upper(rows)
    np.testing.assert_allclose(upper[:2], [[0.625, 0.375, 0.2], [0.5, 0.25, 0.25]], atol=1e-11)


def test_rules_that_need_whole_distributions_say_so():
    part = np.array([[0.5, 0.3, 0], [0, 0, 0]])
    own = Combination.of(lambda probs, weights: probs[0], lambda probs, weights, ran: probs[0], name="mine")
    for rule in (combination("vote"), own, combination("defer", by="entropy")):
        with pytest.raises(UnsupportedError, match="a member reports its likeliest tokens alone"):
            rule.envelope(part, WEIGHTS, [0], Unreported.of(part, [0]))
    # Of a report of less than k tokens, nothing is known to be in the union.
    left = Unreported.of(part[:1], [0])
    assert not combination("union-top-k").first_distribution(part[0], WEIGHTS, 0, left).any()


def test_a_report_of_the_top_k_is_all_that_union_top_k_needs_first():
    rows = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    rule = combination("union-top-k", k=2)
    whole = coin_share(rule, rows, WEIGHTS)
    part = reported(rows, 2)
    stops = [
        rule.first_distribution(row, WEIGHTS, member, Unreported.of(row[None], [0])) for member, row in enumerate(part)
    ]
    np.testing.assert_allclose(WEIGHTS @ np.array(stops), whole)


class First:
    """Not a rule, but a base of some."""

    @staticmethod
    def combine(probs, weights):
        return probs[0]


def test_a_rule_that_replaces_a_function_of_a_product_takes_no_shortcut_of_it():
    class Mixed(First, Geometric):
        pass

    class Own(Guidance):
        def combine(self, probs, weights):
            return super().combine(probs=probs, weights=weights)

    class Bounded(Contrastive):
        def bound(self, probs, weights, ran, unreported=None):
            return super().bound(probs, weights, ran, unreported)

    class Renamed(Geometric):
        name = "renamed"

    assert Geometric().is_product
    assert Renamed().is_product
    for rule in (Mixed(), Own(), Bounded()):
        assert not rule.is_product
        assert not rule.is_open({}, WEIGHTS)
    np.testing.assert_allclose(Mixed().combine(ROWS, WEIGHTS), ROWS[0])
    np.testing.assert_allclose(Own().combine(weights=WEIGHTS, probs=ROWS), Guidance().combine(ROWS, WEIGHTS))
    assert not Own().bound(ROWS, WEIGHTS, [1]).any()


def test_what_is_too_unlikely_for_a_probability_is_impossible_in_logarithms_too():
    ids = np.arange(3)
    rows = [np.array([0.0, -1e9, -1.0]), np.array([-1.0, 0.0, -1.0])]
    symbols, logprobs = align_logprobs([Candidates(ids, row) for row in rows])
    assert symbols.tolist() == [0, 1, 2]
    assert logprobs[0].tolist() == [0, -np.inf, -1]
    assert logprobs[1] is rows[1]
    for rule, order in ((Contrastive(alpha=0.0), (1, 0)), (Guidance(), (1, 0))):
        ordered = [logprobs[row] for row in order]
        with pytest.raises(UnsupportedError, match="divides by"):
            rule.from_logprobs(ordered, WEIGHTS)
        with pytest.raises(UnsupportedError, match="divides by"):
            rule.combine(np.exp(ordered), WEIGHTS)


def test_the_rules_that_have_roles_are_listed():
    assert [name for name in COMBINATIONS if combination_class(name).roles] == list(RULES_WITH_ROLES)
