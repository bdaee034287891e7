"""The statistical proof that strategies sample the law they promise.

`check` draws the first two symbols of many replies with each strategy, and compares their counts with the exact law
`r(u | s) = Σ λ_i (K_i A_i p_i)(u | s)`, or what the unit has in its place (`exact`). The second symbol is compared
jointly with the first: the law of a pair fixes the law of what follows what.

A comparison is Pearson's chi-square test over all outcomes expected at least five times, the others in one cell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mixlm.config import UNITS, Method, supported_methods
from mixlm.core.options import Options
from mixlm.decoding import check_method
from mixlm.ensemble import Ensemble, Prompt
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation.generation import EncodedPrompt
from mixlm.types import Floats
from mixlm.verification.draws import Outcome, drawing, first_symbols
from mixlm.verification.exact import Exact

Progress = Callable[[str, int, int], None]

# A verdict is wrong by chance once in a thousand checks, however many comparisons a check makes.
LEVEL = 0.001


@dataclass(frozen=True, slots=True)
class Comparison:
    """Counts of `left` against `right`, a strategy or "exact". position: 1 for the first symbol, 2 for the first two.

    statistic: chi-square. total_variation: between the two, on all outcomes; expected_total_variation: its mean if both
    follow one law, from simulation.
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
class Reference:
    """Whose law counts as exact: the same members, in another engine perhaps.

    tolerance: the total variation that the two laws may have from each other for each symbol, such as by rounding of
    weights.
    """

    ensemble: Ensemble
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"tolerance is {self.tolerance:g}; it must be 0 or more and less than 1")


