"""The strength of a combination rule, and its weights, from data: those that make text the most likely under the rule.

A likelihood under a rule needs the members' whole distributions at every position, so each grid is one pass of the
members over the text, in which every point of it is scored (`scoring/rule_scores`). Strengths are searched on the
rule's grid at the given weights, then weights on the simplex at that strength, then strengths between the neighbours of
the best one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mixlm.core.combinations import Combination
from mixlm.core.rule_options import build_rule, rule_name
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.fitting.likelihood import simplex
from mixlm.scoring.passages import Passage
from mixlm.scoring.rule_scores import RuleScorer
from mixlm.terminal import Progress
from mixlm.types import Floats

# The strengths that are tried, by rule; a product of n members has the strength n.
_STRENGTHS: Mapping[str, Sequence[float]] = {
    "geometric": (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0),
    "power": (-2.0, -1.0, -0.5, 0.25, 0.5, 1.0, 2.0, 4.0),
    "contrastive": (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
    "proxy": (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0),
    "guidance": (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0),
    "defer": (0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0),
}
WEIGHTED = ("geometric", "power")  # rules whose weights are fitted
_STEP = 0.1


@dataclass(frozen=True)
class StrengthFit:
    """A fitted rule.

    Attributes:
        name: The rule.
        strength: The strength that makes the training text the most likely.
        weights: The weights at which it does, float64 (members,); those given where the rule has none to fit.
        strengths: Bits per byte of the training text at the strengths that were tried, ascending, with these weights.
        train: Bits per byte of the training text.
        check: Bits per byte of the held-out text; None without one.
        average: Bits per byte of the held-out text, or else of the training text, under the average with the
            weights given; with equal ones for a rule with roles.
        at_edge: Whether the strength is the last of those tried, and the rule allows others beyond it.
    """

    name: str
    strength: float
    weights: Floats
    strengths: tuple[tuple[float, float], ...]
    train: float
    check: float | None
    average: float
    at_edge: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the form that `--json` prints; a strength at which a token is impossible has no bits per byte."""
        return {
            "rule": self.name,
            "strength": self.strength,
            "at_edge": self.at_edge,
            "weights": self.weights.tolist(),
            "strengths": [
                {"strength": strength, "bits_per_byte": bits if math.isfinite(bits) else None}
                for strength, bits in self.strengths
            ],
            "bits_per_byte": {"train": self.train, "check": self.check, "average": self.average},
        }


def check_fittable(rule: Combination) -> None:
    """Raise UnsupportedError for a rule without a strength."""
    if rule.name not in _STRENGTHS:
        raise UnsupportedError(
            f"rule {rule_name(rule)} has no strength to fit", f"the rules with one are {', '.join(_STRENGTHS)}"
        )


def fit_strength(
    ensemble: Ensemble,
    train: Sequence[Passage],
    check: Sequence[Passage] = (),
    *,
    fit_weights: bool = True,
    progress: Progress | None = None,
) -> StrengthFit:
    """Find the strength, and for `geometric` and `power` the weights, that make text the most likely under a rule.

    Args:
        ensemble: The members; the rule and its other parameters are those of its default options.
        train: What is fitted to.
        check: What the fit is judged by.
        fit_weights: Whether weights are fitted, where the rule has some.
        progress: Shows the passes.

    Raises:
        ConfigError: No strength makes the training text possible.
        UnsupportedError: The rule has no strength.
    """
    options = ensemble.defaults
    rule = build_rule(options.rule or "average", options.rule_parameters)
    check_fittable(rule)
    name = rule.name
    weights, size = ensemble.weights, sum(len(passage.data) for passage in train)
    with_weights = fit_weights and name in WEIGHTED
    passes, done = 3 + with_weights, 0

    def bits(passages: Sequence[Passage], variants: Sequence[tuple[Combination, Floats]]) -> Floats:
        nonlocal done
        length = sum(len(passage.data) for passage in passages)
        values: Floats = -RuleScorer(ensemble, variants).logprobs(passages) / math.log(2) / length
        done += 1
        if progress is not None:
            progress("passes over the text", done, passes)
        return values

    def at(strength: float) -> Combination:
        return replace(rule, strength=strength)  # type: ignore[call-arg]

    def search(strengths: Sequence[float]) -> tuple[dict[float, float], float]:
        values = dict(zip(strengths, bits(train, [(at(strength), weights) for strength in strengths]), strict=True))
        best = min(values, key=lambda strength: values[strength])
        if not math.isfinite(values[best]):
            hint = "use --alpha 0" if name == "contrastive" and getattr(rule, "alpha", 0) > 0 else None
            raise ConfigError(f"rule {name} gives some token of the text no probability at any strength", hint)
        return values, best

    if not size:
        raise ConfigError("there is no text to fit to")
    tried, strength = search(_STRENGTHS[name])
    if with_weights:
        points = list(simplex(len(weights), _STEP))
        values = bits(train, [(at(strength), point) for point in points])
        weights = points[int(np.argmin(values))]
        tried = {}
    between, strength = search(_refined(_STRENGTHS[name], strength))
    tried = dict(sorted({**tried, **between}.items()))
    average = build_rule("average", {})
    judged = check or train
    checked, baseline = bits(judged, [(at(strength), weights), (average, ensemble.weights)])
    return StrengthFit(
        name,
        strength,
        weights,
        tuple(tried.items()),
        tried[strength],
        float(checked) if check else None,
        float(baseline),
        _at_edge(rule, strength),
    )


def _at_edge(rule: Combination, strength: float) -> bool:
    """Whether a strength is an end of the rule's grid, and not of the range that the rule allows."""
    strengths = _STRENGTHS[rule.name]
    neighbour = {strengths[0]: strengths[1], strengths[-1]: strengths[-2]}.get(strength)
    if neighbour is None:
        return False
    try:
        replace(rule, strength=2 * strength - neighbour)  # type: ignore[call-arg]
    except ConfigError:
        return False
    return True


def _refined(strengths: Sequence[float], best: float) -> list[float]:
    """Return the best strength and four between it and each neighbour; 0 is none for a power."""
    i = list(strengths).index(best)
    low, high = strengths[max(i - 1, 0)], strengths[min(i + 1, len(strengths) - 1)]
    points = {best, *(best + (end - best) * part / 5 for end in (low, high) for part in range(1, 5))}
    return sorted(round(point, 4) for point in points if abs(point) > 1e-9 or best == 0 or 0 in strengths)
