"""Training of gates: the mixture's own log-likelihood on scored text, maximised by stochastic gradients.

The loss of a segment is `-log Σ_i w_i(x) P_i`, with w the gate's weights for the state in front of it and P_i the
members' likelihoods, which are constants: members never run in training. Mini-batches by Adam (Kingma and Ba, 2015)
with decoupled weight decay (Loshchilov and Hutter, 2019); how many epochs and how much decay is chosen by the last
quarter of each text, whose documents the gate has not seen, and the gate is then trained on all of the text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.fitting.likelihood import expectation_maximisation, scaled_likelihood
from mixlm.routing.gate import Array, Gate
from mixlm.routing.gate_router import GROUPS, GateInputs, GateRouter
from mixlm.routing.observation import TOP_K
from mixlm.scoring.scores import Scores, concatenate, context_features, split_holdout
from mixlm.types import Floats

GateKind = Literal["linear", "mlp"]
GATES: tuple[GateKind, ...] = ("linear", "mlp")
WIDTH = 64  # of the inner layer
DECAYS = (0.0, 3.0, 30.0)  # weight decay of a step, in units of the learning rate
# Learning rates, over the root of the number of inputs: Adam moves every coefficient by about as much in a step, those
# of inputs that say nothing too, and with many of them larger steps fit noise before they fit anything else.
_RATES = {"linear": 3e-3, "mlp": 2e-3}
_BATCH = 256  # segments
_MIN_STEPS = 64  # of an epoch: of little text it goes through the segments several times
_EPOCHS = 40
_PATIENCE = 5  # epochs without a gain on the text that is held out
_VALIDATION = 0.25  # of each text
_MIN_SEGMENTS = 16


def choose_inputs(ensemble: Ensemble, groups: Sequence[str], observe: str | None = None) -> GateInputs:
    """Return what a gate of an ensemble looks at.

    Args:
        ensemble: The ensemble.
        groups: Of `GROUPS`.
        observe: The observed member's name; by default the one with the smallest weights.

    Raises:
        ConfigError: A group is unknown, or the member is not there.
        UnsupportedError: Its engine gives no hidden states.
    """
    if unknown := [group for group in groups if group not in GROUPS]:
        raise ConfigError(f"{unknown[0]!r} is no group of features", f"choose from {', '.join(GROUPS)}")
    ordered = tuple(group for group in GROUPS if group in groups)
    if ordered == ("text",):
        if observe is not None:
            raise ConfigError("the features are of the text, and no member is observed", "choose top_k or hidden too")
        return GateInputs(ordered)
    names = ensemble.names
    if observe is not None and observe not in names:
        raise ConfigError(f"{observe!r} is not a member", f"the members are {', '.join(names)}")
    sizes = [member.engine.weights_bytes for member in ensemble.members]
    member = names.index(observe) if observe is not None else int(np.argmin(sizes))
    engine, size = ensemble.members[member].engine, 0
    if "hidden" in ordered:
        if engine.hidden_size is None:
            raise UnsupportedError(
                f"{engine.backend} gives no hidden states of {names[member]}",
                "use --engine hf (engine='hf'), or the features text and top_k",
            )
        size = engine.hidden_size
    return GateInputs(ordered, names[member], TOP_K if "top_k" in ordered else 0, size)


def untrained(names: Sequence[str], inputs: GateInputs) -> GateRouter:
    """Return a gate with equal weights: an ensemble with it scores what a trained one will observe."""
    members, size = len(names), inputs.size
    shapes = {
        **{"centre": (size,), "bias": (members,), "inner_bias": (0,)},
        **{"linear": (members, size), "inner": (0, size), "outer": (members, 0)},
    }
    arrays = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    return GateRouter(Gate(scale=np.ones(size, dtype=np.float32), **arrays), names, inputs)


@dataclass(frozen=True)
class GateFit:
    """A trained gate.

    Attributes:
        router: The gate as a router.
        decay: The weight decay that was chosen.
        epochs: The epochs that were chosen.
        validation: Bits per byte of the last quarter of each text after each epoch, with the decay that was chosen.
        seconds: What training took.
    """

    router: GateRouter
    decay: float
    epochs: int
    validation: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class GateChoice:
    """A trained gate, the weight decay and the epochs that were chosen, and the trace of `GateFit.validation`."""

    gate: Gate
    decay: float
    epochs: int
    validation: tuple[float, ...]


@dataclass(frozen=True)
class _Data:
    """Segments to train on: inputs (n, inputs), likelihoods over the largest (n, members), log of that, bytes."""

    inputs: Array
    likelihood: Floats
    top: Floats
    size: int

    @classmethod
    def of(cls, scores: Scores, inputs: Array) -> _Data:
        likelihood, top = scaled_likelihood(scores)
        return cls(inputs, likelihood, top, scores.size)

    def bits_per_byte(self, gate: Gate) -> float:
        mixed = (gate.weights(self.inputs) * self.likelihood).sum(axis=1)
        return float(-(np.log(mixed) + self.top).sum() / np.log(2) / self.size)


def train_gate(
    scores: Sequence[Scores],
    inputs: GateInputs,
    kind: GateKind = "linear",
    *,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> GateFit:
    """Train a gate that makes scored texts likely.

    Args:
        scores: Texts scored by the same members, with what the gate observes.
        inputs: What it looks at.
        kind: A linear gate, or one with an inner layer of `WIDTH` tanh units.
        seed: Of the batches and the inner layer.
        progress: Called with the epochs so far and the bits per byte of the validation text.

    Raises:
        ConfigError: The texts are too short, of different members, or lack what the gate observes.
    """
    start = time.perf_counter()
    if inputs.observed is not None and any(score.observed is None for score in scores):
        raise ConfigError(f"these scores hold no observations of {inputs.observed}", "score the texts with the router")

    def stack(part: Scores) -> Array:
        return inputs.stack(context_features(part) if "text" in inputs.groups else None, part.observed)

    choice = choose_gate(scores, stack, kind, seed=seed, progress=progress)
    router = GateRouter(choice.gate, scores[0].names, inputs)
    return GateFit(router, choice.decay, choice.epochs, choice.validation, time.perf_counter() - start)


def choose_gate(
    scores: Sequence[Scores],
    stack: Callable[[Scores], Array],
    kind: GateKind = "linear",
    *,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> GateChoice:
    """Train a gate on any numbers about states. Arguments as for `train_gate`.

    stack: returns the gate's inputs in front of each segment, (segments, inputs), from what is scored before it.
    """
    if any(score.names != scores[0].names for score in scores):
        raise ConfigError("a router is trained on texts that were scored by the same members")
    parts = [split_holdout(score, _VALIDATION) for score in scores if len(score.ends) > 1]
    if not parts or sum(len(part.ends) for part, _ in parts) < _MIN_SEGMENTS:
        raise ConfigError("there is too little text to train a gate", "give texts of a few kilobytes, better of many")
    first, last = concatenate([part for part, _ in parts]), concatenate([part for _, part in parts])
    train, check = _Data.of(first, stack(first)), _Data.of(last, stack(last))
    done = 0

    def note(bits: float) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, bits)

    whole = concatenate(scores)
    weights = expectation_maximisation(whole).weights
    trials = []
    for decay in DECAYS:
        trainer = _Trainer(train, weights, kind, decay, seed)
        trials.append((decay, _validated(trainer, check, note)))
    decay, trace = min(trials, key=lambda trial: min(trial[1]))
    epochs = int(np.argmin(trace))
    final = _Trainer(_Data.of(whole, stack(whole)), weights, kind, decay, seed)
    for _ in range(epochs):
        final.epoch()
    return GateChoice(final.gate, decay, epochs, tuple(trace))


def _validated(trainer: _Trainer, check: _Data, note: Callable[[float], None]) -> list[float]:
    """Train until the validation text no longer gains. Returns its bits per byte before and after each epoch."""
    trace = [check.bits_per_byte(trainer.gate)]
    while len(trace) <= _EPOCHS and len(trace) - 1 - int(np.argmin(trace)) < _PATIENCE:
        trainer.epoch()
        trace.append(check.bits_per_byte(trainer.gate))
        note(trace[-1])
    return trace


class _Trainer:
    """Adam on mini-batches. gate: as it is now."""

    def __init__(self, data: _Data, weights: Floats, kind: GateKind, decay: float, seed: int) -> None:
        members, count = data.likelihood.shape[1], data.inputs.shape[1]
        width = WIDTH if kind == "mlp" else 0
        self._rng = np.random.default_rng(seed)
        # A number that hardly varies says nothing, and would be magnified.
        centre, scale = data.inputs.mean(axis=0), data.inputs.std(axis=0)
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
        self._x = self.gate.standardised(data.inputs)
        self._likelihood = data.likelihood.astype(np.float32)
        self._rate, self._decay = _RATES[kind] / float(np.sqrt(count)), decay
        self._names = ("linear", "bias", "inner", "inner_bias", "outer") if width else ("linear", "bias")
        self._first = {name: np.zeros_like(getattr(self.gate, name)) for name in self._names}
        self._second = {name: np.zeros_like(getattr(self.gate, name)) for name in self._names}
        self._steps = 0

    def epoch(self) -> None:
        """Go through all segments, in a new order; several times where that is too few steps."""
        batches = -(-len(self._x) // _BATCH)
        for _ in range(-(-_MIN_STEPS // batches)):
            order = self._rng.permutation(len(self._x))
            for start in range(0, len(order), _BATCH):
                batch = order[start : start + _BATCH]
                self._step(gradients(self.gate, self._x[batch], self._likelihood[batch]))

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


def gradients(gate: Gate, x: Array, likelihood: Array) -> dict[str, Array]:
    """Return the gradient of the mean of `-log Σ_i w_i P_i` with respect to each array of a gate.

    Args:
        gate: The gate.
        x: Standardised inputs, (segments, inputs).
        likelihood: (segments, members).
    """
    inner = np.tanh(x @ gate.inner.T + gate.inner_bias)
    scores = x @ gate.linear.T + gate.bias + inner @ gate.outer.T
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    joint = shares * likelihood
    total = np.maximum(joint.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    slope = (shares - joint / total) / len(x)
    back = (slope @ gate.outer) * (1 - inner * inner)
    return {
        "linear": slope.T @ x,
        "bias": slope.sum(axis=0),
        "inner": back.T @ x,
        "inner_bias": back.sum(axis=0),
        "outer": slope.T @ inner,
    }
