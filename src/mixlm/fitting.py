"""Weights and routers from data: the likelihood of the mixture, maximised.

Everything here works on scored text (`mixlm.scoring`): one forward pass a member, once; after that a fit is a matter of
milliseconds, because the members' log-probabilities do not depend on the weights. The paper searches a grid of weights
(appendix A.3), which needs no derivative and no likelihood, and one evaluation for each of its points.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from mixlm.errors import ConfigError
from mixlm.routing.features import FEATURES, features
from mixlm.routing.learned import Learned, gate
from mixlm.sampling import Floats
from mixlm.scoring import Scores, equal_weights


@dataclass(frozen=True)
class Fit:
    """Fitted weights, float64 (members,); bits per byte after each round; whether the rounds converged; seconds."""

    weights: Floats
    trace: tuple[float, ...]
    converged: bool
    seconds: float


def expectation_maximisation(scores: Scores, *, rounds: int = 1000, tolerance: float = 1e-8) -> Fit:
    """Find the weights of the most likely mixture (Dempster, Laird and Rubin, 1977).

    Each round sets a member's weight to its mean responsibility. The likelihood of a mixture is concave in its weights,
    so what it converges to is the best there is. tolerance: gain of a round, in bits per byte, that counts as none.
    """
    start = time.perf_counter()
    trace: list[float] = []
    # Scaling a segment's likelihoods by a constant changes no weight, and keeps exp() in range.
    top = scores.logprobs.max(axis=1, keepdims=True)
    likelihood = np.exp(scores.logprobs - top)
    weights = equal_weights(scores)
    for _ in range(rounds):
        joint = likelihood * weights
        total = joint.sum(axis=1, keepdims=True)
        trace.append(scores.bits_per_byte(np.log(total) + top))
        if len(trace) > 1 and trace[-2] - trace[-1] < tolerance:
            return Fit(weights, tuple(trace), True, time.perf_counter() - start)
        weights = (joint / total).mean(axis=0)
    return Fit(weights, tuple(trace), False, time.perf_counter() - start)


def simplex(members: int, step: float = 0.1) -> Iterator[Floats]:
    """Yield every vector of weights that are multiples of `step` and sum to 1: the paper's grid."""
    parts = round(1 / step)
    if parts < 1 or abs(parts * step - 1) > 1e-9:
        raise ConfigError(f"the grid's step is {step}; it must divide 1, as 0.1 or 0.05 do")
    for counts in product(range(parts + 1), repeat=members - 1):
        if sum(counts) <= parts:
            yield np.array([*counts, parts - sum(counts)]) / parts


def grid_search(scores: Scores, step: float = 0.1) -> tuple[Fit, list[tuple[Floats, float]]]:
    """Return the best weights of the grid by likelihood, and bits per byte of every point."""
    start = time.perf_counter()
    points = [(weights, scores.bits_per_byte(scores.mixture(weights))) for weights in simplex(len(scores.names), step)]
    best = min(points, key=lambda point: point[1])
    return Fit(best[0], tuple(bits for _, bits in points), True, time.perf_counter() - start), points