@dataclass(frozen=True, slots=True)
class Report:
    """All comparisons of one check; `equal` when every one of them is."""

    comparisons: tuple[Comparison, ...]

    @property
    def equal(self) -> bool:
        """Whether no comparison found a difference."""
        return all(one.equal for one in self.comparisons)

    def as_dict(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        return {"equal": self.equal, "comparisons": [asdict(one) for one in self.comparisons]}


def check(
    ensemble: Ensemble,
    prompt: Prompt,
    *,
    samples: int = 2000,
    options: Options | None = None,
    reference: Reference | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare every strategy that the options allow with the exact law, and mixture with conventional.

    reference: whose law is the exact one; the ensemble's own where it is left out. progress: called with what is being
    drawn, how many are, and how many will be. Raises ConfigError for a reference of other members.
    """
    if samples < 100:
        raise ConfigError(f"samples is {samples}; it must be 100 or more for a test to mean anything")
    given: dict[str, Any] = {"seed": 0, **(options or {})}
    settings = ensemble.settings(**given)
    check_method(settings.method, ensemble.unit.name)
    prompts = ensemble.encode_prompt(prompt, settings)
    reference = reference or Reference(ensemble)
    _check_reference(ensemble, reference.ensemble, prompts, reference.ensemble.encode_prompt(prompt, settings))
    methods: list[Method] = ["mixture", "conventional", "single", "speculative", "greedy"]
    if settings.mix_then_truncate or settings.rule is not None:
        methods = ["conventional"]
    methods = [one for one in methods if one in supported_methods(ensemble.unit.name)]
    pairs: dict[str, list[Outcome]] = {}
    found: list[Comparison] = []
    for number, method in enumerate(methods):
        # The draft is a member, so that guesses are wrong now and then.
        draft = ensemble.names[0] if method == "speculative" else None
        one = replace(settings, method=method, seed=settings.seed + number, draft=draft)
        try:
            writers = drawing(ensemble, one)
        except UnsupportedError:
            if method != "greedy":
                raise
            continue  # its default is a plain average, which not every engine can give; the others have run
        exact = Exact(reference.ensemble, one, prompts)
        greedy = method == "greedy"
        tell = None if progress is None else partial(progress, method)
        drawn = first_symbols(writers, prompts, 1 if greedy else samples, tell)
        if greedy:
            found += _greedy(ensemble, drawn[0], exact, reference.tolerance)
            continue
        pairs[method] = drawn
        compared = [_against_exact(method, ensemble.unit.name, drawn, exact, at) for at in (1, 2)]
        found += [_tolerant(one, reference.tolerance) for one in compared]
    if "conventional" in pairs and "mixture" in pairs:
        found += [_between(ensemble.unit.name, pairs["mixture"], pairs["conventional"], at) for at in (1, 2)]
    return Report(_judged(found))


def check_units(
    ensemble: Ensemble,
    prompt: Prompt,
    *,
    samples: int = 2000,
    options: Options | None = None,
    progress: Progress | None = None,
) -> tuple[Report, dict[str, str]]:
    """Check the ensemble's members in every unit. Returns one report, and why the units that are not in it are not.

    A verdict is wrong by chance as rarely as in the check of one unit. Raises UnsupportedError where no unit is left.
    """
    found: list[Comparison] = []
    left_out: dict[str, str] = {}
    for unit in UNITS[1:]:
        try:
            those = ensemble.with_unit(unit)
            found += check(those, prompt, samples=samples, options=options, progress=progress).comparisons
        except UnsupportedError as error:
            left_out[unit] = error.message
    if not found:
        raise UnsupportedError(f"no unit can be checked: {'; '.join(left_out.values())}")
    return Report(_judged(found)), left_out


def _judged(found: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """Say of each comparison whether it found a difference; of all of them, one is found by chance once in 1/LEVEL."""
    level = LEVEL / len(found)
    return tuple(replace(one, equal=one.p_value >= level) for one in found)


def _check_reference(ensemble: Ensemble, reference: Ensemble, ours: EncodedPrompt, theirs: EncodedPrompt) -> None:
    """Raise ConfigError unless the reference has the same symbols and reads the prompt in the same tokens."""
    alike = (
        len(ensemble.members) == len(reference.members)
        and (ensemble.unit.name, ensemble.unit.end) == (reference.unit.name, reference.unit.end)
        and all(
            np.array_equal(ensemble.unit.symbols(i), reference.unit.symbols(i)) and np.array_equal(one, other)
            for i, (one, other) in enumerate(zip(ours.ids, theirs.ids, strict=True))
        )
    )
    if not alike:
        raise ConfigError(
            f"{', '.join(reference.names)} do not read as {', '.join(ensemble.names)} do",
            "name the same models for the exact law, in the same order",
        )


def _against_exact(name: str, unit: str, drawn: Sequence[Outcome], exact: Exact, position: int) -> Comparison:
    if position == 1:
        law: dict[Outcome, float] = {(int(u),): float(exact.first[u]) for u in np.flatnonzero(exact.first)}
    else:
        law = exact.pairs()
    counts = Counter(one[:position] for one in drawn)
    cells = list(law)
    expected = np.array([*law.values(), max(1 - sum(law.values()), 0.0)])
    observed = np.array([*(counts[cell] for cell in cells), 0])
    observed[-1] = len(drawn) - observed.sum()
    if expected[-1] < 1e-9:
        expected[-1] = 0.0
    expected /= expected.sum()
    statistic, p_value = _chi_square(observed, expected * len(drawn))
    distance = 0.5 * float(np.abs(observed / len(drawn) - expected).sum())
    rng = np.random.default_rng(0)
    simulated = rng.multinomial(len(drawn), expected, size=200) / len(drawn)
    noise = 0.5 * float(np.abs(simulated - expected).sum(axis=1).mean())
    return Comparison(name, "exact", unit, position, len(drawn), statistic, p_value, distance, noise, equal=False)


def _tolerant(found: Comparison, tolerance: float) -> Comparison:
    """Return a comparison that allows the two laws a distance of their own.

    The distance between counts and their law is above its mean by t with probability exp(-2 n t²) at most (McDiarmid).
    """
    if tolerance == 0:
        return found
    above = max(found.total_variation - found.expected_total_variation - tolerance * found.position, 0.0)
    return replace(found, p_value=float(np.exp(-2 * found.samples * above**2)))


def _between(unit: str, left: Sequence[Outcome], right: Sequence[Outcome], position: int) -> Comparison:
    """Compare two sets of draws with each other."""
    a, b = (Counter(one[:position] for one in drawn) for drawn in (left, right))
    cells = sorted({*a, *b})
    counts = np.array([[drawn[cell] for cell in cells] for drawn in (a, b)])
    totals = counts.sum(axis=1, keepdims=True)
    common = counts.sum(axis=0) / counts.sum()
    statistic, p_value = _chi_square(counts, common * totals)
    distance = 0.5 * float(np.abs(counts[0] / totals[0] - counts[1] / totals[1]).sum())
    rng = np.random.default_rng(0)
    one, two = (rng.multinomial(total, common, size=200) / total for total in totals[:, 0])
    noise = 0.5 * float(np.abs(one - two).sum(axis=1).mean())
    return Comparison(
        "mixture", "conventional", unit, position, len(left), statistic, p_value, distance, noise, equal=False
    )


def _chi_square(observed: npt.NDArray[Any], expected: Floats) -> tuple[float, float]:
    """Return Pearson's statistic and p-value; one row of counts against a law, or several against what they share."""
    from scipy.stats import chi2

    rows, wanted = np.atleast_2d(observed), np.atleast_2d(expected)
    if (rows[wanted == 0] > 0).any():
        return float(rows.sum()), 0.0  # something was drawn that cannot be
    usual = wanted.min(axis=0) >= 5
    rows = np.column_stack([rows[:, usual], rows[:, ~usual].sum(axis=1)])
    wanted = np.column_stack([wanted[:, usual], wanted[:, ~usual].sum(axis=1)])
    if wanted[:, -1].min() < 5 and usual.any():
        # Too little is left over for a cell of its own: the rarest of the usual ones takes it in.
        rarest = int(np.argmin(wanted[0, :-1]))
        rows[:, rarest] += rows[:, -1]
        wanted[:, rarest] += wanted[:, -1]
        rows, wanted = rows[:, :-1], wanted[:, :-1]
    freedom = (rows.shape[1] - 1) * max(rows.shape[0] - 1, 1)
    statistic = float(((rows - wanted) ** 2 / wanted).sum())
    return statistic, float(chi2.sf(statistic, freedom)) if freedom else 1.0


def _greedy(ensemble: Ensemble, drawn: Outcome, exact: Exact, tolerance: float) -> list[Comparison]:
    """Compare greedy's choices with the most likely symbols of the exact average: equal, or not."""
    found = []
    for position, symbol in enumerate(drawn, start=1):
        law = exact.law(drawn[: position - 1])
        # Equally likely symbols may be told apart by rounding alone.
        same = bool(law[symbol] >= law.max() * (1 - 1e-5) - 2 * tolerance)
        p_value, distance = float(same), float(not same)
        found.append(
            Comparison("greedy", "exact", ensemble.unit.name, position, 1, distance, p_value, distance, 0.0, equal=same)
        )
    return found
