"""Weights from data: the likelihood of the mixture, maximised.

Everything here works on scored text (`scoring/score`): one forward pass a member, once; after that a fit is a matter
of milliseconds, because the members' log-probabilities do not depend on the weights. The paper searches a grid of
weights (appendix A.3), which needs no derivative and no likelihood, and one evaluation for each of its points.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from mixlm.core.mixing import normalized_weights
from mixlm.errors import ConfigError
from mixlm.routing import PromptRouter
from mixlm.scoring.scores import Scores, router_weights
from mixlm.types import Floats

_MOST_POINTS = 200_000
# With fewer blocks than this, resampling them says little about how sure a weight is.
_LEAST_BLOCKS = 20
_SHARPNESS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


@dataclass(frozen=True)
class WeightFit:
    """Fitted weights, float64 (members,); bits per byte after each round; whether the rounds converged; seconds."""

    weights: Floats
    trace: tuple[float, ...]
    converged: bool
    seconds: float


def expectation_maximisation(scores: Scores, *, rounds: int = 5000, tolerance: float = 1e-9) -> WeightFit:
    """Find the weights of the most likely mixture (Dempster, Laird and Rubin, 1977).

    Each round sets a member's weight to its mean responsibility. The likelihood of a mixture is concave in its weights,
    so what it converges to is the best there is, and a bound says how far it is: the rounds end when no weights can be
    better by more than `tolerance`, in nats a segment. Raises ConfigError for text that no member can write.
    """
    start = time.perf_counter()
    likelihood, top = scaled_likelihood(scores)
    trace: list[float] = []

    def watch(mixed: Floats) -> None:
        trace.append(scores.bits_per_byte(np.log(mixed) + top))

    counts = np.ones(len(likelihood))
    weights, converged = _maximize(likelihood, counts, equal_weights(scores), rounds, tolerance, watch)
    return WeightFit(weights, tuple(trace), converged, time.perf_counter() - start)


def _maximize(
    likelihood: Floats,
    counts: Floats,
    weights: Floats,
    rounds: int,
    tolerance: float,
    watch: Callable[[Floats], None] | None = None,
) -> tuple[Floats, bool]:
    """Run rounds of EM from given weights. counts: how often each segment occurs. Returns weights, converged."""
    total = counts.sum()
    for left in range(rounds - 1, -1, -1):
        mixed = likelihood @ weights
        if watch is not None:
            watch(mixed)
        # The slope of the log-likelihood a segment; times the weights, the mean responsibilities. By concavity its
        # largest entry less one bounds what any other weights could gain.
        slope: Floats = (counts / mixed) @ likelihood / total
        if slope.max() - 1 < tolerance:
            return weights, True
        if left:
            weights = weights * slope
            weights = weights / weights.sum()
    return weights, False


def scaled_likelihood(scores: Scores) -> tuple[Floats, Floats]:
    """Return each segment's likelihoods over the largest of them, (segments, members), and the log of that one.

    Scaling a segment's likelihoods by a constant changes no weight, and keeps exp() in range.
    """
    top = scores.logprobs.max(axis=1)
    impossible = np.flatnonzero(~np.isfinite(top))
    if impossible.size:
        segment = impossible[0]
        if scores.starts[segment] == scores.ends[segment]:
            raise ConfigError("no member can end an answer where one ends", "leave ends out: --no-ends")
        shown = scores.text[scores.starts[segment] : scores.ends[segment]].decode(errors="replace")
        raise ConfigError(f"no member can write {shown!r}, so no weights make the text likely", "leave it out")
    return np.exp(scores.logprobs - top[:, None]), top


def equal_weights(scores: Scores) -> Floats:
    """Return equal weights for the members of scored text."""
    return normalized_weights(None, len(scores.names))


def grid_points(members: int, step: float) -> int:
    """Return how many vectors of weights are multiples of `step`. Raises ConfigError when it does not divide 1."""
    parts = round(1 / step) if 0 < step <= 1 else 0
    if parts < 1 or abs(parts * step - 1) > 1e-9:
        raise ConfigError(f"the grid's step is {step:g}; it must divide 1, as 0.1 or 0.05 do")
    count = math.comb(parts + members - 1, members - 1)
    if count > _MOST_POINTS:
        raise ConfigError(f"a grid of step {step:g} has {count} points for {members} members", "take a larger step")
    return count


def simplex(members: int, step: float = 0.1) -> Iterator[Floats]:
    """Yield every vector of weights that are multiples of `step` and sum to 1: the paper's grid."""
    grid_points(members, step)
    parts = round(1 / step)

    # Bars among stars: between two of them lie the parts of one member.
    for bars in combinations(range(parts + members - 1), members - 1):
        yield (np.diff([-1, *bars, parts + members - 1]) - 1) / parts


def grid_search(scores: Scores, step: float = 0.1) -> WeightFit:
    """Return the best weights of the grid by likelihood. trace: bits per byte of every point."""
    start = time.perf_counter()
    points = list(simplex(len(scores.names), step))
    trace = [scores.bits_per_byte(scores.mixture(weights)) for weights in points]
    return WeightFit(points[int(np.argmin(trace))], tuple(trace), True, time.perf_counter() - start)


def bootstrap(
    scores: Scores, *, rounds: int = 200, level: float = 0.95, block: int = 64, seed: int = 0
) -> npt.NDArray[np.float64]:
    """Return an interval for each weight, float64 (members, 2), by refitting on resampled text.

    Text is resampled in blocks of about `block` neighbouring segments, since neighbours are alike; in shorter ones
    where there would be too few of them.
    """
    rng = np.random.default_rng(seed)
    likelihood, _ = scaled_likelihood(scores)
    segments = len(likelihood)
    count = max(segments // block, min(segments, _LEAST_BLOCKS))
    block_of = np.arange(segments) * count // segments
    # A weight that has become zero would stay zero, so every fit starts a little inside.
    start = 0.98 * expectation_maximisation(scores).weights + 0.02 * equal_weights(scores)
    samples = []
    for _ in range(rounds):
        resampled = np.bincount(rng.integers(count, size=count), minlength=count)
        counts = resampled[block_of].astype(np.float64)
        samples.append(_maximize(likelihood, counts, start, 1000, 1e-7)[0])
    low, high = (1 - level) / 2, (1 + level) / 2
    return np.quantile(np.array(samples), [low, high], axis=0).T


def fit_by_prompt(scores: Scores, weights: Floats) -> tuple[PromptRouter, float]:
    """Return weights by prompt whose sharpness makes scored text most likely, and that sharpness.

    weights: those that are scaled, float64 (members,). Text without prompts says nothing about it.
    """

    def bits(sharpness: float) -> float:
        return scores.bits_per_byte(scores.mixture(router_weights(scores, PromptRouter(weights, sharpness))))

    best = min(_SHARPNESS, key=bits)
    return PromptRouter(weights, best), best
