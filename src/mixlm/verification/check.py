"""The statistical test that strategies sample the distribution they promise.

`check` samples the first two symbols of many completions with each strategy, and compares their counts with the exact
distribution `r(u | s) = Σ λ_i (K_i A_i p_i)(u | s)`, or the unit's counterpart of it (`exact`). The second symbol is
compared jointly with the first, since the joint distribution determines the conditional one.

A comparison is Pearson's chi-square test over all outcomes that are expected at least five times, the others pooled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mixlm.choices import UNITS, Method
from mixlm.core.options import Options
from mixlm.decoding import check_unit_method
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation.prompt import EncodedPrompt, Prompt
from mixlm.routing.base import observed_by
from mixlm.terminal import Progress
from mixlm.types import Floats
from mixlm.verification.exact import ExactReference
from mixlm.verification.sampling import Outcome, first_symbols, memo_sessions, sampling_contexts

# The significance level of a whole check, however many comparisons it makes.
LEVEL = 0.001


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The comparison of a strategy with another one, or with the exact distribution.

    Args:
        right: Another strategy, or "exact".
        position: 1 for the first symbol, 2 for the first two jointly.
        statistic: Pearson's chi-square.
        total_variation: The distance between the two, on all outcomes.
        expected_total_variation: Its mean if both sample one distribution, by simulation.
        equal: Whether no difference was found.
    """

    left: str
    right: str
    unit: str
    position: int
    samples: int
    statistic: float
    p_value: float
    total_variation: float
    expected_total_variation: float
    equal: bool


@dataclass(frozen=True, slots=True)
class ReferenceSetup:
    """The ensemble whose distribution counts as exact: the same members, possibly in another engine.

    tolerance: the total variation per symbol that is allowed between the two, such as by rounding of weights.
    """

    ensemble: Ensemble
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"tolerance is {self.tolerance:g}; it must be 0 or more and less than 1")


