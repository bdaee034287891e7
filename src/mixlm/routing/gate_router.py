"""A trained gate on what is known of a state: the text, and the observed member's likeliest tokens and hidden state.

It is trained by `mixlm.fitting.gates`. A file of it is two: JSON that says what it is, and its numbers as safetensors.
That of a linear gate on the text alone is one, with a matrix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mixlm.errors import ConfigError
from mixlm.routing.base import Observation, Observes, ObservingRoute, PromptContext, Route
from mixlm.routing.features import FEATURE_TAIL, FEATURES, features
from mixlm.routing.gate import Array, Gate, saved_form
from mixlm.routing.observation import ObservedStates
from mixlm.types import Floats
from mixlm.units.base import TextView

KIND = "gate"
VERSION = 1  # of a gate's file and of its inputs; a file of another one is refused
LAYER = "last"  # the hidden state that goes into the output layer
GROUPS = ("text", "top_k", "hidden")
_LIKELIEST = 5  # probabilities that are inputs by themselves
TOP_K_FEATURES = 2 * _LIKELIEST + 4
LOGPROB_FLOOR = -20.0  # of a log-probability as an input


@dataclass(frozen=True)
class GateInputs:
    """What a gate looks at.

    Attributes:
        groups: Of `GROUPS`, in that order: character classes of the text, statistics of the observed member's
            likeliest tokens, its hidden state.
        observed: The observed member's name; None for the text alone.
        top_k: How many likeliest tokens are observed; 0 for none.
        hidden_size: Numbers in its hidden state; 0 where that is no input.

    Raises:
        ConfigError: A group is unknown, or nothing is observed for one.
    """

    groups: tuple[str, ...]
    observed: str | None = None
    top_k: int = 0
    hidden_size: int = 0

    def __post_init__(self) -> None:
        if not self.groups or self.groups != tuple(group for group in GROUPS if group in self.groups):
            raise ConfigError(
                f"a gate's features are {', '.join(self.groups) or 'none'}; they must be some of {', '.join(GROUPS)}"
            )
        wants = {"top_k": "top_k" in self.groups, "hidden": "hidden" in self.groups}
        if wants["top_k"] != (self.top_k > _LIKELIEST) or wants["hidden"] != (self.hidden_size > 0):
            raise ConfigError(f"a gate on {', '.join(self.groups)} has top_k {self.top_k}, width {self.hidden_size}")
        if any(wants.values()) != (self.observed is not None):
            raise ConfigError("a gate observes a member exactly where its features are of one")

    @property
    def is_text(self) -> bool:
        """Whether it is the text alone."""
        return self.groups == ("text",)

    @property
    def size(self) -> int:
        """The number of inputs."""
        return (
            FEATURES * ("text" in self.groups)
            + TOP_K_FEATURES * ("top_k" in self.groups)
            + self.hidden_size * ("hidden" in self.groups)
        )

    @property
    def needs(self) -> str:
        """Which engines can run it, in words."""
        if "hidden" in self.groups:
            return f"the engine hf for {self.observed}, whose hidden state it observes"
        if "top_k" in self.groups:
            return f"an engine that reports {self.top_k} or more likely tokens of {self.observed}: any"
        return "the text alone: any engine"

    def stack(self, text: Floats | None, observed: ObservedStates | None) -> Array:
        """Return the inputs at states: float32 (states, size).

        Args:
            text: The features of the text at each state, float64 (states, FEATURES); None where they are no input.
            observed: The observations there; None for the text alone.
        """
        parts: list[npt.NDArray[np.floating]] = []
        if "text" in self.groups and text is not None:
            parts.append(text)
        if "top_k" in self.groups and observed is not None:
            parts.append(top_k_features(observed.logprobs))
        if "hidden" in self.groups and observed is not None and observed.hidden is not None:
            parts.append(observed.hidden)
        return np.hstack([part.astype(np.float32) for part in parts])


def top_k_features(logprobs: Floats) -> Floats:
    """Return statistics of likeliest tokens, (states, top_k): float64 (states, TOP_K_FEATURES).

    The first probabilities and their logarithms, the entropy in nats, the margin of the first over the second in both,
    and the mass beyond the first ones; all of the probabilities as they are renormalised.
    """
    probabilities, clipped = np.exp(logprobs), np.maximum(logprobs, LOGPROB_FLOOR)
    entropy = -(probabilities * clipped).sum(axis=1)
    margin, log_margin = probabilities[:, 0] - probabilities[:, 1], clipped[:, 0] - clipped[:, 1]
    tail = probabilities[:, _LIKELIEST:].sum(axis=1)
    first = [probabilities[:, :_LIKELIEST], clipped[:, :_LIKELIEST]]
    return np.column_stack([*first, entropy, margin, log_margin, tail])


class GateRouter:
    """A trained gate as a router.

    Attributes:
        gate: The gate.
        names: The members that it was trained for, in order.
        inputs: What it looks at.
        members: Their number.
        observes: What it observes of which member; None for the text alone.
    """

    def __init__(self, gate: Gate, names: Sequence[str], inputs: GateInputs) -> None:
        if gate.members != len(names) or gate.linear.shape[1] != inputs.size:
            raise ConfigError(
                f"a gate for {len(names)} members and {inputs.size} inputs has a matrix of shape {gate.linear.shape}"
            )
        if inputs.observed is not None and inputs.observed not in names:
            raise ConfigError(f"the gate observes {inputs.observed}, which is none of {', '.join(names)}")
        self.gate = gate
        self.names = tuple(names)
        self.inputs = inputs
        self.members = len(self.names)
        self.observes: Observes | None = None
        if inputs.observed is not None:
            hidden = inputs.hidden_size > 0
            self.observes = Observes(
                self.names.index(inputs.observed), inputs.top_k, hidden, inputs.hidden_size if hidden else None
            )

    @property
    def digest(self) -> str:
        """What tells it from gates with other numbers or inputs."""
        return hashlib.sha256(f"{self.names} {self.inputs} {self.gate.digest}".encode()).hexdigest()[:16]

    def begin(self, context: PromptContext) -> Route | ObservingRoute:
        """Return the gate, applied to the prompt, the text so far and what is observed."""

        def route(state: TextView, observation: Observation | None = None) -> Floats:
            text = None
            if "text" in self.inputs.groups:
                tail = (context.text[-FEATURE_TAIL:] + state.tail(FEATURE_TAIL))[-FEATURE_TAIL:]
                text = features(tail, np.array([len(tail)]))
            observed = None if observation is None else ObservedStates.of("", [observation])
            weights: Floats = self.weights_at(text, observed)[0]
            return weights

        return route

    def weights_at(self, text: Floats | None, observed: ObservedStates | None) -> Floats:
        """Return the weights at states, float64 (states, members); arguments as for `GateInputs.stack`."""
        return self.gate.weights(self.inputs.stack(text, observed))

    def for_members(self, names: Sequence[str]) -> GateRouter:
        """Return the router for the same members in another order."""
        return GateRouter(self.gate.reordered(np.array([self.names.index(name) for name in names])), names, self.inputs)

    def save(self, path: str | Path) -> None:
        """Write the JSON at a path, and the numbers beside it, with the suffix .safetensors."""
        observes = self.inputs.observed and {
            "member": self.inputs.observed,
            "top_k": self.inputs.top_k,
            "hidden_size": self.inputs.hidden_size,
            "layer": LAYER,
        }
        form = {
            "kind": KIND,
            "version": VERSION,
            "members": list(self.names),
            "features": list(self.inputs.groups),
            "observes": observes,
        }
        self.gate.save(path, form)

    @classmethod
    def from_form(cls, path: str | Path, form: dict[str, Any]) -> GateRouter:
        """Return the router that a file describes.

        Args:
            path: The JSON's.
            form: What it holds.

        Raises:
            ConfigError: It is of another version or layer, or its numbers are not there or do not fit.
        """
        if form["version"] != VERSION:
            raise ConfigError(f"it is of version {form['version']}, and this mixlm reads version {VERSION}")
        observes = form["observes"] or {}
        if observes and observes["layer"] != LAYER:
            raise ConfigError(f"it observes the layer {observes['layer']!r}, and engines give {LAYER!r} only")
        inputs = GateInputs(
            tuple(form["features"]), observes.get("member"), observes.get("top_k", 0), observes.get("hidden_size", 0)
        )
        names = [str(name) for name in form["members"]]
        return cls(Gate.load(path, form, len(names), inputs.size), names, inputs)


class LearnedRouter(GateRouter):
    """A linear gate on the text alone, `softmax(matrix · features)`. matrix: float64 (members, FEATURES)."""

    def __init__(self, matrix: Floats, names: Sequence[str]) -> None:
        gate = replace(Gate.untrained(*matrix.shape), linear=matrix.astype(np.float32))
        super().__init__(gate, names, GateInputs(("text",)))
        self.matrix = matrix

    @property
    def digest(self) -> str:
        """What tells it from gates with other numbers."""
        return hashlib.sha256(self.matrix.tobytes() + np.asarray(self.members).tobytes()).hexdigest()[:16]

    @classmethod
    def load(cls, path: str | Path) -> LearnedRouter:
        """Read a linear gate on the text. Raises ConfigError if the file is not one."""
        router = load_router(path)
        if not isinstance(router, cls):
            raise ConfigError(
                f"the gate in {path} is not a linear one on the text alone", "name it in an ensemble file"
            )
        return router

    def for_members(self, names: Sequence[str]) -> LearnedRouter:
        """Return the router for the same members in another order."""
        return LearnedRouter(self.matrix[[self.names.index(name) for name in names]], names)

    @classmethod
    def of(cls, gate: Gate, names: Sequence[str]) -> LearnedRouter:
        """Return the router of a linear gate on the text, whose last feature is 1."""
        matrix = gate.linear / gate.scale.astype(np.float64)
        matrix[:, -1] += gate.bias - matrix @ gate.centre
        return cls(matrix, names)

    def save(self, path: str | Path) -> None:
        """Write the gate as JSON."""
        form = {"kind": "learned", "members": list(self.names), "matrix": self.matrix.tolist()}
        Path(path).write_text(json.dumps(form) + "\n", encoding="utf-8")


def load_router(path: str | Path) -> GateRouter:
    """Read a router that `mixlm fit --router` has written. Raises ConfigError if the file is not one."""
    with saved_form(path, "learned router", "train one with mixlm fit --router of this version") as form:
        if form["kind"] == KIND:
            return GateRouter.from_form(path, form)
        if form["kind"] != "learned":
            raise ValueError(f"its kind is {form['kind']!r}")
        matrix, names = np.array(form["matrix"], dtype=np.float64), [str(name) for name in form["members"]]
        # Weights are computed in float32, in which larger numbers are infinite.
        if matrix.shape != (len(names), FEATURES) or not (np.abs(matrix) <= np.finfo(np.float32).max).all():
            raise ValueError(f"its matrix is not one of {len(names)} × {FEATURES} finite numbers of 32 bits")
        return LearnedRouter(matrix, names)
