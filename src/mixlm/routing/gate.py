"""A gate: weights from numbers about a state, `softmax(W x + b)`, or with a hidden layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mixlm.core.sampling import softmax
from mixlm.errors import ConfigError
from mixlm.types import Floats
from mixlm.version import __version__

Array = npt.NDArray[np.float32]
_STANDARDISED_LIMIT = 20.0  # standard deviations: what lies further out is not what the gate was trained on


@dataclass(frozen=True)
class Gate:
    """`softmax(linear · x + bias)`, and with an inner layer `+ outer · tanh(inner · x + inner_bias)` in the exponent.

    x are the inputs, standardised. All arrays are float32.

    Attributes:
        centre: (inputs,).
        scale: (inputs,).
        linear: (members, inputs).
        bias: (members,).
        inner: (width, inputs); a width of 0 for a linear gate.
        inner_bias: (width,).
        outer: (members, width).
    """

    centre: Array
    scale: Array
    linear: Array
    bias: Array
    inner: Array
    inner_bias: Array
    outer: Array

    @property
    def members(self) -> int:
        """The number of members."""
        return len(self.bias)

    @property
    def is_linear(self) -> bool:
        """Whether it has no inner layer."""
        return len(self.inner) == 0

    def standardised(self, inputs: npt.NDArray[np.floating]) -> Array:
        """Return inputs, (…, inputs), as the gate takes them: float32."""
        x: Array = (inputs.astype(np.float32) - self.centre) / self.scale
        np.clip(x, -_STANDARDISED_LIMIT, _STANDARDISED_LIMIT, out=x)
        return x

    def weights(self, inputs: npt.NDArray[np.floating]) -> Floats:
        """Return the weights for inputs, (…, inputs): float64 (…, members)."""
        x = self.standardised(inputs)
        scores = x @ self.linear.T + self.bias
        if not self.is_linear:
            scores = scores + np.tanh(x @ self.inner.T + self.inner_bias) @ self.outer.T
        return softmax(scores)

    def reordered(self, order: npt.NDArray[np.int64]) -> Gate:
        """Return the gate for members in another order."""
        return replace(self, linear=self.linear[order], bias=self.bias[order], outer=self.outer[order])

    def arrays(self) -> dict[str, Array]:
        """Return the arrays by their names."""
        return {name: np.ascontiguousarray(getattr(self, name)) for name in _SHAPES}

    @staticmethod
    def shapes(members: int, inputs: int, width: int = 0) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the arrays by their names."""
        sizes = {"members": members, "inputs": inputs, "width": width}
        return {name: tuple(sizes[dimension] for dimension in dimensions) for name, dimensions in _SHAPES.items()}

    @classmethod
    def untrained(cls, members: int, inputs: int) -> Gate:
        """Return a linear gate that gives equal weights."""
        shapes = cls.shapes(members, inputs)
        return cls(**{name: np.full(shape, name == "scale", dtype=np.float32) for name, shape in shapes.items()})

    def save(self, path: str | Path, form: Mapping[str, Any]) -> None:
        """Write JSON that says what the gate is, and the arrays beside it, with the suffix .safetensors."""
        path, numbers = Path(path), numbers_file(path)
        # Not by safetensors: it makes a file that no other user can read.
        numbers.write_bytes(_safetensors().save(self.arrays()))
        form = {**form, "mixlm": __version__, "numbers": numbers.name, "digest": self.digest}
        path.write_text(json.dumps(form, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, form: Mapping[str, Any], members: int, inputs: int) -> Gate:
        """Read the arrays that `save` wrote.

        Args:
            path: The JSON's.
            form: What it holds.
            members: How many weights the gate gives.
            inputs: What it takes, a state.

        Raises:
            ConfigError: They cannot be read, are of other sizes, or are those of another gate.
        """
        numbers = Path(path).with_name(str(form["numbers"]))
        load_file = _safetensors().load_file
        try:
            arrays = load_file(numbers)
        except OSError as error:
            raise ConfigError(f"its numbers, {numbers.name}, cannot be read: {error.strerror or error}") from error
        except Exception as error:  # safetensors' own
            raise ConfigError(f"its numbers, {numbers.name}, are no safetensors: {error}") from error
        if missing := [name for name in _SHAPES if name not in arrays]:
            raise ConfigError(f"the gate lacks {', '.join(missing)}")
        with np.errstate(over="ignore"):  # what becomes infinite is refused
            gate = cls(**{name: arrays[name].astype(np.float32) for name in _SHAPES})
        for name, shape in cls.shapes(members, inputs, len(gate.inner_bias)).items():
            array = getattr(gate, name)
            if array.shape != shape:
                raise ConfigError(f"{name} of the gate has the shape {array.shape}, and {shape} is expected")
            if not np.isfinite(array).all():
                raise ConfigError(f"{name} of the gate has numbers that are not finite")
        if not (gate.scale > 0).all():
            raise ConfigError("scale of the gate has numbers that are not greater than 0")
        if form.get("digest", gate.digest) != gate.digest:
            raise ConfigError(
                f"its numbers, {numbers.name}, are those of another gate",
                "keep the two files that mixlm fit writes together, or train a gate again",
            )
        return gate

    @property
    def digest(self) -> str:
        """What tells it from gates with other numbers."""
        digest = hashlib.sha256()
        for _, array in sorted(self.arrays().items()):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]


_SHAPES: Mapping[str, tuple[str, ...]] = {
    "centre": ("inputs",),
    "scale": ("inputs",),
    "linear": ("members", "inputs"),
    "bias": ("members",),
    "inner": ("width", "inputs"),
    "inner_bias": ("width",),
    "outer": ("members", "width"),
}


def numbers_file(path: str | Path) -> Path:
    """Return the file of a gate's numbers, beside its JSON."""
    return Path(path).with_suffix(".safetensors")


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


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ConfigError("a trained gate needs safetensors", "install: pip install safetensors") from error
    return safetensors.numpy