def bootstrap(
    scores: Scores, *, rounds: int = 200, level: float = 0.95, block: int = 64, seed: int = 0
) -> npt.NDArray[np.float64]:
    """Return an interval for each weight, float64 (members, 2), by refitting on resampled text.

    Text is resampled in blocks of `block` neighbouring segments, since neighbours are alike.
    """
    rng = np.random.default_rng(seed)
    count = max(len(scores.ends) // block, 1)
    blocks = np.array_split(np.arange(len(scores.ends)), count)
    found = []
    for _ in range(rounds):
        chosen = np.concatenate([blocks[i] for i in rng.integers(count, size=count)])
        found.append(expectation_maximisation(scores.part(chosen), rounds=200, tolerance=1e-6).weights)
    low, high = (1 - level) / 2, (1 + level) / 2
    return np.quantile(np.array(found), [low, high], axis=0).T


def joined(scores: Sequence[Scores]) -> Scores:
    """Return several scored texts as one."""
    offsets = np.cumsum([0, *(len(one.text) for one in scores)])
    numbers = np.cumsum([0, *(int(one.passages.max()) + 1 for one in scores)])
    return Scores(
        scores[0].names,
        scores[0].unit,
        b"".join(one.text for one in scores),
        np.concatenate([one.ends + offset for one, offset in zip(scores, offsets, strict=False)]),
        np.concatenate([one.starts + offset for one, offset in zip(scores, offsets, strict=False)]),
        np.concatenate([one.logprobs for one in scores]),
        np.concatenate([one.passages + number for one, number in zip(scores, numbers, strict=False)]),
    )


def halves(scores: Scores) -> tuple[Scores, Scores]:
    """Split scored text into its first and its second half, by passages where there are several, else by segments."""
    count = int(scores.passages.max()) + 1
    first = scores.passages < (count + 1) // 2 if count > 1 else np.arange(len(scores.ends)) < len(scores.ends) // 2
    return scores.part(first), scores.part(~first)


def context_features(scores: Scores) -> Floats:
    """Return the features of the text before each segment, within its passage: float64 (segments, FEATURES)."""
    out = np.empty((len(scores.ends), FEATURES))
    for number in np.unique(scores.passages):
        rows = scores.passages == number
        starts, ends = scores.starts[rows], scores.ends[rows]
        begin = starts.min()
        out[rows] = features(scores.text[begin : ends.max()], starts - begin)
    return out


def fit_router(
    scores: Sequence[Scores], *, penalty: float = 3e-3, progress: Callable[[int, float], None] | None = None
) -> Learned:
    """Train the gate that makes scored texts most likely: `Σ log Σ_i softmax(W f)_i P_i`, with a squared penalty on W.

    scores: texts scored by the same members. penalty: per segment, on the coefficients of standardised features; the
    constant has none. progress: called with the round and its bits per byte. It starts from EM's weights.
    """
    from scipy.optimize import minimize

    names = scores[0].names
    if any(one.names != names for one in scores):
        raise ConfigError("a router is trained on texts that were scored by the same members")
    raw = np.concatenate([context_features(one) for one in scores])
    centre, scale = raw.mean(axis=0), raw.std(axis=0) + 1e-3
    centre[-1], scale[-1] = 0.0, 1.0  # the constant
    inputs = (raw - centre) / scale
    logprobs = np.concatenate([one.logprobs for one in scores])
    top = logprobs.max(axis=1, keepdims=True)
    likelihood = np.exp(logprobs - top)
    size = sum(one.size for one in scores)
    shape = (len(names), FEATURES)
    penalties = np.full(FEATURES, penalty)
    penalties[-1] = 0.0
    done = 0

    def loss(flat: Floats) -> tuple[float, Floats]:
        matrix = flat.reshape(shape)
        shares = gate(inputs, matrix)
        joint = shares * likelihood
        total = joint.sum(axis=1, keepdims=True)
        slope = (shares - joint / total).T @ inputs / len(inputs) + 2 * penalties * matrix
        value = -float(np.log(total).mean()) + float((penalties * matrix**2).sum())
        return value, slope.ravel()

    def report(flat: Floats) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            mixed = np.log((gate(inputs, flat.reshape(shape)) * likelihood).sum(axis=1)) + top[:, 0]
            progress(done, float(-mixed.sum() / np.log(2) / size))

    start = np.zeros(shape)
    start[:, -1] = np.log(np.maximum(expectation_maximisation(joined(scores)).weights, 1e-4))
    found = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", callback=report, options={"maxiter": 500})
    # The gate works on features as they are: their standardisation goes into the matrix.
    matrix = found.x.reshape(shape) / scale
    matrix[:, -1] -= matrix[:, :-1] @ centre[:-1]
    return Learned(matrix, names)


def routed(scores: Scores, router: Learned) -> Floats:
    """Return the log-probability of each segment under the mixture that a gate routes: float64 (segments,)."""
    return scores.mixture(gate(context_features(scores), router.matrix))
