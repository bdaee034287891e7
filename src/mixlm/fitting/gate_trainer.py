"""Training of a gate, whatever it decides: the loss of all items, minimised by L-BFGS (Liu and Nocedal, 1989).

How much its coefficients are penalised, and how many iterations it takes, is chosen on items that the gate has not
seen; then it is trained on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np

from mixlm.core.sampling import softmax
from mixlm.errors import ConfigError
from mixlm.routing.gate import Array, Gate
from mixlm.scoring.scores import Scores, concatenate, split_holdout
from mixlm.types import Floats

GateKind = Literal["linear", "mlp"]
WIDTH = 64  # of the inner layer
PENALTIES = (5e-4, 5e-3, 5e-2)  # nats an item, times the squares of the coefficients; the inner layer has none
_ITERATIONS = 200
_PATIENCE = 5  # iterations without a gain on the items that are held out
_LEAST_SCALE = 0.05  # added to an input's standard deviation: one that hardly varies would be magnified
_VALIDATION = 0.25  # of each text
_MIN_SEGMENTS = 16
_ITEMS = 8192  # whose inner layer is in memory at once


class Objective(NamedTuple):
    """What a gate is trained on.

    Attributes:
        inputs: Of each item, float32 (items, …, inputs).
        loss: Returns the losses of a slice of the items in nats, together, and their gradient with respect to the
            gate's scores; from the gate's weights for them, float64 (items, …, members), and the slice.
    """

    inputs: Array
    loss: Callable[[Floats, slice], tuple[float, Floats]]


def train_with_validation(
    scores: Sequence[Scores],
    objective: Callable[[Scores], Objective],
    weights: Floats,
    kind: GateKind,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Gate:
    """Return a gate with the penalty and the iterations that are best for what is held out, trained on all of it.

    Args:
        scores: Texts scored by the same members; the last quarter of each is held out first.
        objective: Returns what is minimised on scored text.
        weights: What it begins with, float64 (members,).
        kind: A linear gate, or one with an inner layer of `WIDTH` tanh units.
        seed: Of the inner layer.
        progress: Called with the trainings done, and their number.

    Raises:
        ConfigError: There is too little text.
    """
    whole = objective(concatenate(scores))
    parts = [split_holdout(part, _VALIDATION) for part in scores if part.is_divisible]
    if sum(len(part.ends) for part, _ in parts) < _MIN_SEGMENTS:
        raise ConfigError("there is too little text to train a gate", "give texts of a few kilobytes, better of many")
    train, check = (objective(concatenate(side)) for side in zip(*parts, strict=True))
    trials: list[tuple[float, float, int]] = []
    for penalty in PENALTIES:
        least, iterations = _trial(train, check, _untrained(train, weights, kind, seed), penalty)
        trials.append((least, penalty, iterations))
        if progress is not None:
            progress(len(trials), len(PENALTIES) + 1)
    _, penalty, iterations = min(trials)
    gate = _untrained(whole, weights, kind, seed)
    return _minimised(whole, gate, penalty, iterations) if iterations else gate


def _untrained(objective: Objective, weights: Floats, kind: GateKind, seed: int) -> Gate:
    """Return the gate with which training begins: one that gives these weights, whatever the inputs."""
    members, count = len(weights), objective.inputs.shape[-1]
    width = WIDTH if kind == "mlp" else 0
    flat = objective.inputs.reshape(-1, count)
    inner = np.random.default_rng(seed).normal(size=(width, count)) / np.sqrt(count)
    return replace(
        Gate.untrained(members, count),
        centre=flat.mean(axis=0, dtype=np.float64).astype(np.float32),
        scale=(flat.std(axis=0, dtype=np.float64) + _LEAST_SCALE).astype(np.float32),
        bias=np.log(np.maximum(weights, 1e-3)).astype(np.float32),
        inner=inner.astype(np.float32),
        inner_bias=np.zeros(width, dtype=np.float32),
        outer=np.zeros((members, width), dtype=np.float32),
    )


def _trial(train: Objective, check: Objective, gate: Gate, penalty: float) -> tuple[float, int]:
    """Train until what is held out no longer gains. Returns its least loss, and after how many iterations."""
    inputs = gate.standardised(check.inputs)
    losses = [gradients(gate, inputs, check.loss)[0]]

    def watch(now: Gate) -> None:
        losses.append(gradients(now, inputs, check.loss)[0])
        if len(losses) - int(np.argmin(losses)) > _PATIENCE:
            raise StopIteration

    _minimised(train, gate, penalty, _ITERATIONS, watch)
    return min(losses), int(np.argmin(losses))


def _minimised(
    objective: Objective, gate: Gate, penalty: float, iterations: int, watch: Callable[[Gate], None] | None = None
) -> Gate:
    """Return a gate trained further. watch: called with the gate after each iteration; StopIteration ends it."""
    from scipy.optimize import minimize

    x = gate.standardised(objective.inputs)
    names = [name for name in ("linear", "bias", "inner", "inner_bias", "outer") if getattr(gate, name).size]
    arrays = [getattr(gate, name) for name in names]
    cuts = np.cumsum([array.size for array in arrays])[:-1]
    penalties = np.repeat([penalty * (name in ("linear", "outer")) for name in names], [a.size for a in arrays])

    def at(flat: Floats) -> Gate:
        parts = zip(names, arrays, np.split(flat, cuts), strict=True)
        return replace(gate, **{name: part.reshape(array.shape).astype(np.float32) for name, array, part in parts})

    def loss(flat: Floats) -> tuple[float, Floats]:
        value, slopes = gradients(at(flat), x, objective.loss)
        slope = np.concatenate([slopes[name].ravel() for name in names])
        return value + float((penalties * flat**2).sum()), slope + 2 * penalties * flat

    start = np.concatenate([array.ravel() for array in arrays]).astype(np.float64)
    callback = None if watch is None else lambda flat: watch(at(flat))
    optimum = minimize(loss, start, jac=True, method="L-BFGS-B", callback=callback, options={"maxiter": iterations})
    return at(optimum.x)


def gradients(
    gate: Gate, inputs: Array, loss: Callable[[Floats, slice], tuple[float, Floats]]
) -> tuple[float, dict[str, Floats]]:
    """Return the loss of an item in nats, averaged over all of them, and its gradient with respect to each array.

    Args:
        gate: The gate.
        inputs: Standardised, float32 (items, …, inputs).
        loss: As in `Objective`.
    """
    total = 0.0
    sums = {name: np.zeros(getattr(gate, name).shape) for name in ("linear", "bias", "inner", "inner_bias", "outer")}
    for start in range(0, len(inputs), _ITEMS):
        items = slice(start, start + _ITEMS)
        x = inputs[items].reshape(-1, inputs.shape[-1])
        inner = np.tanh(x @ gate.inner.T + gate.inner_bias)
        shares = softmax(x @ gate.linear.T + gate.bias + inner @ gate.outer.T)
        value, slopes = loss(shares.reshape(*inputs[items].shape[:-1], -1), items)
        total += value
        slope = slopes.reshape(shares.shape).astype(np.float32)
        back = (slope @ gate.outer) * (1 - inner * inner)
        sums["linear"] += slope.T @ x
        sums["bias"] += slope.sum(axis=0)
        sums["inner"] += back.T @ x
        sums["inner_bias"] += back.sum(axis=0)
        sums["outer"] += slope.T @ inner
    return total / len(inputs), {name: array / len(inputs) for name, array in sums.items()}
