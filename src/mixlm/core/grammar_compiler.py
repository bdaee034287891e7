"""Compiles a language into grammars: llguidance's source of it, and a parser for each vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mixlm.core.grammar_check import check_depth
from mixlm.errors import ConfigError
from mixlm.tokenization.tool_calls import CALL_BEGIN, CALL_END, call_head
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Ids

_WHITESPACE = r"( |\n {0,32})"
# Bytes that JSON in UTF-8 can contain.
_BYTES = (0x09, 0x0A, 0x0D, *range(0x20, 0xC0), *range(0xC2, 0xF5))

Tries = dict[int, tuple[Any, Ids]]  # llguidance's trie of each vocabulary by its `id`, and `Grammar.byte_ids`


def compile_language(
    key: str, vocabularies: Sequence[Vocabulary], tries: Tries, check: Callable[[str], None] | None
) -> list[tuple[Any, Ids]]:
    """Return llguidance's parser of a language for each vocabulary, and `Grammar.byte_ids`.

    Args:
        key: The language as JSON: schemas of text and of calls, and the most calls.
        vocabularies: The vocabularies.
        tries: Those that were built before; new ones are added.
        check: See `GrammarCache.for_language`.

    Raises:
        ConfigError: A schema cannot be enforced, or llguidance is not installed.
    """
    library = _library()
    text_schema, tools, max_calls = json.loads(key, parse_int=_exact)
    source = _grammar_source(library, text_schema, tools, max_calls)
    check = check or check_depth
    check(source)
    parsers: dict[int, tuple[Any, Ids]] = {}
    for number, vocabulary in {id(vocabulary): vocabulary for vocabulary in vocabularies}.items():
        if number not in tries:
            single = {token: i for i, token in enumerate(vocabulary.tokens) if len(token) == 1}
            byte_ids = np.array([single.get(bytes([byte]), -1) for byte in _BYTES], dtype=np.int64)
            tries[number] = library.LLTokenizer(_TokenizerWrapper(vocabulary)), byte_ids
        trie, byte_ids = tries[number]
        parser = library.LLMatcher(trie, source, log_level=0)
        if parser.is_error():
            raise _refused(parser.get_error(), _function_at_fault(library, trie, tools))
        parsers[number] = parser, byte_ids
    _check_names(library, tries[id(vocabularies[0])][0], vocabularies[0], (text_schema, *tools.values()), check)
    return [parsers[id(vocabulary)] for vocabulary in vocabularies]


def _check_names(
    library: Any, trie: Any, vocabulary: Vocabulary, schemas: Sequence[Any], check: Callable[[str], None]
) -> None:
    """Raise ConfigError where an object ends in nothing: `patternProperties` match no name besides `properties`.

    llguidance offers a comma there, after which no property can follow. An object of the other names alone shows
    it: where there are none, nothing can follow its brace.
    """
    from mixlm.core.limited_objects import LimitedObject, limited_objects

    objects: dict[str, LimitedObject] = {}
    for schema in schemas:
        if "patternProperties" in json.dumps(schema):
            for limited in limited_objects(schema):
                objects[_schema_source({"anyOf": [{"type": "null"}, limited.others]})] = limited
    if not objects:
        return
    # Each after its number. `null` stands for an object that llguidance leaves out, since it has no other names.
    rules = [f'object_{i}: "{i}:" %json {source}' for i, source in enumerate(objects)]
    lark = _lark(" | ".join(f"object_{i}" for i in range(len(objects))), rules)
    source = library.LLMatcher.grammar_from_lark(lark)
    check(source)
    parser = library.LLMatcher(trie, source, log_level=0)
    if parser.is_error():
        raise _refused(parser.get_error())
    tokenize = _TokenizerWrapper(vocabulary)
    for i, limited in enumerate(objects.values()):
        own = parser.deep_copy()
        own.try_consume_tokens(tokenize(f"{i}:{{ "))
        own.compute_bitmask()
        if own.is_error():
            names, patterns = ", ".join(limited.names), ", ".join(limited.patterns)
            raise ConfigError(
                f"json_schema cannot be enforced: no other name than those in properties ({names}) matches "
                f"patternProperties ({patterns})",
                "leave patternProperties out there",
            )


class _TokenizerWrapper:
    """A vocabulary as llguidance takes it: its tokens, then one for each byte, then one for end-of-text."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._size = vocabulary.size
        self.eos_token_id = self._size + 256
        self.special_token_ids = [self.eos_token_id]
        self.tokens = [*vocabulary.tokens, *(bytes([byte]) for byte in range(256)), b"<end>"]

    def __call__(self, text: str | bytes) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        return [self._size + byte for byte in data]


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ConfigError(f"json_schema needs llguidance: {error}", "pip install 'mixlm[grammar]'") from error
    return llguidance


