"""What an ensemble could gain on a text: from scores, and on the command line."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize
from scored_texts import made
from toys import engine, make_ensemble

from mixlm.inspection.gain import measure_gain
from mixlm.scoring.scores import Scores


def scores_of(rng: np.random.Generator, segments: int = 400) -> Scores:
    """Two members that complement each other, and one that is the first's noisy double."""
    good = rng.random(segments) < 0.5
    first, second = np.where(good, -0.5, -3.0), np.where(good, -3.0, -0.6)
    table = np.column_stack([first, second, first - 0.3])
    return made(table + rng.normal(scale=0.05, size=(segments, 1)))


def test_the_gain_is_of_the_half_that_the_weights_were_not_fitted_to() -> None:
    scores = scores_of(np.random.default_rng(0))
    ensemble = make_ensemble([engine(seed=i) for i in range(3)])
    report = measure_gain(ensemble, replace(scores, text=b"ab ca" * 80))
    train, check = np.exp(scores.logprobs[:200]), np.exp(scores.logprobs[200:])
    best = minimize(
        lambda w: -np.log(train @ w).mean(), np.full(3, 1 / 3), bounds=[(0, 1)] * 3, method="SLSQP",
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
    ).x  # fmt: skip
    assert report.bytes == report.segments == 200
    assert report.fixed == pytest.approx(-np.log2(check @ best).mean(), abs=1e-4)
    assert report.equal == pytest.approx(-np.log2(check.mean(axis=1)).mean())
    assert report.oracle == pytest.approx(-np.log2(check.max(axis=1)).mean())
    assert report.oracle < report.fixed < report.best
    assert report.worth_dropping == "m2"
    without = {member.name: member.without for member in report.members}
    assert without["m2"] == pytest.approx(report.fixed, rel=1e-3)
    assert without["m1"] > 1.1 * report.fixed


def test_of_two_members_none_can_be_dropped_and_costs_are_measured() -> None:
    scores = scores_of(np.random.default_rng(1))
    two = replace(scores, names=("m0", "m1"), logprobs=scores.logprobs[:, :2], prompt_bits=scores.prompt_bits[:, :2])
    ensemble = make_ensemble([engine(seed=i) for i in range(2)])
    two = replace(two, text=b"ab ca" * 80)
    report = measure_gain(ensemble, two)
    assert report.worth_dropping is None
    assert report.cost is not None
    assert report.cost > 0


def test_where_no_member_can_be_left_out_none_is_least_useful() -> None:
    rare = np.full((60, 3), -1.0)
    for place in (5, 6, 7, 35, 36, 37):  # that one member alone can write, in both halves
        rare[place, [i for i in range(3) if i != place % 3]] = -np.inf
    report = measure_gain(make_ensemble([engine(seed=i) for i in range(3)]), replace(made(rare), text=b"ab ca" * 80))
    assert [member.without for member in report.members] == [None, None, None]
    assert report.least_useful is None
    assert report.worth_dropping is None
