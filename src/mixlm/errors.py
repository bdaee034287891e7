"""The errors that mixlm raises, as one tree.

    MixlmError                 base: a message and a hint, exit code 1
    ├── UsageError             the request is not possible; exit code 2
    │   ├── ConfigError        an invalid ensemble file or option
    │   │   └── TemplateError  a chat template that is broken, or refuses or loses messages
    │   ├── UnsupportedError   a combination that has no exact meaning, or that a member cannot do
    │   ├── ModelNotFoundError no model of that name or at that path
    │   └── PromptTooLongError more tokens than a member's context holds
    ├── ModelLoadError         the model exists but cannot be loaded
    ├── TokenizerError         a tokenizer whose tokens cannot be mapped to bytes
    ├── EngineError            an engine or a server does not respond, or responds wrongly
    │   ├── RequestRefusedError  a server is there and refuses this request
    │   └── GenerationInterruptedError  a member failed during generation; carries the completion so far
    ├── DownloadError          a file could not be fetched, or is not the one expected
    └── MemoryLimitError       the device ran out of memory

A message gives the value and what is allowed; the hint says what to do.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class MixlmError(Exception):
    """Base of all errors that mixlm raises.

    Attributes:
        message: What was found, and what is allowed.
        hint: What to do, with the options of the command line; `str` has those of Python.
        exit_code: The exit status of the command line.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return in_python_words(self.with_hint)

    @property
    def with_hint(self) -> str:
        """The message with its hint, in the words of the command line."""
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(MixlmError):
    """The request is not possible."""

    exit_code = 2


class ConfigError(UsageError):
    """An ensemble file or an option has a value that is not allowed."""


class TemplateError(ConfigError):
    """A chat template is broken, refuses the messages, or leaves one of them out."""


class UnsupportedError(UsageError):
    """A combination without an exact meaning, or one that a member cannot do."""


class ModelNotFoundError(UsageError):
    """There is no model of this name or at this path."""


class PromptTooLongError(UsageError):
    """The prompt has more tokens than a member's context holds."""


class ModelLoadError(MixlmError):
    """The model exists but cannot be loaded."""


class TokenizerError(MixlmError):
    """The tokens of a tokenizer cannot be mapped to exact bytes."""


class EngineError(MixlmError):
    """An engine or a server does not respond, or responds wrongly."""


class RequestRefusedError(EngineError):
    """A server refuses a request for what is in it. That says nothing about other requests."""


class GenerationInterruptedError(EngineError):
    """A member failed during generation. `completion` is what was generated until then."""

    def __init__(self, message: str, hint: str | None = None, completion: Any = None) -> None:
        super().__init__(message, hint)
        self.completion = completion


ReplyCutError = GenerationInterruptedError  # the old name


class DownloadError(MixlmError):
    """A file could not be downloaded, or its checksum is wrong."""


class MemoryLimitError(MixlmError):
    """The device is out of memory."""


# What torch, safetensors and the system say when memory is out, where the error has no type of its own.
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory")


def is_memory_error(error: Exception) -> bool:
    """Whether an error means that memory is out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    return not isinstance(error, MixlmError) and any(part in str(error).lower() for part in _NO_MEMORY)


@contextmanager
def memory_errors(name: str) -> Iterator[None]:
    """Turn errors that mean that memory is out into MemoryLimitError. name: of the model."""
    try:
        yield
    except Exception as error:
        if is_memory_error(error):
            raise MemoryLimitError(
                f"the device has too little memory for {name}", "use --dtype bfloat16, or smaller members"
            ) from error
        raise


_FLAG = re.compile(
    r"(?P<command>mixlm (?:fit|score|eval)(?: --[\w-]+(?: (?!--|to\b|or\b)[\w.-]+)?)+)"
    r"|(?<!\S)--(?P<name>alpha|engine|method|unit|top-k|dtype|data|draft|device|device-map|graphs|rule|system) "
    r"(?P<value>\w+(?:[.-]\w+)*)(?: \(engine='\w+'[^)]*\))?"
    r"|(?<!\S)--(?P<no>no-)?(?P<switch>ends|observe|router|rule)(?![\w-])"
    r"|(?<=for example )(?P<list>[\d.]+(?:,[\d.]+)+)"
)


def in_python_words(text: str) -> str:
    """Return a message with keywords, such as `top_k=10`, in place of the options of the command line.

    Whole commands, such as `mixlm fit --router`, stay as they are.
    """

    def keyword(match: re.Match[str]) -> str:
        if match["command"]:
            return match[0]
        if match["switch"]:
            return f"{match['switch']}=False" if match["no"] else match["switch"]
        if match["list"]:
            return f"[{match['list'].replace(',', ', ')}]"
        value = match["value"] if re.fullmatch(r"\d+(\.\d+)?|[A-Z]+", match["value"]) else repr(match["value"])
        return f"{match['name'].replace('-', '_')}={value}"

    return _FLAG.sub(keyword, text)


def close_matches(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Return at most `limit` of the `known` names that are similar to `name`, the closest first."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    return [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=limit, cutoff=0.6)]


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Return a hint with the known names closest to `name`, None if there is none."""
    matches = close_matches(name, known)
    return f"did you mean {' or '.join(repr(match) for match in matches)}?" if matches else None
