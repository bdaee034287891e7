"""Constrained decoding: which tokens keep the text a prefix of a language: JSON of a schema, or calls of functions.

The work is done by llguidance (https://github.com/guidance-ai/llguidance), which walks a trie of a vocabulary's bytes
along a parser of the schema's grammar. The vocabulary it is given has an additional token for each of the 256 bytes,
and one for end-of-text. A text is thus consumed byte by byte, whatever tokens the members have for it; where the text
has changed, the parser rolls back to the last common byte.

The language is what llguidance makes of a schema: properties come in the schema's order, unknown keywords are refused,
and between two tokens of JSON there is at most a space, or a line break followed by spaces. Without that limit a small
model may generate whitespace for ever.

Calls are in the common form (`tokenization/tool_calls`), of which only the arguments are open: JSON of the function's
schema. Where a text may stand in their place, or in front of them, it is any text without `<tool_call>`.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mixlm.errors import ConfigError
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Ids, Tool

TokenMask = npt.NDArray[np.bool_]

# Of the cache: schemas, and the characters of all of them.
_CACHED_SCHEMAS = 16
_CACHED_CHARACTERS = 100_000
# Calls of one completion: a small model may otherwise go on for ever.
MAX_CALLS = 16
TOOL_CHOICES = ("auto", "none", "required")
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_.:/-]{1,128}")


@dataclass(frozen=True)
class Language:
    """What a completion is held to.

    Attributes:
        json_schema: Of text that is no call; None for any text, `False` for none.
        tools: The JSON schema of the arguments of each function that may be called, by name.
        max_calls: Most calls of a completion.
    """

    json_schema: Mapping[str, Any] | bool | None
    tools: Mapping[str, Mapping[str, Any]]
    max_calls: int = 1

    @property
    def option(self) -> str:
        """The option that asks for it, for messages."""
        return "tools" if self.tools else "json_schema"


def checked_tools(tools: Any) -> tuple[Tool, ...]:
    """Return tools of any form: `Tool`, or a mapping as in OpenAI's API, with or without its `function`.

    Raises:
        ConfigError: It is none of these, two functions have one name, or one is a word of `tool_choice`.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise ConfigError(f"tools is {tools!r}; it must be a list of functions")
    checked = tuple(tool if isinstance(tool, Tool) else _tool(tool) for tool in tools)
    names = [tool.name for tool in checked]
    for tool in checked:
        if not isinstance(tool.name, str) or not _TOOL_NAME.fullmatch(tool.name):
            raise ConfigError(
                f"tools has the function name {tool.name!r}; it must be 1 to 128 letters, digits and any of _.:/-"
            )
        if tool.name in TOOL_CHOICES:
            raise ConfigError(
                f"tools has the function name {tool.name!r}, which is a word of tool_choice", "rename the function"
            )
        if not isinstance(tool.description, str) or not isinstance(tool.parameters, Mapping):
            raise ConfigError(f"tools: {tool.name} needs a text as description and a JSON object as parameters")
        if names.count(tool.name) > 1:
            raise ConfigError(f"tools has two functions named {tool.name}")
    return checked


def check_tool_choice(choice: Any, tools: Sequence[Tool]) -> None:
    """Raise ConfigError for a choice that is neither a word nor the name of a tool."""
    names = [tool.name for tool in tools]
    if choice not in (*TOOL_CHOICES, *names):
        allowed = ", ".join((*TOOL_CHOICES, *names))
        raise ConfigError(f"tool_choice is {choice!r}; it must be one of {allowed}")
    if choice == "required" and not tools:
        raise ConfigError("tool_choice is 'required', and there are no tools", "give tools")


def _tool(tool: Any) -> Tool:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function" or "name" not in function:
        raise ConfigError(f"tools has {tool!r}; it must be a mixlm.Tool, or a dict with name, description, parameters")
    return Tool(function["name"], function.get("description") or "", function.get("parameters") or {})


