"""Functions of users: whether they can be called, and what they fail with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

from mixlm.errors import ConfigError, MixlmError


def check_function(function: Any, arguments: Sequence[str], subject: str) -> None:
    """Check that what a user gave is a function of these positional arguments.

    Args:
        function: What was given.
        arguments: The names of the arguments, for the message.
        subject: What messages call it.

    Raises:
        ConfigError: It cannot be called, or not with so many arguments.
    """
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
