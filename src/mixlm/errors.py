"""What can go wrong, as one tree.

    MixlmError                 anything mixlm says no to; message and hint, exit code 1
    ├── UsageError             what was asked cannot be; exit code 2
    │   ├── ConfigError        an ensemble file or an option that does not fit
    │   ├── UnsupportedError   a combination that has no exact meaning, or that a member cannot do
    │   ├── ModelNotFoundError no model of that name or at that path
    │   └── PromptTooLongError more tokens than a member's context holds
    ├── ModelLoadError         the model is there but cannot be loaded
    ├── TokenizerError         a tokenizer whose tokens cannot be mapped to bytes
    ├── EngineError            an engine or a server does not answer, or not with what was asked
    │   └── GenerationInterruptedError  a member failed during generation; carries the completion so far
    ├── DownloadError          a file could not be fetched, or is not the one expected
    └── MemoryLimitError       the device ran out of memory

A message gives the value found and what is allowed; the hint says what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class MixlmError(Exception):
    """Base of every error mixlm raises on purpose. `exit_code` is what the command line ends with."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(MixlmError):
    """What was asked cannot be done as asked."""

    exit_code = 2


class ConfigError(UsageError):
    """An ensemble file or option has a value that is not allowed."""


class UnsupportedError(UsageError):
    """A combination without an exact meaning, or one that a member cannot do."""


class ModelNotFoundError(UsageError):
    """No model has that name, and nothing lies at that path."""


class PromptTooLongError(UsageError):
    """The prompt has more tokens than a member's context."""


class ModelLoadError(MixlmError):
    """The model was found but cannot be loaded."""


class TokenizerError(MixlmError):
    """A tokenizer whose ids cannot be mapped to exact bytes."""


class EngineError(MixlmError):
    """An engine, or the server that runs a model, does not answer, or not with what was asked."""


class GenerationInterruptedError(EngineError):
    """A member failed in the middle of a reply. `completion` is what was written until then."""

    def __init__(self, message: str, hint: str | None = None, completion: Any = None) -> None:
        super().__init__(message, hint)
        self.completion = completion


class DownloadError(MixlmError):
    """A file could not be fetched, or its checksum is not the expected one."""


class MemoryLimitError(MixlmError):
    """The device has no memory left."""


def close_matches(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Return up to `limit` of the `known` names that look like `name`, best first."""
    by_lower = {one.lower(): one for one in known}
    return [by_lower[one] for one in difflib.get_close_matches(name.lower(), by_lower, n=limit, cutoff=0.6)]


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Return a hint that names close matches of `name`, or None when nothing is close."""
    close = close_matches(name, known)
    return f"did you mean {' or '.join(repr(one) for one in close)}?" if close else None