class Matcher:
    """Tells which tokens of one vocabulary may follow a text.

    It is given whole texts, and consumes each from where it differs from the last one.
    """

    def __init__(self, parser: Any, vocabulary: Vocabulary) -> None:
        self._parser = parser
        self._size = vocabulary.size
        self._ends = sorted(vocabulary.end_ids)
        self._consumed = b""

    def allowed(self, text: bytes) -> TokenMask | None:
        """Return which ids keep the text a prefix of the language.

        Returns:
            bool (vocab,), with the end-of-text ids where the text is complete; None for a text that is not a prefix
            itself: a draft that is going to be rejected.

        Raises:
            ConfigError: The schema is too complex for the parser.
        """
        common = _common_length(self._consumed, text)
        if common < len(self._consumed):
            self._parser.rollback(len(self._consumed) - common)
        rest = text[common:]
        count = self._parser.try_consume_tokens([self._size + byte for byte in rest])
        self._consumed = text[: common + count]
        if count == len(rest) and not self._parser.is_error():
            bits = np.frombuffer(self._parser.compute_bitmask(), dtype=np.uint8)
            marks = np.unpackbits(bits, count=self._size + 257, bitorder="little").view(np.bool_)
            marks[self._ends] = marks[-1]
            if not self._parser.is_error():
                return marks[: self._size]
        if self._parser.is_error():
            from mixlm.core.grammar_compiler import first_line

            raise ConfigError(f"json_schema is too complex for its parser: {first_line(self._parser.get_error())}")
        return None


@dataclass(frozen=True, eq=False)
class Grammar:
    """A language's grammar for one vocabulary.

    Attributes:
        parser: llguidance's, at the beginning of a text.
        vocabulary: The vocabulary.
        byte_ids: For each byte that JSON can contain, the id of the token that is this byte, -1 for none, int64 (n,).
        option: The option that asks for the language, for messages.
    """

    parser: Any
    vocabulary: Vocabulary
    byte_ids: Ids
    option: str

    def matcher(self) -> Matcher:
        """Return a matcher for a new text."""
        return Matcher(self.parser.deep_copy(), self.vocabulary)


class GrammarCache:
    """The grammars of an ensemble's members: tries are built once, the latest schemas cached. It is thread-safe."""

    def __init__(self, vocabularies: Sequence[Vocabulary]) -> None:
        self._vocabularies = tuple(vocabularies)
        self._tries: dict[int, tuple[Any, Ids]] = {}
        self._known: OrderedDict[str, list[Grammar]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_vocabularies(self) -> int:
        """For how many vocabularies a grammar is compiled."""
        return len(set(map(id, self._vocabularies)))

    def for_language(self, language: Language, check: Callable[[str], None] | None = None) -> list[Grammar]:
        """Return each member's grammar of a language.

        Args:
            language: Schemas of text and of calls.
            check: Called with the grammar's source before it is compiled, which may take long; raises to refuse it. By
                default it refuses what is too deep for the compiler (`grammar_check`).

        Raises:
            ConfigError: A schema cannot be enforced, or llguidance is not installed.
        """
        from mixlm.core.grammar_compiler import compile_language  # where nothing is held to one, none is needed

        try:
            key = json.dumps([language.json_schema, language.tools, language.max_calls])
        except RecursionError as error:
            raise ConfigError(f"{language.option} is nested too deeply to be compiled", "make it flatter") from error
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{language.option} is not JSON: {error}") from error
        with self._lock:
            grammars = self._known.get(key)
        # Built outside the lock, so that a request with a cached schema does not wait for a new one.
        try:
            grammars = grammars or [
                Grammar(parser, vocabulary, byte_ids, language.option)
                for vocabulary, (parser, byte_ids) in zip(
                    self._vocabularies, compile_language(key, self._vocabularies, self._tries, check), strict=True
                )
            ]
        except ConfigError as error:
            raise ConfigError(error.message.replace("json_schema", language.option, 1), error.hint) from error
        except RecursionError as error:
            raise ConfigError(f"{language.option} is nested too deeply: {error}") from error
        with self._lock:
            self._known[key] = grammars
            self._known.move_to_end(key)
            while len(self._known) > 1 and (
                len(self._known) > _CACHED_SCHEMAS or sum(map(len, self._known)) > _CACHED_CHARACTERS
            ):
                self._known.popitem(last=False)
        return grammars


def _common_length(a: bytes, b: bytes) -> int:
    """Return the length of the longest common prefix."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
