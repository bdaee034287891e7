"""Training of a gate, whatever it decides.

A linear gate of few inputs is trained on all items at once, by L-BFGS (Liu and Nocedal, 1989). Of many inputs, or with
an inner layer, small steps generalise better: mini-batches by Adam (Kingma and Ba, 2015) with decoupled weight decay
(Loshchilov and Hutter, 2019). The penalty on its coefficients and the number of rounds (iterations of L-BFGS, epochs of
Adam) are chosen on items that the gate has not seen; then it is trained on all of them. Where there are too few to hold
any out, a linear gate of few inputs takes the largest penalty and all iterations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, Protocol

import numpy as np

from mixlm.core.sampling import softmax
from mixlm.errors import ConfigError
from mixlm.routing.gate import Array, Gate
from mixlm.scoring.scores import Scores, concatenate, split_holdout
from mixlm.types import Floats, Ids

GateKind = Literal["linear", "mlp"]
WIDTH = 64  # of the inner layer
PENALTIES = (5e-4, 5e-3, 5e-2)  # of L-BFGS: nats an item, times the squares of the coefficients
DECAYS = (0.0, 3.0, 30.0)  # of Adam: weight decay of an update, in units of the learning rate
_FEW = 128  # inputs
_ITERATIONS = 200
_EPOCHS = 40
_PATIENCE = 5  # iterations or epochs without a gain on the items that are held out
# Learning rates, over the root of the number of inputs: Adam moves every coefficient by about as much in a step, those
# of inputs that say nothing too, and with many of them larger steps fit noise before they fit anything else.
_RATES = {"linear": 3e-3, "mlp": 2e-3}
_BATCH = 256  # items
_MIN_UPDATES = 64  # of an epoch: of few items it goes through them several times
_LEAST_SCALE = 0.05  # added to an input's standard deviation: one that hardly varies would be magnified
_VALIDATION = 0.25  # of each text
_MIN_SEGMENTS = 16
_ITEMS = 8192  # whose inner layer is in memory at once


ARRAYS = ("linear", "bias", "inner", "inner_bias", "outer")  # of a gate, that training changes
Loss = Callable[[Floats, slice | Ids], tuple[float, Floats]]


class Objective(NamedTuple):
    """What a gate is trained on.

    Attributes:
        inputs: Of each item, float32 (items, …, inputs).
        loss: Returns the losses of some of the items in nats, together, and their gradient with respect to the
            gate's scores; from the gate's weights for them, float64 (items, …, members), and which they are.
    """

    inputs: Array
    loss: Loss


def train_with_validation(
    scores: Sequence[Scores],
    objective: Callable[[Scores], Objective],
    weights: Floats,
    kind: GateKind,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Gate:
    """Return a gate with the penalty and the number of rounds that are best for held-out text, trained on all of it.

    With too little text to hold any out, a linear gate of few inputs takes the largest penalty and all iterations.

    Args:
        scores: Texts scored by the same members; the last quarter of each is held out first.
        objective: Returns what is minimised on scored text.
        weights: What it begins with, float64 (members,).
        kind: A linear gate, or one with an inner layer of `WIDTH` tanh units.
        seed: Of the inner layer.
        progress: Called with the trainings done, and their number.

    Raises:
        ConfigError: There is too little text for a gate of many inputs, or with an inner layer.
    """
    whole = objective(concatenate(scores))
    parts = [split_holdout(part, _VALIDATION) for part in scores if part.is_divisible]
    few = kind == "linear" and whole.inputs.shape[-1] <= _FEW
    if sum(len(part.ends) for part, _ in parts) < _MIN_SEGMENTS:
        if few:
            return _by_lbfgs(whole, _untrained(whole, weights, kind, seed), PENALTIES[-1], _ITERATIONS)
        raise ConfigError("there is too little text to train a gate", "give texts of a few kilobytes, better of many")
    train, check = (objective(concatenate(side)) for side in zip(*parts, strict=True))
    fit, penalties, max_rounds = (_by_lbfgs, PENALTIES, _ITERATIONS) if few else (_by_adam, DECAYS, _EPOCHS)
    trials: list[tuple[float, float, int]] = []
    for penalty in penalties:
        losses = _watched(fit, train, check, _untrained(train, weights, kind, seed), penalty, max_rounds)
        trials.append((min(losses), penalty, int(np.argmin(losses))))
        if progress is not None:
            progress(len(trials), len(penalties) + 1)
    _, penalty, best_rounds = min(trials)
    gate = _untrained(whole, weights, kind, seed)
    return fit(whole, gate, penalty, best_rounds) if best_rounds else gate


class _Fit(Protocol):
    def __call__(
        self,
        objective: Objective,
        gate: Gate,
        penalty: float,
        rounds: int,
        watch: Callable[[Gate], None] | None = None,
        /,
    ) -> Gate: ...


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


def _watched(fit: _Fit, train: Objective, check: Objective, gate: Gate, penalty: float, max_rounds: int) -> list[float]:
    """Train until what is held out no longer gains. Returns its loss before and after each round."""
    inputs = gate.standardised(check.inputs)
    losses = [gradients(gate, inputs, check.loss)[0]]

    def watch(trained: Gate) -> None:
        losses.append(gradients(trained, inputs, check.loss)[0])
        if len(losses) - int(np.argmin(losses)) > _PATIENCE:
            raise StopIteration

    fit(train, gate, penalty, max_rounds, watch)
    return losses


def _by_lbfgs(
    objective: Objective, gate: Gate, penalty: float, iterations: int, watch: Callable[[Gate], None] | None = None
) -> Gate:
    """Return a linear gate trained further. watch: called with the gate after each iteration; StopIteration ends it."""
    from scipy.optimize import minimize

    x, size = gate.standardised(objective.inputs), gate.linear.size

    def trained(flat: Floats) -> Gate:
        linear, bias = np.split(flat.astype(np.float32), [size])
        return replace(gate, linear=linear.reshape(gate.linear.shape), bias=bias)

    def loss(flat: Floats) -> tuple[float, Floats]:
        value, slopes = gradients(trained(flat), x, objective.loss)
        slope = np.concatenate([slopes["linear"].ravel(), slopes["bias"]])
        slope[:size] += 2 * penalty * flat[:size]
        return value + penalty * float(flat[:size] @ flat[:size]), slope

    start = np.concatenate([gate.linear.ravel(), gate.bias]).astype(np.float64)
    callback = None if watch is None else lambda flat: watch(trained(flat))
    return trained(
        minimize(loss, start, jac=True, method="L-BFGS-B", callback=callback, options={"maxiter": iterations}).x
    )


def _by_adam(
    objective: Objective, gate: Gate, decay: float, epochs: int, watch: Callable[[Gate], None] | None = None
) -> Gate:
    """Return a gate trained further. watch: called with the gate after each epoch; StopIteration ends it."""
    x, rng = gate.standardised(objective.inputs), np.random.default_rng(0)
    rate = _RATES["mlp" if gate.outer.size else "linear"] / float(np.sqrt(x.shape[-1]))
    names = [name for name in ARRAYS if getattr(gate, name).size]
    moments = {name: np.zeros((2, *getattr(gate, name).shape), dtype=np.float32) for name in names}
    passes, updates = -(-_MIN_UPDATES * _BATCH // max(len(x), _BATCH)), 0
    for _ in range(epochs):
        for batch in _batches(len(x), passes, rng):
            _, slopes = gradients(gate, x[batch], lambda shares, items: objective.loss(shares, batch[items]))  # noqa: B023
            updates += 1
            changed = {}
            for name, moment in moments.items():
                slope, value = slopes[name], getattr(gate, name)
                moment[0] += 0.1 * (slope - moment[0])
                moment[1] += 0.001 * (slope * slope - moment[1])
                step = moment[0] / (1 - 0.9**updates) / (np.sqrt(moment[1] / (1 - 0.999**updates)) + 1e-8)
                if not name.endswith("bias"):
                    step += decay * value
                changed[name] = (value - rate * step).astype(np.float32)
            gate = replace(gate, **changed)
        if watch is not None:
            try:
                watch(gate)
            except StopIteration:
                break
    return gate


def _batches(count: int, passes: int, rng: np.random.Generator) -> Iterator[Ids]:
    """Yield the items in batches, in a new order each pass."""
    for _ in range(passes):
        order = rng.permutation(count)
        yield from (order[start : start + _BATCH] for start in range(0, count, _BATCH))


def gradients(gate: Gate, inputs: Array, loss: Loss) -> tuple[float, dict[str, Floats]]:
    """Return the loss of an item in nats, averaged over all of them, and its gradient with respect to each array.

    Args:
        gate: The gate.
        inputs: Standardised, float32 (items, …, inputs).
        loss: As in `Objective`.
    """
    total = 0.0
    sums = {name: np.zeros(getattr(gate, name).shape) for name in ARRAYS}
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
