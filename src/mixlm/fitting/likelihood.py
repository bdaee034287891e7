"""Weights and routers from data: the likelihood of the mixture, maximised.

Everything here works on scored text (`scoring/score`): one forward pass a member, once; after that a fit is a matter
of milliseconds, because the members' log-probabilities do not depend on the weights. The paper searches a grid of
weights (appendix A.3), which needs no derivative and no likelihood, and one evaluation for each of its points.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mixlm.core.mixing import normalized_weights
from mixlm.core.sampling import softmax
from mixlm.errors import ConfigError
from mixlm.routing import PromptRouter
from mixlm.routing.features import FEATURES
from mixlm.routing.learned import LearnedRouter
from mixlm.scoring.scores import Scores, concatenate, context_features, router_weights, split_holdout
from mixlm.types import Floats

_MOST_POINTS = 200_000
# With fewer blocks than this, resampling them says little about how sure a weight is.
_LEAST_BLOCKS = 20
_SHARPNESS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_PENALTIES = (5e-3, 5e-2, 0.5)


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

    def counts(left: int, places: int) -> Iterator[tuple[int, ...]]:
        if places == 1:
            yield (left,)
            return
        for first in range(left + 1):
            for rest in counts(left - first, places - 1):
                yield (first, *rest)

    for count in counts(parts, members):
        yield np.array(count) / parts


def grid_search(scores: Scores, step: float = 0.1) -> tuple[WeightFit, list[tuple[Floats, float]]]:
    """Return the best weights of the grid by likelihood, and bits per byte of every point."""
    start = time.perf_counter()
    points = [(weights, scores.bits_per_byte(scores.mixture(weights))) for weights in simplex(len(scores.names), step)]
    best = min(points, key=lambda point: point[1])
    return WeightFit(best[0], tuple(bits for _, bits in points), True, time.perf_counter() - start), points


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
    routers = {sharpness: PromptRouter(weights, sharpness) for sharpness in _SHARPNESS}
    bits = {
        sharpness: scores.bits_per_byte(scores.mixture(router_weights(scores, router)))
        for sharpness, router in routers.items()
    }
    best = min(bits, key=lambda sharpness: bits[sharpness])
    return routers[best], best


def fit_router(
    scores: Sequence[Scores], *, penalty: float | None = None, progress: Callable[[int, float], None] | None = None
) -> LearnedRouter:
    """Train the gate that makes scored texts most likely: `Σ log Σ_i softmax(W f)_i P_i`, with a squared penalty on W.

    scores: texts scored by the same members. penalty: per segment, on the coefficients of standardised features; the
    constant has none. Left out, it is chosen by the last quarter of each text. progress: called with the round and its
    bits per byte. It starts from EM's weights.
    """
    if penalty is None:
        penalty = _chosen_penalty(scores)
    return _train_router(scores, penalty, progress)


def _chosen_penalty(scores: Sequence[Scores]) -> float:
    """Return the penalty whose gate, trained on the first three quarters of each text, does best on the last ones."""
    parts = [split_holdout(score, 0.25) for score in scores if score.is_divisible]
    if not parts:
        return _PENALTIES[-1]
    first, last = concatenate([part for part, _ in parts]), concatenate([part for _, part in parts])

    def loss(penalty: float) -> float:
        router = _train_router([first], penalty)
        return last.bits_per_byte(last.mixture(router_weights(last, router)))

    return min(_PENALTIES, key=loss)


def _train_router(
    scores: Sequence[Scores], penalty: float, progress: Callable[[int, float], None] | None = None
) -> LearnedRouter:
    from scipy.optimize import minimize

    if any(score.names != scores[0].names for score in scores):
        raise ConfigError("a router is trained on texts that were scored by the same members")
    whole = concatenate(scores)
    raw = context_features(whole)
    centre, scale = raw.mean(axis=0), raw.std(axis=0) + 1e-3
    centre[-1], scale[-1] = 0.0, 1.0  # the constant
    likelihood, top = scaled_likelihood(whole)
    loss = GateLoss((raw - centre) / scale, likelihood, penalty)
    done = 0

    def report(flat: Floats) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, whole.bits_per_byte(np.log(loss.mixed(flat)) + top))

    start = np.zeros((len(whole.names), FEATURES))
    start[:, -1] = np.log(np.maximum(expectation_maximisation(whole).weights, 1e-4))
    optimum = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", callback=report, options={"maxiter": 200})
    # The gate works on features as they are: their standardisation goes into the matrix.
    matrix = optimum.x.reshape(start.shape) / scale
    matrix[:, -1] -= matrix[:, :-1] @ centre[:-1]
    return LearnedRouter(matrix, whole.names)


class GateLoss:
    """Mean negative log-likelihood of segments under a gate, with its penalty; called, it gives value and gradient.

    inputs: standardised features, the constant last, (segments, features). likelihood: (segments, members).
    """

    def __init__(self, inputs: Floats, likelihood: Floats, penalty: float) -> None:
        self._inputs = inputs
        self._likelihood = likelihood
        self._shape = (likelihood.shape[1], inputs.shape[1])
        self._penalties = np.full(inputs.shape[1], penalty)
        self._penalties[-1] = 0.0

    def mixed(self, flat: Floats) -> Floats:
        """Return the likelihood of each segment, (segments,), for a gate's coefficients, flat."""
        out: Floats = (softmax(self._inputs @ flat.reshape(self._shape).T) * self._likelihood).sum(axis=1)
        return out

    def __call__(self, flat: Floats) -> tuple[float, Floats]:
        """Return the loss of a gate's coefficients and its gradient, both flat."""
        matrix = flat.reshape(self._shape)
        shares = softmax(self._inputs @ matrix.T)
        joint = shares * self._likelihood
        total = joint.sum(axis=1, keepdims=True)
        slope = (shares - joint / total).T @ self._inputs / len(self._inputs) + 2 * self._penalties * matrix
        value = -float(np.log(total).mean()) + float((self._penalties * matrix**2).sum())
        return value, slope.ravel()
