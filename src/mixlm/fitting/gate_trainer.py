"""Training of a gate by stochastic gradients, whatever it decides.

Mini-batches by Adam (Kingma and Ba, 2015) with decoupled weight decay (Loshchilov and Hutter, 2019). How many epochs
and how much decay is chosen on items that the gate has not seen; then it is trained on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from mixlm.routing.gate import Array, Gate
from mixlm.types import Floats, Ids

GateKind = Literal["linear", "mlp"]
WIDTH = 64  # of the inner layer
DECAYS = (0.0, 3.0, 30.0)  # weight decay of a step, in units of the learning rate
# Learning rates, over the root of the number of inputs: Adam moves every coefficient by about as much in a step, those
# of inputs that say nothing too, and with many of them larger steps fit noise before they fit anything else.
_RATES = {"linear": 3e-3, "mlp": 2e-3}
_BATCH = 256  # items
_MIN_STEPS = 64  # of an epoch: of few items it goes through them several times
_EPOCHS = 40
_PATIENCE = 5  # epochs without a gain on the items that are held out

OnEpoch = Callable[[int, float], None]
Slopes = Callable[[Array], Array]


class Objective(Protocol):
    """What a gate is trained on.

    Attributes:
        inputs: Of each item, float32 (items, …, inputs).
    """

    inputs: Array

    def slopes(self, shares: Array, items: Ids) -> Array:
        """Return the gradient of the mean loss of items with respect to the gate's scores.

        Args:
            shares: The gate's weights for them, float32 (items, …, members).
            items: Their indices, int64 (items,).
        """
        ...

    def loss(self, gate: Gate) -> float:
        """Return the loss of all items, in bits per byte."""
        ...


@dataclass(frozen=True)
class GateChoice:
    """A trained gate, and how it was trained.

    Attributes:
        gate: The gate.
        decay: The weight decay that was chosen.
        epochs: The epochs that were chosen.
        validation: The loss of the items held out after each epoch, with the decay that was chosen.
    """

    gate: Gate
    decay: float
    epochs: int
    validation: tuple[float, ...]


def train_with_validation(
    parts: tuple[Objective, Objective, Objective],
    weights: Floats,
    kind: GateKind,
    *,
    seed: int = 0,
    progress: OnEpoch | None = None,
) -> GateChoice:
    """Return a gate with the decay and the epochs that are best for what is held out, trained on all of it.

    Args:
        parts: What it is trained on first, what is held out to choose the decay and the epochs, and all of that.
        weights: What it begins with, float64 (members,).
        kind: A linear gate, or one with an inner layer of `WIDTH` tanh units.
        seed: Of the batches and the inner layer.
        progress: Called with the epochs so far and the loss of what is held out.
    """
    train, check, whole = parts
    done = 0

    def note(loss: float) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, loss)

    trials = []
    for decay in DECAYS:
        trainer = _Trainer(train, weights, kind, decay, seed)
        trials.append((decay, _validated(trainer, check, note)))
    decay, trace = min(trials, key=lambda trial: min(trial[1]))
    epochs = int(np.argmin(trace))
    final = _Trainer(whole, weights, kind, decay, seed)
    for _ in range(epochs):
        final.epoch()
    return GateChoice(final.gate, decay, epochs, tuple(trace))


def _validated(trainer: _Trainer, check: Objective, note: Callable[[float], None]) -> list[float]:
    """Train until what is held out no longer gains. Returns its loss before and after each epoch."""
    trace = [check.loss(trainer.gate)]
    while len(trace) <= _EPOCHS and len(trace) - 1 - int(np.argmin(trace)) < _PATIENCE:
        trainer.epoch()
        trace.append(check.loss(trainer.gate))
        note(trace[-1])
    return trace


class _Trainer:
    """Adam on mini-batches. gate: as it is now."""

    def __init__(self, objective: Objective, weights: Floats, kind: GateKind, decay: float, seed: int) -> None:
        members, count = len(weights), objective.inputs.shape[-1]
        width = WIDTH if kind == "mlp" else 0
        self._rng = np.random.default_rng(seed)
        # A number that hardly varies says nothing, and would be magnified.
        flat = objective.inputs.reshape(-1, count)
        centre, scale = flat.mean(axis=0), flat.std(axis=0)
        scale = np.where(scale > 1e-3, scale, 1.0)
        self.gate = Gate(
            centre=centre.astype(np.float32),
            scale=scale.astype(np.float32),
            linear=np.zeros((members, count), dtype=np.float32),
            bias=np.log(np.maximum(weights, 1e-3)).astype(np.float32),
            inner=(self._rng.normal(size=(width, count)) / np.sqrt(count)).astype(np.float32),
            inner_bias=np.zeros(width, dtype=np.float32),
            outer=np.zeros((members, width), dtype=np.float32),
        )
        self._objective = objective
        self._x = self.gate.standardised(objective.inputs)
        self._rate, self._decay = _RATES[kind] / float(np.sqrt(count)), decay
        self._names = ("linear", "bias", "inner", "inner_bias", "outer") if width else ("linear", "bias")
        self._first = {name: np.zeros_like(getattr(self.gate, name)) for name in self._names}
        self._second = {name: np.zeros_like(getattr(self.gate, name)) for name in self._names}
        self._steps = 0

    def epoch(self) -> None:
        """Go through all items, in a new order; several times where that is too few steps."""
        batches = -(-len(self._x) // _BATCH)
        for _ in range(-(-_MIN_STEPS // batches)):
            order = self._rng.permutation(len(self._x))
            for start in range(0, len(order), _BATCH):
                batch = order[start : start + _BATCH]
                self._step(gradients(self.gate, self._x[batch], lambda shares: self._objective.slopes(shares, batch)))  # noqa: B023

    def _step(self, slopes: dict[str, Array]) -> None:
        self._steps += 1
        changed = {}
        for name in self._names:
            slope, value = slopes[name], getattr(self.gate, name)
            first, second = self._first[name], self._second[name]
            first += 0.1 * (slope - first)
            second += 0.001 * (slope * slope - second)
            step = first / (1 - 0.9**self._steps) / (np.sqrt(second / (1 - 0.999**self._steps)) + 1e-8)
            if not name.endswith("bias"):
                step += self._decay * value
            changed[name] = (value - self._rate * step).astype(np.float32)
        self.gate = replace(self.gate, **changed)


def gradients(gate: Gate, inputs: Array, slopes: Slopes) -> dict[str, Array]:
    """Return the gradient of a loss with respect to each array of a gate.

    Args:
        gate: The gate.
        inputs: Standardised, (items, …, inputs).
        slopes: The gradient with respect to the scores, from the weights; both (items, …, members).
    """
    x = inputs.reshape(-1, inputs.shape[-1])
    inner = np.tanh(x @ gate.inner.T + gate.inner_bias)
    scores = x @ gate.linear.T + gate.bias + inner @ gate.outer.T
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    slope = slopes(shares.reshape(*inputs.shape[:-1], -1)).reshape(shares.shape)
    back = (slope @ gate.outer) * (1 - inner * inner)
    return {
        "linear": slope.T @ x,
        "bias": slope.sum(axis=0),
        "inner": back.T @ x,
        "inner_bias": back.sum(axis=0),
        "outer": slope.T @ inner,
    }