@dataclass(frozen=True, slots=True)
class CheckReport:
    """All comparisons of a check; `equal` when every one of them is."""

    comparisons: tuple[CheckResult, ...]

    @property
    def equal(self) -> bool:
        """Whether no comparison found a difference."""
        return all(comparison.equal for comparison in self.comparisons)

    def as_dict(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        return {"equal": self.equal, "comparisons": [asdict(comparison) for comparison in self.comparisons]}


def check(
    ensemble: Ensemble,
    prompt: Prompt,
    *,
    samples: int = 2000,
    options: Options | None = None,
    reference: ReferenceSetup | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Compare every strategy that the options allow with the exact distribution, and one with conventional.

    That is `mixture` for the average and `layered` for other rules.

    Args:
        ensemble: The ensemble.
        prompt: The prompt.
        samples: The number of completions per strategy.
        options: Generation options.
        reference: Whose distribution is the exact one; None for the ensemble's own.
        progress: Called with the strategy, the number of samples so far, and of all.

    Raises:
        ConfigError: The reference has other members.
    """
    if samples < 100:
        raise ConfigError(f"samples is {samples}; it must be 100 or more for a test to mean anything")
    full_options: dict[str, Any] = {"seed": 0, **(options or {})}
    settings = ensemble.settings(**full_options)
    check_unit_method(settings.method, ensemble.unit.name)
    prompts = ensemble.encode_prompt(prompt, settings)
    reference = reference or ReferenceSetup(ensemble)
    _check_reference(ensemble, reference.ensemble, prompts, reference.ensemble.encode_prompt(prompt, settings))
    methods: list[Method] = ["mixture", "conventional", "single", "speculative", "layered", "greedy"]
    if settings.rule is not None:
        methods = ["conventional", "layered", "greedy"]
    if observed_by(ensemble.router) is not None:
        methods.remove("layered")  # which takes no router that observes a member
    methods = [method for method in methods if method in ensemble.unit.traits.methods]
    sampled: dict[str, list[Outcome]] = {}
    results: list[CheckResult] = []
    exact_references: dict[str, ExactReference] = {}
    memos = memo_sessions(ensemble)
    for number, method in enumerate(methods):
        # A member drafts, so that some drafts are rejected.
        draft = ensemble.names[0] if method in ("speculative", "layered") else None
        method_settings = replace(settings, method=method, seed=settings.seed + number, draft=draft)
        try:
            contexts = sampling_contexts(ensemble, method_settings, memos)
        except UnsupportedError:
            if method != "greedy":
                raise
            continue  # it needs whole distributions, which not every engine has
        # All methods but these sample one distribution, whose forwards are most of a check.
        distribution = method if method in ("single", "greedy") else "sampled"
        if distribution not in exact_references:
            exact_references[distribution] = ExactReference(reference.ensemble, method_settings, prompts)
        exact = exact_references[distribution]
        greedy = method == "greedy"
        report = None if progress is None else partial(progress, method)
        outcomes = first_symbols(contexts, prompts, 1 if greedy else samples, report)
        if greedy:
            results += _greedy(ensemble, outcomes[0], exact, reference.tolerance)
            continue
        sampled[method] = outcomes
        for position in (1, 2):
            result = _against_exact(method, ensemble.unit.name, outcomes, exact, position)
            results.append(_with_tolerance(result, reference.tolerance))
    other = "mixture" if settings.rule is None else "layered"
    if "conventional" in sampled and other in sampled:
        texts = sampled[other], sampled["conventional"]
        results += [_between(ensemble.unit.name, other, *texts, position) for position in (1, 2)]
    return CheckReport(_adjusted(results))


def check_units(
    ensemble: Ensemble,
    prompt: Prompt,
    *,
    samples: int = 2000,
    options: Options | None = None,
    progress: Progress | None = None,
) -> tuple[CheckReport, dict[str, str]]:
    """Check the ensemble's members in every unit, at the significance level of a single check.

    Returns:
        The report, and the reason for each unit that is not in it.

    Raises:
        UnsupportedError: No unit can be checked.
    """
    results: list[CheckResult] = []
    left_out: dict[str, str] = {}
    for unit in UNITS[1:]:
        try:
            with_unit = ensemble.with_unit(unit)
            results += check(with_unit, prompt, samples=samples, options=options, progress=progress).comparisons
        except UnsupportedError as error:
            left_out[unit] = error.message
    if not results:
        raise UnsupportedError(f"no unit can be checked: {'; '.join(left_out.values())}")
    return CheckReport(_adjusted(results)), left_out


def _adjusted(results: Sequence[CheckResult]) -> tuple[CheckResult, ...]:
    """Decide each comparison at the level of all of them together (Bonferroni)."""
    level = LEVEL / len(results)
    return tuple(replace(result, equal=result.p_value >= level) for result in results)


def _check_reference(ensemble: Ensemble, reference: Ensemble, ours: EncodedPrompt, theirs: EncodedPrompt) -> None:
    """Raise ConfigError unless the reference has the same symbols and encodes the prompt in the same tokens."""
    same = (
        len(ensemble.members) == len(reference.members)
        and (ensemble.unit.name, ensemble.unit.end) == (reference.unit.name, reference.unit.end)
        and all(
            np.array_equal(ensemble.unit.symbols(i), reference.unit.symbols(i)) and np.array_equal(own_ids, other_ids)
            for i, (own_ids, other_ids) in enumerate(zip(ours.ids, theirs.ids, strict=True))
        )
    )
    if not same:
        raise ConfigError(
            f"{', '.join(reference.names)} do not read as {', '.join(ensemble.names)} do",
            "name the same models as the reference, in the same order",
        )


def _against_exact(
    name: str, unit: str, outcomes: Sequence[Outcome], exact: ExactReference, position: int
) -> CheckResult:
    if position == 1:
        probabilities: dict[Outcome, float] = {(int(u),): float(exact.first[u]) for u in np.flatnonzero(exact.first)}
    else:
        probabilities = exact.pairs
    counts = Counter(outcome[:position] for outcome in outcomes)
    expected = np.array([*probabilities.values(), max(1 - sum(probabilities.values()), 0.0)])
    observed = np.array([*(counts[cell] for cell in probabilities), 0])
    observed[-1] = len(outcomes) - observed.sum()
    if expected[-1] < 1e-9:
        expected[-1] = 0.0
    return _compared((name, "exact", unit), position, observed[None], expected / expected.sum())


def _with_tolerance(result: CheckResult, tolerance: float) -> CheckResult:
    """Return a comparison that tolerates a distance between the two distributions.

    The distance of counts from their distribution exceeds its mean by t with probability at most exp(-2 n t²)
    (McDiarmid's inequality).
    """
    if tolerance == 0:
        return result
    excess = max(result.total_variation - result.expected_total_variation - tolerance * result.position, 0.0)
    return replace(result, p_value=float(np.exp(-2 * result.samples * excess**2)))


def _between(unit: str, name: str, left: Sequence[Outcome], right: Sequence[Outcome], position: int) -> CheckResult:
    """Compare the samples of a strategy with those of conventional."""
    counters = [Counter(outcome[:position] for outcome in outcomes) for outcomes in (left, right)]
    cells = sorted({cell for counter in counters for cell in counter})
    counts = np.array([[counter[cell] for cell in cells] for counter in counters])
    return _compared((name, "conventional", unit), position, counts, counts.sum(axis=0) / counts.sum())


def _compared(about: tuple[str, str, str], position: int, counts: npt.NDArray[Any], expected: Floats) -> CheckResult:
    """Compare one row of counts with a distribution, or two rows that have a common one.

    about: what is compared with what, and the unit. counts: int64 (rows, outcomes). expected: the distribution, float64
    (outcomes,).
    """
    totals = counts.sum(axis=1, keepdims=True)
    statistic, p_value = _chi_square(counts, expected * totals)
    rng = np.random.default_rng(0)
    simulated = [rng.multinomial(total, expected, size=200) / total for total in totals[:, 0]]

    def distance(shares: Sequence[Floats]) -> Floats:
        other = shares[1] if len(shares) > 1 else expected
        return np.asarray(0.5 * np.abs(shares[0] - other).sum(axis=-1))

    variation, noise = float(distance(list(counts / totals))), float(distance(simulated).mean())
    return CheckResult(*about, position, int(totals[0, 0]), statistic, p_value, variation, noise, equal=False)


def _chi_square(rows: npt.NDArray[Any], expected_rows: Floats) -> tuple[float, float]:
    """Return Pearson's statistic and p-value of one row of counts, or of several rows with a common distribution."""
    from scipy.stats import chi2

    if (rows[expected_rows == 0] > 0).any():
        return float(rows.sum()), 0.0  # something was sampled that cannot be
    usual = expected_rows.min(axis=0) >= 5
    rows = np.column_stack([rows[:, usual], rows[:, ~usual].sum(axis=1)])
    expected_rows = np.column_stack([expected_rows[:, usual], expected_rows[:, ~usual].sum(axis=1)])
    if expected_rows[:, -1].min() < 5 and usual.any():
        # Too few are left over for a cell of their own.
        rarest = int(np.argmin(expected_rows[0, :-1]))
        rows[:, rarest] += rows[:, -1]
        expected_rows[:, rarest] += expected_rows[:, -1]
        rows, expected_rows = rows[:, :-1], expected_rows[:, :-1]
    freedom = (rows.shape[1] - 1) * max(rows.shape[0] - 1, 1)
    statistic = float(((rows - expected_rows) ** 2 / expected_rows).sum())
    return statistic, float(chi2.sf(statistic, freedom)) if freedom else 1.0


def _greedy(ensemble: Ensemble, outcome: Outcome, exact: ExactReference, tolerance: float) -> list[CheckResult]:
    """Compare greedy's choices with the most likely symbols of the exact average: equal, or not."""
    comparisons = []
    for position, symbol in enumerate(outcome, start=1):
        distribution = exact.distribution(outcome[: position - 1])
        # Equally likely symbols may be ordered by rounding alone.
        same = bool(distribution[symbol] >= distribution.max() * (1 - 1e-5) - 2 * tolerance)
        about, other = ("greedy", "exact", ensemble.unit.name), float(not same)
        comparisons.append(CheckResult(*about, position, 1, other, float(same), other, 0.0, equal=same))
    return comparisons
