"""Training of routers' gates: the mixture's own log-likelihood on scored text, maximised.

The loss of a segment is `-log Σ_i w_i(x) P_i`, with w the gate's weights for the state in front of it and P_i the
members' likelihoods, which are constants: members never run in training (`gate_trainer`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.fitting.gate_trainer import GateKind, Objective, train_with_validation
from mixlm.fitting.likelihood import expectation_maximisation, scaled_likelihood
from mixlm.routing.base import TOP_K
from mixlm.routing.gate import Array, Gate
from mixlm.routing.gate_router import GROUPS, GateInputs, GateRouter, LearnedRouter
from mixlm.scoring.scores import Scores, concatenate, context_features
from mixlm.types import Floats, Ids


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


def train_gate(
    scores: Sequence[Scores],
    inputs: GateInputs,
    kind: GateKind = "linear",
    *,
    progress: Callable[[int, int], None] | None = None,
) -> GateRouter:
    """Train a router that makes scored texts likely; a linear gate on the text alone is a `LearnedRouter`.

    Args:
        scores: Texts scored by the same members, with what the gate observes.
        inputs: What it looks at.
        kind: A linear gate, or one with an inner layer of `WIDTH` tanh units.
        progress: Called with the trainings done, and their number.

    Raises:
        ConfigError: The texts are too short, of different members, or lack what the gate observes.
    """
    if inputs.observed is not None and any(score.observed is None for score in scores):
        raise ConfigError(f"these scores hold no observations of {inputs.observed}", "score the texts with the router")

    def stack(part: Scores) -> Array:
        return inputs.stack(context_features(part) if "text" in inputs.groups else None, part.observed)

    gate, names = train_gate_on_inputs(scores, stack, kind, progress=progress), scores[0].names
    return LearnedRouter.of(gate, names) if inputs.is_text and gate.is_linear else GateRouter(gate, names, inputs)


def train_gate_on_inputs(
    scores: Sequence[Scores],
    stack: Callable[[Scores], Array],
    kind: GateKind = "linear",
    *,
    prices: Floats | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Gate:
    """Return a gate trained on any numbers about states. Arguments as for `train_gate`.

    stack: returns the gate's inputs in front of each segment, (segments, inputs), from what is scored before it.
    prices: what a forward of each member costs, in nats, float64 (members,); by default nothing.
    """
    weights = expectation_maximisation(concatenate(scores)).weights
    costs = np.zeros(len(weights)) if prices is None else prices

    def objective(part: Scores) -> Objective:
        return Objective(stack(part), partial(mixture_loss, scaled_likelihood(part)[0], costs))

    return train_with_validation(scores, objective, weights, kind, seed=seed, progress=progress)


def mixture_loss(likelihood: Floats, prices: Floats, weights: Floats, items: slice | Ids) -> tuple[float, Floats]:
    """Return the sum of `-log Σ_i w_i P_i + Σ_i w_i c_i` over segments, and its gradient with respect to gate's scores.

    Args:
        likelihood: P, of any scale in a segment, float64 (segments, members).
        prices: c, in nats, float64 (members,).
        weights: w, of the items, float64 (n, members).
        items: Which segments.
    """
    joint = weights * likelihood[items]
    mixed = np.maximum(joint.sum(axis=1), np.finfo(np.float64).tiny)
    costs = weights @ prices
    slopes = weights - joint / mixed[:, None] + weights * (prices - costs[:, None])
    return float((costs - np.log(mixed)).sum()), slopes
