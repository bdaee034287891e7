"""A trained gate: weights from features of the text so far, `softmax(W · features)`.

It is trained to maximize the likelihood of the mixture (`mixlm.fitting.likelihood.fit_router`), on text that every
member has scored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mixlm.core.sampling import softmax
from mixlm.errors import ConfigError
from mixlm.routing.base import PromptContext, Route
from mixlm.routing.features import FEATURE_TAIL, FEATURES, features
from mixlm.types import Floats
from mixlm.units.base import TextView

if TYPE_CHECKING:
    from mixlm.routing.gate_router import GateRouter


_HINT = "train one with mixlm fit --router of this version"


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
            text = (context.text[-FEATURE_TAIL:] + state.tail(FEATURE_TAIL))[-FEATURE_TAIL:]
            weights: Floats = self.weights_at(text, np.array([len(text)]))[0]
            return weights

        return route

    def weights_at(self, text: bytes, positions: npt.NDArray[np.int64]) -> Floats:
        """Return the weights after `text[:position]` for each position: float64 (positions, members)."""
        return softmax(features(text, positions) @ self.matrix.T)

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
        with saved_form(path, "learned router", _HINT) as form:
            return cls.from_form(form)

    @classmethod
    def from_form(cls, form: Mapping[str, Any]) -> LearnedRouter:
        """Return the router that a file describes. Raises ValueError, KeyError or TypeError where it describes none."""
        if form["kind"] != "learned":
            raise ValueError(f"its kind is {form['kind']!r}")
        matrix, names = np.array(form["matrix"], dtype=np.float64), [str(name) for name in form["members"]]
        if matrix.shape != (len(names), FEATURES) or not np.isfinite(matrix).all():
            raise ValueError(f"its matrix is not one of {len(names)} × {FEATURES} finite numbers")
        return cls(matrix, names)


def load_router(path: str | Path) -> LearnedRouter | GateRouter:
    """Read a router that `mixlm fit --router` has written. Raises ConfigError if the file is not one."""
    from mixlm.routing.gate_router import KIND, GateRouter

    with saved_form(path, "learned router", _HINT) as form:
        return GateRouter.load(path, form) if form.get("kind") == KIND else LearnedRouter.from_form(form)


@contextmanager
def saved_form(path: str | Path, what: str, hint: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON of a file that mixlm has written, to build what it describes.

    Args:
        path: The file.
        what: What it is, for messages.
        hint: What to do about a file that is not of that kind.

    Raises:
        ConfigError: It cannot be read, or what it describes cannot be built.
    """
    try:
        form = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(form, dict):
            raise TypeError
        yield form
    except OSError as error:
        raise ConfigError(f"the {what} {path} cannot be read: {error.strerror}", hint) from error
    except ConfigError as error:
        raise ConfigError(f"the {what} {path} cannot be used: {error.message}", error.hint or hint) from error
    except (TypeError, AttributeError) as error:
        wrong = "a value in it has another type than those that mixlm fit writes"
        raise ConfigError(f"{path} is not a {what}: {wrong}", hint) from error
    except (ValueError, KeyError, RecursionError) as error:
        wrong = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{path} is not a {what}: {wrong}", hint) from error
