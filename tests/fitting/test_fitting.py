"""Fits: EM against scipy and against the grid, intervals, the gate against finite differences and fixed weights."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scored_texts import made
from toys import make_ensemble, table

from mixlm.engines.toy import ToyEngine
from mixlm.errors import ConfigError
from mixlm.fitting.gates import train_gate
from mixlm.fitting.likelihood import (
    bootstrap,
    expectation_maximisation,
    fit_by_prompt,
    grid_search,
    simplex,
)
from mixlm.fitting.study import FitPlan, study
from mixlm.routing import LearnedRouter, PromptRouter
from mixlm.routing.gate_router import GateInputs, load_router
from mixlm.routing.prompt import weights_by_bits
from mixlm.scoring.score import score
from mixlm.scoring.scores import Scores, router_weights, split_holdout, with_leading_prompts

TEXT = GateInputs(("text",))
problems = st.tuples(st.integers(2, 5), st.integers(5, 60), st.integers(0, 10_000))


def random_scores(members: int, segments: int, seed: int) -> Scores:
    rng = np.random.default_rng(seed)
    # Some members much worse than others, so that weights of zero are best as well.
    return made(-rng.gamma(2.0, 1.5, size=(segments, members)) - rng.gamma(0.3, 2.0, size=members))


def optimum(scores: Scores) -> float:
    """The best mean log-likelihood there is, by a solver that knows nothing of mixtures."""
    likelihood = np.exp(scores.logprobs)
    members = likelihood.shape[1]
    optimum = minimize(
        lambda w: -np.log(likelihood @ w).mean(),
        np.full(members, 1 / members),
        jac=lambda w: -(likelihood / (likelihood @ w)[:, None]).mean(axis=0),
        method="SLSQP",
        bounds=[(0, 1)] * members,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    return -float(optimum.fun)


@pytest.mark.slow
@given(problems)
@settings(max_examples=40)
def test_em_never_gets_worse_and_ends_at_the_optimum(problem: tuple[int, int, int]) -> None:
    scores = random_scores(*problem)
    fit = expectation_maximisation(scores)
    assert np.diff(fit.trace).max(initial=0) < 1e-12
    assert fit.weights.sum() == pytest.approx(1)
    assert (fit.weights >= 0).all()
    reached = float(scores.mixture(fit.weights).mean())
    assert fit.converged
    assert reached >= optimum(scores) - 1e-8
    assert fit.trace[-1] == pytest.approx(scores.bits_per_byte(scores.mixture(fit.weights)), abs=1e-12)


@pytest.mark.slow
@given(problems)
@settings(max_examples=20)
def test_em_is_at_least_as_likely_as_every_point_of_the_grid(problem: tuple[int, int, int]) -> None:
    scores = random_scores(*problem)
    best = grid_search(scores, 0.2)
    assert expectation_maximisation(scores).trace[-1] <= min(best.trace) + 1e-8
    assert min(best.trace) == scores.bits_per_byte(scores.mixture(best.weights))


@pytest.mark.parametrize(("members", "step"), [(1, 0.1), (2, 0.1), (3, 0.1), (4, 0.25), (5, 0.2), (3, 1.0), (2, 1 / 3)])
def test_the_grid_is_the_simplex(members: int, step: float) -> None:
    points = list(simplex(members, step))
    parts = round(1 / step)
    assert len(points) == math.comb(parts + members - 1, members - 1)
    assert len({tuple(point) for point in points}) == len(points)
    for point in points:
        assert point.sum() == pytest.approx(1)
        assert (point >= 0).all()
        assert point * parts == pytest.approx(np.round(point * parts))


@pytest.mark.parametrize("step", [0.0, -0.1, 0.3, 1.5, float("nan")])
def test_a_step_that_does_not_divide_one_is_refused(step: float) -> None:
    with pytest.raises(ConfigError, match="must divide 1"):
        list(simplex(2, step))


def test_a_grid_of_too_many_points_is_refused() -> None:
    with pytest.raises(ConfigError, match="larger step"):
        list(simplex(6, 0.01))


def test_text_that_no_member_can_write_is_refused_by_its_words() -> None:
    scores = made(np.array([[-1.0, -2.0], [-np.inf, -np.inf]]), text=b"ab")
    with pytest.raises(ConfigError, match="no member can write 'b'"):
        expectation_maximisation(scores)


def test_very_small_probabilities_do_no_harm() -> None:
    scores = made(np.array([[-2000.0, -1.0], [-1.0, -3000.0], [-1500.0, -1500.0]]))
    assert expectation_maximisation(scores).weights == pytest.approx([0.5, 0.5])
    assert expectation_maximisation(made(np.array([[-2000.0, -1.0]] * 3))).weights == pytest.approx([0, 1], abs=1e-6)


LETTERS = [b"a", b"b", b"c", b"d"]


def writer(seed: int) -> ToyEngine:
    """A toy that writes four letters and nothing else, so that its texts have one reading."""
    plain = table(len(LETTERS) + 2, seed, order=1)

    def letters(context: tuple[int, ...]) -> np.ndarray:
        logits = plain(context).copy()
        logits[len(LETTERS) :] = -np.inf
        return logits

    return ToyEngine(LETTERS, letters)


@pytest.fixture(scope="module")
def sampled() -> tuple[np.ndarray, Scores]:
    """A text that a mixture of known weights wrote, scored."""
    ensemble = make_ensemble([writer(seed) for seed in (1, 2, 3)], [0.55, 0.3, 0.15])
    text = ensemble.generate("", raw=True, max_tokens=3500, seed=4, temperature=1.0, top_k=0).text
    return ensemble.weights, score(ensemble, text)


@pytest.mark.slow
def test_weights_are_recovered_within_their_intervals(sampled: tuple[np.ndarray, Scores]) -> None:
    weights, scores = sampled
    intervals = bootstrap(scores, rounds=150, level=0.99)
    fit = expectation_maximisation(scores)
    for low, weight, fitted, high in zip(intervals[:, 0], weights, fit.weights, intervals[:, 1], strict=True):
        assert low <= weight <= high
        assert low <= fitted <= high
        assert 0 < high - low < 0.25


@pytest.mark.slow
def test_intervals_shrink_with_more_text_and_repeat_with_the_seed(sampled: tuple[np.ndarray, Scores]) -> None:
    _, scores = sampled
    quarter = scores.select(np.arange(len(scores.ends) // 4))
    short, long = (np.ptp(bootstrap(part, rounds=80), axis=1).mean() for part in (quarter, scores))
    assert long < short
    assert (bootstrap(scores, rounds=10) == bootstrap(scores, rounds=10)).all()
    assert (bootstrap(scores, rounds=10) != bootstrap(scores, rounds=10, seed=1)).any()


def test_a_short_text_gives_wide_intervals() -> None:
    intervals = bootstrap(random_scores(2, 30, seed=3), rounds=60)
    assert (np.ptp(intervals, axis=1) > 0.1).all()
    assert ((intervals >= 0) & (intervals <= 1)).all()
    assert bootstrap(made(np.array([[-1.0, -2.0]])), rounds=5).shape == (2, 2)


def kinds(seed: int, count: int = 1500) -> list[Scores]:
    """Two kinds of text, letters and digits; one member knows one of them, the other the other."""
    rng = np.random.default_rng(seed)
    out = []
    for kind, alphabet in enumerate((b"abcdefgh ", b"0123456789 ")):
        text = bytes(rng.choice(list(alphabet), size=count).tolist())
        lps = -rng.gamma(2.0, 1.0, size=(count, 2)) - 0.01
        lps[:, 1 - kind] -= 2.0
        out.append(made(lps, text=text))
    return out


@pytest.mark.slow
def test_a_router_beats_any_fixed_weights_on_two_kinds_of_text() -> None:
    seen: list[tuple[int, int]] = []
    router = train_gate(kinds(0), TEXT, progress=lambda *now: seen.append(now))
    fresh = kinds(1)
    routed = sum(scores.mixture(router_weights(scores, router)).sum() for scores in fresh)
    fixed = max(sum(scores.mixture(weights).sum() for scores in fresh) for weights in simplex(2, 0.01))
    assert routed > fixed + 500
    assert seen == [(1, 4), (2, 4), (3, 4)]
    letters, digits = (router_weights(scores, router)[200:].mean(axis=0) for scores in fresh)
    assert letters[0] > 0.8
    assert digits[1] > 0.8


def test_where_there_is_nothing_to_learn_the_router_is_near_fixed_weights() -> None:
    rng = np.random.default_rng(0)
    texts = [made(-rng.gamma(2.0, 1.0, size=(1500, 2)), text=bytes(rng.integers(32, 127, 1500).tolist())) for _ in "ab"]
    train, fresh = texts
    router = train_gate([train], TEXT)
    loss = fresh.bits_per_byte(fresh.mixture(router_weights(fresh, router)))
    plain = fresh.bits_per_byte(fresh.mixture(expectation_maximisation(train).weights))
    assert loss < plain * 1.01


def test_a_router_saved_and_loaded_gives_the_same_weights(tmp_path: Path) -> None:
    router = train_gate(kinds(0, 300), TEXT)
    assert isinstance(router, LearnedRouter)
    router.save(tmp_path / "router.json")
    again = load_router(tmp_path / "router.json")
    assert again.names == router.names
    scores = kinds(1, 300)[0]
    assert (router_weights(scores, again) == router_weights(scores, router)).all()


def test_a_router_wants_texts_of_the_same_members() -> None:
    with pytest.raises(ConfigError, match="different members"):
        train_gate([made(np.zeros((4, 2))), made(np.zeros((4, 3)))], TEXT)


def test_a_study_fits_on_one_part_and_checks_on_the_other() -> None:
    files = dict(zip(("letters", "digits"), kinds(0), strict=True))
    result = study(files, FitPlan(bootstrap=20, step=0.1, router=True, given=np.array([0.2, 0.8])))
    assert [row.name for row in result.rows] == [
        "m0", "m1", "equal weights", "weights as given", "EM", "grid", "EM, each file by itself", "router",
    ]  # fmt: skip
    train = {name: split_holdout(path, 0.5)[0] for name, path in files.items()}
    for name, scores in train.items():
        assert (result.train[name].ends == scores.ends).all()
        assert result.train[name].size + result.check[name].size == files[name].size
    rows = {row.name: row for row in result.rows}
    digits = result.check["digits"]
    assert rows["EM"].by_file[1] == pytest.approx(digits.bits_per_byte(digits.mixture(result.em.weights)))
    assert rows["m1"].by_file[1] == pytest.approx(digits.bits_per_byte(digits.logprobs[:, 1]))
    assert rows["router"].overall < rows["EM"].overall < result.best_member.overall
    assert result.percent_below(result.best_member) == 0
    share = rows["EM"].overall / result.best_member.overall
    assert result.percent_below(rows["EM"]) == pytest.approx(100 * (1 - share))
    assert result.passes(2) == (4, 44)
    form = result.as_dict(2)
    assert form["grid"]["points"] == 11
    assert sum(form["weights"].values()) == pytest.approx(1)


def test_without_a_held_out_part_the_check_is_on_the_fit_itself() -> None:
    scores = kinds(0)[0]
    result = study({"all": scores}, FitPlan(holdout=0, bootstrap=0))
    assert not result.held_out
    assert result.intervals is None
    assert result.grid is None
    assert result.check["all"].size == scores.size
    assert [row.name for row in result.rows] == ["m0", "m1", "equal weights", "EM"]


def test_the_sharpness_of_weights_by_prompt_is_recovered() -> None:
    rng = np.random.default_rng(3)
    weights, passages, length = np.array([0.4, 0.6]), 60, 40
    bits = rng.uniform(0, 1, size=(passages, 2))
    lam = np.array([weights_by_bits(weights, passage_bits, 2.0) for passage_bits in bits])
    likelihood = rng.dirichlet([0.2, 0.2], size=(passages, length)) + 1e-3
    # Each segment is kept as often as the mixture by prompt says it is written.
    chosen = rng.uniform(size=(passages, length)) < (lam[:, None] * likelihood).sum(axis=2)
    owners, _ = np.nonzero(chosen)
    scores = made(np.log(likelihood[chosen]), begins=np.searchsorted(owners, owners).tolist())
    fitted, sharpness = fit_by_prompt(replace(scores, prompt_bits=bits[owners]), weights)
    assert sharpness in (1.0, 2.0, 4.0)
    assert isinstance(fitted, PromptRouter)
    assert fit_by_prompt(scores, weights)[1] == 0.0


def test_the_beginning_of_a_passage_becomes_its_prompt() -> None:
    text = b"abcdefgh" + b"klmn"
    logprobs = -np.arange(1.0, 25.0).reshape(12, 2)
    scores = made(logprobs, text=text, begins=[0] * 8 + [8] * 4)
    result = with_leading_prompts(scores, 3)
    assert result.strings() == list("defghmn")
    assert result.passage_starts.tolist() == [0] * 5 + [8] * 2
    # Three bytes of the first passage, half of the second.
    assert result.prompt_bits[0] == pytest.approx(-logprobs[:3].sum(axis=0) / np.log(2) / 3)
    assert result.prompt_bits[-1] == pytest.approx(-logprobs[8:10].sum(axis=0) / np.log(2) / 2)
    assert with_leading_prompts(result, 3).strings() == result.strings()
    assert with_leading_prompts(scores, 0).strings() == scores.strings()