def _grammar_source(library: Any, text: Any, tools: Mapping[str, Any], max_calls: int = 1) -> str:
    """Return a language as llguidance's grammar. Raises ConfigError for one that llguidance would read differently.

    Args:
        library: llguidance.
        text: A JSON schema of text without calls; None for any text, False for none.
        tools: JSON schemas by the name of the function.
        max_calls: Most calls.
    """
    rules = []
    if text is not None and text is not False:
        rules.append(f"text: %json {_schema_source(text)}")
    if tools:
        begin, more = json.dumps(CALL_BEGIN), json.dumps("\n" + CALL_BEGIN)
        calls = f"call ({more} call){{0,{max_calls - 1}}}" if max_calls > 1 else "call"
        rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
        for i, (name, schema) in enumerate(tools.items()):
            arguments = _schema_source(_arguments_schema(schema, name))
            rules.append(f"call_{i}: {json.dumps(call_head(name))} %json {arguments} {json.dumps(CALL_END)}")
        if text is None:
            # The shortest text that ends in the mark: it has only one.
            rules.append(f"begin[lazy]: TEXT {begin}")
            rules.append(f"TEXT: /(.|\\n)*/ & ~/(.|\\n)*{CALL_BEGIN}(.|\\n)*/")
            start = f"TEXT | begin {calls}"
        else:
            start = f"{begin} {calls}" + ("" if text is False else " | text")
    else:
        start = "text"
    source: str = library.LLMatcher.grammar_from_lark(_lark(start, rules))
    return source


def _lark(start: str, rules: Sequence[str]) -> str:
    """Return a grammar without forced text: where only one text can follow, members still generate their own tokens."""
    return "\n".join(['%llguidance {"no_forcing": true}', f"start: {start}", *rules])


def _schema_source(schema: Any) -> str:
    if not isinstance(schema, dict):
        raise ConfigError(f"json_schema is {schema!r}; it must be a JSON object")
    if "x-guidance" in schema:
        raise ConfigError("json_schema has the key x-guidance, which may change the language to what is not JSON")
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE}})


def _function_at_fault(library: Any, trie: Any, tools: Mapping[str, Any]) -> str | None:
    """Return the first function whose schema alone does not compile, of several; None for another fault."""
    for name, schema in tools.items():
        if library.LLMatcher(trie, _grammar_source(library, False, {name: schema}), log_level=0).is_error():
            return name
    return None


def _arguments_schema(schema: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the schema of a function's arguments: an object, with the properties that are named unless it says more.

    A function without a schema has no arguments.
    """
    if not schema:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if schema.get("type", "object") != "object":
        raise ConfigError(f"json_schema has the type {schema['type']!r} for {name}; arguments are an object")
    known = {"type", "properties", "required", "title", "description", "$defs", "definitions", "$schema", "strict"}
    closed = {"properties": {}, "additionalProperties": False} if schema.keys() <= known else {}
    return {**closed, "type": "object", **schema}


def _exact(digits: str) -> int:
    """Return an integer of a schema. Raises ConfigError for one that llguidance would round."""
    if abs(number := int(digits)) > 2**53:
        raise ConfigError(f"json_schema has the integer {digits[:40]}; it must be at most 2^53 = {2**53}")
    return number


def _refused(message: str, function: str | None = None) -> ConfigError:
    """Return the error for llguidance's message. function: the one whose schema is at fault."""
    reason = first_line(message)
    if reason.endswith(":"):  # what it announces is drawn, and then said
        said = (line.removeprefix("error: ") for line in message.splitlines() if line.startswith("error: "))
        reason = f"{reason} {next(said, '')}".rstrip(": ")
    place = "" if function is None else f" for {function}"
    return ConfigError(f"json_schema cannot be enforced{place}: {reason}")


def first_line(message: str) -> str:
    """Return the first line of an error of the library."""
    return (message.strip() or "no message").splitlines()[0]
