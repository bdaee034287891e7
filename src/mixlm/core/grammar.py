"""Replies that are JSON of a given schema: which tokens keep a text among the beginnings of such JSON.

The work is llguidance's (https://github.com/guidance-ai/llguidance): it walks a trie of a vocabulary's bytes along a
parser of the schema's grammar. To it, a vocabulary has one more token for each of the 256 bytes, and one for the end of
a text. So a text is read byte by byte, however members cut it into tokens; where it has changed, the parser goes back
to the last byte that is the same.

The language is llguidance's reading of a schema: properties come in the schema's order, keywords that it does not know
are refused, and between two tokens of JSON there is at most a space, or a line break with spaces behind it. Without
that limit a small model may go on with whitespace for ever.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mixlm.errors import ConfigError
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Ids

TokenMask = npt.NDArray[np.bool_]

_WHITESPACE = r"( |\n {0,32})"
# Bytes that JSON in UTF-8 may hold.
_BYTES = (0x09, 0x0A, 0x0D, *range(0x20, 0xC0), *range(0xC2, 0xF5))
_KEPT = 16  # schemas that an ensemble keeps ready


class Matcher:
    """What may follow a text, for one vocabulary: texts are given whole, and read from where they differ."""

    def __init__(self, parser: Any, vocabulary: Vocabulary) -> None:
        self._parser = parser
        self._size = vocabulary.size
        self._ends = sorted(vocabulary.end_ids)
        self._read = b""

    def allowed(self, text: bytes) -> TokenMask | None:
        """Return the ids that keep the text a beginning of the language, (vocab,); its ends where it is complete.

        None for a text that is no beginning itself: a guess that is going to be given up. Raises ConfigError where the
        parser gives up.
        """
        common = _common(self._read, text)
        if common < len(self._read):
            self._parser.rollback(len(self._read) - common)
        rest = text[common:]
        took = self._parser.try_consume_tokens([self._size + one for one in rest])
        self._read = text[: common + took]
        if took == len(rest) and not self._parser.is_error():
            bits = np.frombuffer(self._parser.compute_bitmask(), dtype=np.uint8)
            marks = np.unpackbits(bits, count=self._size + 257, bitorder="little").view(np.bool_)
            marks[self._ends] = marks[-1]
            if not self._parser.is_error():
                return marks[: self._size]
        if self._parser.is_error():
            raise ConfigError(f"json_schema is too much for its parser: {_first_line(self._parser.get_error())}")
        return None


class Grammar:
    """A schema on one vocabulary. byte_ids: an id for each byte that JSON may hold, -1 for none, int64 (n,)."""

    def __init__(self, parser: Any, vocabulary: Vocabulary, byte_ids: Ids) -> None:
        self._parser = parser
        self._vocabulary = vocabulary
        self.byte_ids = byte_ids

    def matcher(self) -> Matcher:
        """Begin a text."""
        return Matcher(self._parser.deep_copy(), self._vocabulary)


class GrammarCache:
    """The grammars of an ensemble's members. Tries are made once, and the latest schemas kept; threads may share it."""

    def __init__(self, vocabularies: Sequence[Vocabulary]) -> None:
        self._vocabularies = tuple(vocabularies)
        self._tries: dict[int, tuple[Any, Ids]] = {}
        self._known: OrderedDict[str, list[Grammar]] = OrderedDict()
        self._lock = threading.Lock()

    def for_schema(self, schema: Mapping[str, Any]) -> list[Grammar]:
        """Return each member's grammar of a JSON schema.

        Raises ConfigError for a schema that cannot be held to, and where llguidance is not installed.
        """
        try:
            key = json.dumps(schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"json_schema is no JSON: {error}") from error
        with self._lock:
            found = self._known.get(key)
        # Outside the lock: whoever asks for a schema that is known does not wait for one that is being read.
        found = found or self._made(key)
        with self._lock:
            self._known[key] = found
            self._known.move_to_end(key)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return found

    def _made(self, schema: str) -> list[Grammar]:
        library = _library()
        source = _source(library, schema)
        made: dict[int, Grammar] = {}
        for one in self._vocabularies:
            if id(one) not in made:
                trie, byte_ids = self._trie(library, one)
                parser = library.LLMatcher(trie, source, log_level=0)
                if parser.is_error():
                    raise _refused(parser.get_error())
                made[id(one)] = Grammar(parser, one, byte_ids)
        return [made[id(one)] for one in self._vocabularies]

    def _trie(self, library: Any, vocabulary: Vocabulary) -> tuple[Any, Ids]:
        if id(vocabulary) not in self._tries:
            single = {token: i for i, token in enumerate(vocabulary.tokens) if len(token) == 1}
            byte_ids = np.array([single.get(bytes([one]), -1) for one in _BYTES], dtype=np.int64)
            self._tries[id(vocabulary)] = library.LLTokenizer(_Tokens(vocabulary)), byte_ids
        return self._tries[id(vocabulary)]


class _Tokens:
    """A vocabulary as llguidance takes it, with a token for each byte and one for the end behind its own."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._size = vocabulary.size
        self.eos_token_id = self._size + 256
        self.special_token_ids = [self.eos_token_id]
        self.tokens = [*vocabulary.tokens, *(bytes([b]) for b in range(256)), b"<end>"]

    def __call__(self, text: str | bytes) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        return [self._size + one for one in data]


def _common(a: bytes, b: bytes) -> int:
    """Return the length of the longest common beginning."""
    if b.startswith(a):
        return len(a)
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ConfigError(f"json_schema needs llguidance: {error}", "pip install 'mixlm[grammar]'") from error
    return llguidance


def _source(library: Any, schema: str) -> str:
    """Return a schema as llguidance's grammar. Raises ConfigError for one that it cannot read.

    Nothing is forced: where one text alone can follow, members still write it in tokens of their own.
    """
    whole = json.loads(schema, parse_int=_exact)
    whole.setdefault("x-guidance", {"whitespace_pattern": _WHITESPACE})
    lark = f'%llguidance {{"no_forcing": true}}\nstart: %json {json.dumps(whole)}'
    source: str = library.LLMatcher.grammar_from_lark(lark)
    failed, messages = library.LLMatcher.validate_grammar_with_warnings(source)
    if failed:
        raise _refused(messages[0])
    return source


def _exact(digits: str) -> int:
    """Return an integer of a schema. Raises ConfigError for one that llguidance would round."""
    if abs(number := int(digits)) > 2**53:
        raise ConfigError(f"json_schema has the integer {digits[:40]}; it must be at most 2^53 = {2**53}")
    return number


def _refused(message: str) -> ConfigError:
    return ConfigError(f"json_schema cannot be held to: {_first_line(message)}")


def _first_line(message: str) -> str:
    return (message.strip() or "it says nothing").splitlines()[0]
