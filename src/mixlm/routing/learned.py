"""A trained gate: weights from features of the text so far, `softmax(W · features)`.

It is trained to maximize the likelihood of the mixture (`mixlm.fitting.likelihood.fit_router`), on text that every
member has scored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mixlm.errors import ConfigError
from mixlm.routing.base import PromptContext, Route
from mixlm.routing.features import FEATURES, TAIL, features
from mixlm.types import Floats
from mixlm.units.base import TextView

if TYPE_CHECKING:
    from mixlm.routing.gate_router import GateRouter


class LearnedRouter:
    """A trained gate.

    Attributes:
        matrix: float64 (members, FEATURES).
        names: The members that it was trained for, in order.
        members: Their number.
    """

    def __init__(self, matrix: Floats, names: Sequence[str]) -> None:
        if matrix.shape != (len(names), FEATURES):
            raise ConfigError(f"a router for {len(names)} members has a matrix of shape {matrix.shape}")
        self.matrix = matrix
        self.names = tuple(names)
        self.members = len(self.names)

    def begin(self, context: PromptContext) -> Route:
        """Return the gate, applied to the prompt and the text so far."""

        def route(state: TextView) -> Floats:
            text = (context.text[-TAIL:] + state.tail(TAIL))[-TAIL:]
            weights: Floats = self.weights_at(text, np.array([len(text)]))[0]
            return weights

        return route

    def weights_at(self, text: bytes, positions: npt.NDArray[np.int64]) -> Floats:
        """Return the weights after `text[:position]` for each position: float64 (positions, members)."""
        return gate_weights(features(text, positions), self.matrix)

    def for_members(self, names: Sequence[str]) -> LearnedRouter:
        """Return the router for the same members in another order: each keeps its own row."""
        return LearnedRouter(self.matrix[[self.names.index(name) for name in names]], names)

    def save(self, path: str | Path) -> None:
        """Write the gate as JSON."""
        form = {"kind": "learned", "members": list(self.names), "matrix": self.matrix.tolist()}
        Path(path).write_text(json.dumps(form) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> LearnedRouter:
        """Read a gate. Raises ConfigError if the file is not one."""
        try:
            form = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            if form["kind"] != "learned":
                raise ValueError(f"its kind is {form['kind']!r}")
            matrix, names = np.array(form["matrix"], dtype=np.float64), [str(name) for name in form["members"]]
            if matrix.shape != (len(names), FEATURES) or not np.isfinite(matrix).all():
                raise ValueError(f"its matrix is not one of {len(names)} × {FEATURES} finite numbers")
            return cls(matrix, names)
        except OSError as error:
            raise ConfigError(f"the router file {path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{path} is not a learned router: {what_is_wrong(error)}", "write one with mixlm fit --router"
            ) from error


def load_router(path: str | Path) -> LearnedRouter | GateRouter:
    """Read a router that `mixlm fit --router` has written. Raises ConfigError if the file is not one."""
    try:
        form = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return LearnedRouter.load(path)  # which says what is wrong
    from mixlm.routing.gate_router import KIND, GateRouter

    if not isinstance(form, dict) or form.get("kind") != KIND:
        return LearnedRouter.load(path)
    hint = "train one with this mixlm: mixlm fit --router"
    try:
        return GateRouter.load(path, form)
    except ConfigError as error:
        raise ConfigError(f"the router in {path} cannot be used: {error.message}", error.hint or hint) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a learned router: {what_is_wrong(error)}", hint) from error


def what_is_wrong(error: Exception) -> str:
    """Return what an error in reading a file says of it."""
    if isinstance(error, TypeError | AttributeError):
        return "a value in it has another type than those that mixlm fit writes"
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def gate_weights(inputs: Floats, matrix: Floats) -> Floats:
    """Return `softmax(inputs · matrixᵀ)` by rows: float64 (rows, members)."""
    scores = inputs @ matrix.T
    scores -= scores.max(axis=1, keepdims=True)
    out: Floats = np.exp(scores)
    out /= out.sum(axis=1, keepdims=True)
    return out
