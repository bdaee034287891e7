"""What an option is: how it is checked, and how the command line and the HTTP API present it.

The options of a generation are the fields of `Sampling` and `GenerationOptions` that have an `OptionSpec`. The checks,
the options of the command line (`panel`), the `mixlm` object of the HTTP API (`http="mixlm"`) and the sampling keys of
the ensemble file are built from them. Fields of OpenAI's API and further keys of the file are written by hand
(`server/request_schemas`, `config`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from inspect import signature
from numbers import Real
from typing import Any, Literal

import numpy as np

from mixlm.errors import ConfigError, MixlmError, did_you_mean

Panel = Literal["Ensemble", "Sampling", "Generation"]
_MAX_WHOLE = 2**64 - 1
_MAX_SHOWN = 10**100


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionSpec:
    """How an option is checked and presented.

    Attributes:
        help: What it does, one sentence.
        panel: Heading under which `--help` lists it; None if commands do not share it.
        metavar: Its value in `--help`; None for a flag.
        default_text: Its default in words, where that is not a value.
        http: Where the HTTP API has it: "mixlm" makes it a field of `mixlm`; "openai" says that OpenAI's has it.
        choices: The values it may have, if it is a name.
        whole: Whether it is an integer.
        minimum: Least value.
        least_positive: Least value other than 0.
        above: Bound that its value must exceed.
        maximum: Greatest value.
        note: What special values mean, for messages.
    """

    help: str = ""
    panel: Panel | None = None
    metavar: str | None = None
    default_text: str | None = None
    http: Literal["openai", "mixlm"] | None = None
    choices: tuple[str, ...] = ()
    whole: bool = False
    minimum: float | None = None
    least_positive: float | None = None
    above: float | None = None
    maximum: float | None = None
    note: str = ""

    def check(self, name: str, value: Any) -> None:
        """Raise ConfigError if the option may not have this value."""
        if self.choices:
            if value not in self.choices:
                allowed = ", ".join(self.choices)
                raise ConfigError(
                    f"{name} is {value!r}; it must be one of {allowed}", did_you_mean(str(value), self.choices)
                )
        elif (self.minimum is not None or self.above is not None) and not self._allows(value):
            shown = _shown(value)
            if self.whole and isinstance(value, int) and value > _MAX_WHOLE:
                raise ConfigError(f"{name} is {shown}; it must be less than 2**64: a number of 64 bits")
            number = "" if isinstance(value, Real) or self.whole else "a number, "
            raise ConfigError(f"{name} is {shown}; it must be {number}{self.allowed}")

    @property
    def allowed(self) -> str:
        """The allowed numbers in words."""
        if self.minimum is not None and self.maximum is not None:
            text = f"from {self.minimum:g} to {self.maximum:g}"
        elif self.minimum is not None:
            text = f"{self.minimum:g}, or {self.least_positive:g} or more" if self.least_positive else ""
            text = text or f"{self.minimum:g} or more"
        else:
            text = f"greater than {self.above:g}"
            text += f" and at most {self.maximum:g}" if self.maximum is not None else ""
        return ("a whole number, " if self.whole else "") + text + (f"; {self.note}" if self.note else "")

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds as keywords of a pydantic `Field`."""
        bounds = {"ge": self.minimum, "gt": self.above, "le": self.maximum}
        return {name: value for name, value in bounds.items() if value is not None}

    def _allows(self, value: Any) -> bool:
        if isinstance(value, int | np.integer) and self.whole:
            is_number = value <= _MAX_WHOLE
        else:
            is_number = not self.whole and isinstance(value, Real) and math.isfinite(as_float(value))
        return bool(
            is_number
            and not isinstance(value, bool)
            and (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.least_positive is None or value == 0 or value >= self.least_positive)
            and (self.maximum is None or value <= self.maximum)
        )


def as_float(value: Any) -> float:
    """Return a real number as a float, infinite where it is beyond all floats."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _shown(value: Any) -> str:
    """Return a value for a message; of a number with many digits only that it has them."""
    if isinstance(value, int) and abs(value) >= _MAX_SHOWN:
        return f"a number of more than {len(str(_MAX_SHOWN)) - 1} digits"
    return str(value) if isinstance(value, Real) else repr(value)


def option(
    default: Any = MISSING, help: str = "", *, default_factory: Any = MISSING, off: float | None = None, **spec: Any
) -> Any:
    """Return a dataclass field with an `OptionSpec` of these keywords. off: the value with which it does nothing."""
    if off is not None:
        spec["note"] = f"{off:g} is off"
        help = f"{help}; {spec['note']}."
    return field(default=default, default_factory=default_factory, metadata={"option": OptionSpec(help=help, **spec)})


# Fields whose options commands share, by their headings in `--help`.
ensemble_option = partial(option, panel="Ensemble", metavar="NAME", http="mixlm")
sampling_option = partial(option, panel="Sampling", metavar="X")
generation_option = partial(option, panel="Generation", metavar="N")


def specs(record: Any) -> dict[str, OptionSpec]:
    """Return the specs of a dataclass's options, by name, in the order of its fields."""
    return {entry.name: entry.metadata["option"] for entry in fields(record) if "option" in entry.metadata}


def check_options(record: Any, *, skip: Collection[str] = ()) -> None:
    """Check the options of a dataclass instance; None is allowed where it is the default. Raises ConfigError.

    Numbers of NumPy become Python's, whose arithmetic does not overflow, and fractions become floats.
    """
    for entry in fields(record):
        value = getattr(record, entry.name)
        if "option" in entry.metadata and entry.name not in skip and not (value is None and entry.default is None):
            entry.metadata["option"].check(entry.name, value)
            if isinstance(entry.default, bool) and not isinstance(value, bool | np.bool_):
                raise ConfigError(f"{entry.name} is {value!r}; it must be True or False")
            if isinstance(value, np.generic):
                object.__setattr__(record, entry.name, value.item())
            elif not isinstance(value, int | float) and isinstance(value, Real):
                object.__setattr__(record, entry.name, float(value))


def check_function(function: Any, arguments: Sequence[str], subject: str) -> None:
    """Raise ConfigError where what a user gave, the `subject`, is no function of these positional arguments."""
    hint = f"write it as: def f({', '.join(arguments)})"
    if not callable(function):
        raise ConfigError(f"{subject} is {function!r}; it must be a function", hint)
    try:
        takes = signature(function)
    except (TypeError, ValueError):  # compiled functions may have none
        return
    try:
        takes.bind(*arguments)
    except TypeError as error:
        raise ConfigError(f"{subject} cannot be called with ({', '.join(arguments)}): {error}", hint) from None


def call_function(call: Callable[[], Any], subject: str) -> Any:
    """Return what a user's function returns. Raises ConfigError, which names the `subject`, where it fails."""
    try:
        return call()
    except MixlmError:
        raise
    except Exception as error:
        raise ConfigError(f"{subject} failed: {type(error).__name__}: {error}") from error
