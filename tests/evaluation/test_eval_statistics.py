"""Intervals and p-values against scipy, and the results they are part of."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mixlm.errors import ConfigError
from mixlm.evaluation.results import Results, Score, sign_flip_p, t_interval


def test_the_interval_is_students() -> None:
    values = np.random.default_rng(0).normal(size=7)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((expected.low, expected.high))
    assert t_interval([1.0]) is None


def test_few_differences_are_gone_through() -> None:
    values = np.random.default_rng(1).normal(0.3, size=9)
    exact = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p(values) == pytest.approx(exact.pvalue)
    assert sign_flip_p(np.append(values, np.zeros(50))) == pytest.approx(exact.pvalue)


def test_many_differences_are_sampled() -> None:
    values = np.random.default_rng(2).normal(0.15, size=200)
    assert sign_flip_p(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.015)
    assert sign_flip_p(values) == sign_flip_p(values)


def test_yes_or_no_is_mcnemars_exact_test() -> None:
    values = np.array([1.0] * 30 + [-1.0] * 15 + [0.0] * 100)
    assert sign_flip_p(values) == pytest.approx(stats.binomtest(30, 45).pvalue)
    assert sign_flip_p(np.zeros(5)) == 1.0


def score(method: str, questions: list[list[float]], **more) -> Score:
    table = np.array(questions)
    values = tuple(table.mean(axis=1))
    return Score("t", method, "acc", "none", True, tuple(range(len(values))), values, table.shape[1], table)


def test_methods_are_paired_by_question() -> None:
    left = score("mixture", [[1, 1, 0, 1], [1, 0, 0, 1]])
    right = score("single:a", [[1, 0, 0, 0]])
    results = Results((left, right), {})
    comparison = results.compare("mixture", "single:a")
    differences = [0.0, 0.5, 0.0, 1.0]
    interval = stats.ttest_rel([1, 0.5, 0, 1], [1, 0, 0, 0]).confidence_interval(0.95)
    assert comparison.difference == pytest.approx(np.mean(differences))
    assert comparison.interval == pytest.approx((interval.low, interval.high))
    assert comparison.p_value == pytest.approx(0.5)
    assert (comparison.questions, comparison.better, comparison.worse) == (4, 2, 0)
    assert left.interval == pytest.approx(t_interval([0.75, 0.5]))
    assert left.question_interval == pytest.approx(t_interval([1, 0.5, 0, 1]))
    assert right.interval is None
    assert [comparison.right for comparison in results.comparisons()] == ["single:a"]


def test_what_was_not_run_is_named() -> None:
    whole = Score("t", "mixture", "bits_per_byte", "none", False, (0,), (1.0,), 3)
    results = Results((whole, Score("t", "single:a", "bits_per_byte", "none", False, (0,), (1.1,), 3)), {})
    assert results.score("t", "mixture").mean == 1.0
    assert results.comparisons() == ()
    with pytest.raises(ConfigError, match="cannot be paired"):
        results.compare("mixture", "single:a")
    with pytest.raises(ConfigError, match=r"no method 'mixtur' \(did you mean 'mixture'"):
        results.compare("mixtur", "single:a")
    with pytest.raises(ConfigError, match="no task 'u'"):
        results.score("u", "mixture")
    with pytest.raises(ConfigError, match="no metric 'acc'"):
        results.score("t", "mixture", "acc")
