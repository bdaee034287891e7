"""Training of routers' gates: the mixture's own log-likelihood on scored text, maximised.

The loss of a segment is `-log Σ_i w_i(x) P_i`, with w the gate's weights for the state in front of it and P_i the
members' likelihoods, which are constants: members never run in training. The last quarter of each text, whose documents
the gate has not seen, chooses how long and with how much weight decay it is trained (`gate_trainer`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.fitting.gate_trainer import GateChoice, GateKind, OnEpoch, train_with_validation
from mixlm.fitting.likelihood import expectation_maximisation, scaled_likelihood
from mixlm.routing.base import TOP_K
from mixlm.routing.gate import Array, Gate
from mixlm.routing.gate_router import GROUPS, GateInputs, GateRouter
from mixlm.scoring.scores import Scores, concatenate, context_features, split_holdout
from mixlm.types import Floats, Ids

_VALIDATION = 0.25  # of each text
_MIN_SEGMENTS = 16


def choose_inputs(ensemble: Ensemble, groups: Sequence[str], observe: str | None = None) -> GateInputs:
    """Return what a gate of an ensemble looks at.

    Args:
        ensemble: The ensemble.
        groups: Of `GROUPS`.
        observe: The observed member's name; by default the one with the smallest weights.

    Raises:
        ConfigError: A group is unknown, the member is not there, or it is not known which is the smallest.
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
    if observe is None and any(sizes) and not all(sizes):
        raise ConfigError(
            f"the size of {names[sizes.index(0)]} is not known, and by default the smallest member is observed",
            "name it: --observe (observe=)",
        )
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
    return GateRouter(Gate.untrained(len(names), inputs.size), names, inputs)


class GateFit(NamedTuple):
    """A trained gate as a router, and how it was trained."""

    router: GateRouter
    choice: GateChoice


class _Mixture:
    """The mixture's bits, and the price of forwards where there is one.

    inputs: (segments, inputs). likelihood: over the largest, (segments, members).
    """

    def __init__(self, scores: Scores, inputs: Array, prices: Floats | None) -> None:
        likelihood, self._top = scaled_likelihood(scores)
        self.inputs = inputs
        self._likelihood = likelihood.astype(np.float32)
        self._prices = None if prices is None else prices.astype(np.float32)
        self._size = scores.size

    def slopes(self, shares: Array, items: Ids) -> Array:
        return mixture_slopes(shares, self._likelihood[items], self._prices)

    def loss(self, gate: Gate) -> float:
        weights = gate.weights(self.inputs)
        nats = -(np.log((weights * self._likelihood).sum(axis=1)) + self._top).sum()
        if self._prices is not None:
            nats += (weights @ self._prices).sum()
        return float(nats / np.log(2) / self._size)


def mixture_slopes(shares: Array, likelihood: Array, prices: Array | None = None) -> Array:
    """Return the gradient of the mean of `-log Σ_i w_i P_i + Σ_i w_i c_i` with respect to a gate's scores.

    Args:
        shares: The weights w, (segments, members).
        likelihood: P, (segments, members).
        prices: c, (members,), in nats.
    """
    joint = shares * likelihood
    slope = shares - joint / np.maximum(joint.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    if prices is not None:
        slope += shares * (prices - (shares @ prices)[:, None])
    scaled: Array = slope / len(shares)
    return scaled


def train_gate(
    scores: Sequence[Scores],
    inputs: GateInputs,
    kind: GateKind = "linear",
    *,
    progress: OnEpoch | None = None,
) -> GateFit:
    """Train a gate that makes scored texts likely.

    Args:
        scores: Texts scored by the same members, with what the gate observes.
        inputs: What it looks at.
        kind: A linear gate, or one with an inner layer of `WIDTH` tanh units.
        progress: Called with the epochs so far and the bits per byte of the validation text.

    Raises:
        ConfigError: The texts are too short, of different members, or lack what the gate observes.
    """
    if inputs.observed is not None and any(score.observed is None for score in scores):
        raise ConfigError(f"these scores hold no observations of {inputs.observed}", "score the texts with the router")

    def stack(part: Scores) -> Array:
        return inputs.stack(context_features(part) if "text" in inputs.groups else None, part.observed)

    choice = train_gate_on_inputs(scores, stack, kind, progress=progress)
    return GateFit(GateRouter(choice.gate, scores[0].names, inputs), choice)


def train_gate_on_inputs(
    scores: Sequence[Scores],
    stack: Callable[[Scores], Array],
    kind: GateKind = "linear",
    *,
    prices: Floats | None = None,
    seed: int = 0,
    progress: OnEpoch | None = None,
) -> GateChoice:
    """Return a gate trained on any numbers about states, and how it was trained. Arguments as for `train_gate`.

    stack: returns the gate's inputs in front of each segment, (segments, inputs), from what is scored before it.
    prices: what a forward of each member costs, in nats, float64 (members,); by default nothing.
    """
    if any(score.names != scores[0].names for score in scores):
        raise ConfigError("a router is trained on texts that were scored by the same members")
    parts = [split_holdout(score, _VALIDATION) for score in scores if score.is_divisible]
    if not parts or sum(len(part.ends) for part, _ in parts) < _MIN_SEGMENTS:
        raise ConfigError("there is too little text to train a gate", "give texts of a few kilobytes, better of many")
    first, last = concatenate([part for part, _ in parts]), concatenate([part for _, part in parts])
    whole = concatenate(scores)

    def objective(part: Scores) -> _Mixture:
        return _Mixture(part, stack(part), prices)

    weights = expectation_maximisation(whole).weights
    objectives = (objective(first), objective(last), objective(whole))
    return train_with_validation(objectives, weights, kind, seed=seed, progress=progress)
