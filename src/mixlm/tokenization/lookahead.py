"""How far a pre-tokenizer's pattern reads: which of its decisions no later text can change.

A pattern decides at each character whether a match begins there, and where it ends. The decision is final once no way
to go on reading is left: `PatternReach` follows all ways at once, as the positions of the pattern (Glushkov, 1961) that
could consume a character. Lookaheads are ways like any other. Whether a position takes a character is asked of the
regular-expression library that the tokenizer itself uses. Every simplification keeps more ways than there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

_MOST_POSITIONS = 600
_CLASS_ESCAPES = frozenset("sSdDwWhH")
_CONTROL_ESCAPES = frozenset("rntfvea")


class UnprovableError(Exception):
    """A pattern may look behind, or has a part whose reach is not known here."""


class _Fragment(NamedTuple):
    """A part of a pattern: whether it can be empty, and the positions (as bits) that it begins and ends with."""

    nullable: bool
    first: int
    last: int


_EMPTY = _Fragment(True, 0, 0)


class PatternReach:
    """What a pattern can read.

    Args:
        pattern: A regular expression in Oniguruma's syntax, as `tokenizers.Regex` takes it.
        literal: The pattern is a string to be found as it stands.

    Raises:
        UnprovableError: the pattern looks behind or has a part that is not known here.
    """

    def __init__(self, pattern: str, *, literal: bool = False) -> None:
        self._atoms: list[str] = []  # by position
        self._follow: list[int] = []
        self._folds = False
        self._source, self._at = pattern, 0
        if literal:
            whole = self._join([self._position(_escaped(character)) for character in pattern])
        else:
            whole = self._alternatives(folds=False)
            if self._at < len(pattern):
                raise UnprovableError
        self.nullable = whole.nullable
        self._distinct = {atom: sum(1 << i for i, a in enumerate(self._atoms) if a == atom) for atom in self._atoms}
        self._every = (1 << len(self._atoms)) - 1
        self._takers = lru_cache(1 << 16)(self._find_takers)  # some scripts have tens of thousands of characters
        self._before = lru_cache(4096)(self._find_before)

    def limit(self, text: str, end: int) -> int:
        """Return an offset before which every decision depends on the first `end` characters of the text alone."""
        reading = self._every
        for start in range(end - 1, -1, -1):
            takers = self._takers(text[start])
            reading = takers if start == end - 1 or self._folds_apart(text[start]) else self._before(takers, reading)
            if not reading:
                return start + 1
        return 0

    def joins(self, left: str, right: str) -> bool:
        """Return whether the pattern may read two adjacent characters in one go."""
        if self._folds_apart(left) or self._folds_apart(right):
            return True
        return self._before(self._takers(left), self._takers(right)) != 0

    def _folds_apart(self, character: str) -> bool:
        """Whether a character may match several letters of the pattern at once, as "ﬆ" does "st" where case is free."""
        return self._folds and len(character.casefold()) > 1

    def _find_takers(self, character: str) -> int:
        if self._folds_apart(character):
            return self._every
        return sum(positions for atom, positions in self._distinct.items() if _takes(atom, character))

    def _find_before(self, candidates: int, following: int) -> int:
        """Return those candidates that one of the following positions can come after."""
        positions = 0
        while candidates:
            bit = candidates & -candidates
            candidates ^= bit
            if self._follow[bit.bit_length() - 1] & following:
                positions |= bit
        return positions

    # The parser: each method reads from `_at` on and returns a fragment.

    def _alternatives(self, *, folds: bool) -> _Fragment:
        parts = [_EMPTY]
        options = []
        while self._at < len(self._source) and self._source[self._at] != ")":
            if self._accept("|"):
                options.append(self._join(parts))
                parts = []
                continue
            start = self._at
            if self._source.startswith("(?", start) and (flags := _flags_alone(self._source, start)) is not None:
                self._at += len(flags) + 3
                folds = _folds(flags, folds)
                rest = self._alternatives(folds=folds)  # holds for what follows in the group, alternatives included
                parts.append(rest)
                break
            before = len(self._atoms)
            parts.append(self._repeated(self._atom(folds), start, before, folds))
        options.append(self._join(parts))
        return _Fragment(
            any(option.nullable for option in options),
            _union(option.first for option in options),
            _union(option.last for option in options),
        )

    def _atom(self, folds: bool) -> _Fragment:
        source, start = self._source, self._at
        character = source[start]
        self._at += 1
        if character == "(":
            return self._group(folds)
        if character == "[":
            self._at = _class_end(source, start)
            return self._position(source[start : self._at], folds)
        if character == "\\":
            self._at = _escape_end(source, start)
            return _EMPTY if source[start : self._at] == "\\z" else self._position(source[start : self._at], folds)
        if character == "$":  # the end of a line: looks at most one character ahead
            return self._position("\\n")._replace(nullable=True, last=0)
        if character in "^*+?{)":
            raise UnprovableError
        return self._position("." if character == "." else _escaped(character), folds)

    def _group(self, folds: bool) -> _Fragment:
        ahead = False
        if self._accept("?"):
            if self._accept("=") or self._accept("!"):
                ahead = True
            elif self._accept("<"):
                name_end = self._source.find(">", self._at)
                if name_end < 0 or self._source[self._at] in "=!":
                    raise UnprovableError
                self._at = name_end + 1
            elif not self._accept(">"):
                flags_end = self._source.find(":", self._at)
                if flags_end < 0:
                    raise UnprovableError
                folds = _folds(self._source[self._at : flags_end], folds)
                self._at = flags_end + 1
        elif self._source.startswith("*", self._at):
            raise UnprovableError
        inner = self._alternatives(folds=folds)
        if not self._accept(")"):
            raise UnprovableError
        return _Fragment(True, inner.first, 0) if ahead else inner

    def _repeated(self, fragment: _Fragment, start: int, before: int, folds: bool) -> _Fragment:
        """Apply the quantifiers that follow. A lazy or possessive one reads no more than a greedy one."""
        source_end = self._at
        while self._at < len(self._source) and self._source[self._at] in "*+?{":
            sign = self._source[self._at]
            self._at += 1
            if sign == "?":
                fragment = fragment._replace(nullable=True)
            elif sign in "*+":
                self._connect(fragment.last, fragment.first)
                fragment = fragment._replace(nullable=fragment.nullable or sign == "*")
            else:
                fragment = self._counted(fragment, start, source_end, folds)
        return fragment

    def _counted(self, fragment: _Fragment, start: int, source_end: int, folds: bool) -> _Fragment:
        end = self._source.find("}", self._at)
        low, comma, high = self._source[self._at : end].partition(",")
        if end < 0 or not (low + high).isdigit() or not (low or high):
            raise UnprovableError
        self._at = end + 1
        least = int(low or 0)
        highest = least if not comma else int(high) if high else None
        copies = [fragment]
        resume = self._at
        for _ in range(max(least, highest or 1) - 1):
            self._at = start
            copy = self._atom(folds)
            if self._at != source_end:  # a quantifier of a quantifier
                raise UnprovableError
            copies.append(copy)
        self._at = resume
        if highest == 0:
            return _EMPTY
        copies = [copy if i < least else copy._replace(nullable=True) for i, copy in enumerate(copies)]
        if highest is None:
            self._connect(copies[-1].last, copies[-1].first)
        return self._join(copies)

    def _join(self, parts: list[_Fragment]) -> _Fragment:
        whole = _EMPTY
        for part in parts:
            self._connect(whole.last, part.first)
            whole = _Fragment(
                whole.nullable and part.nullable,
                whole.first | (part.first if whole.nullable else 0),
                part.last | (whole.last if part.nullable else 0),
            )
        return whole

    def _connect(self, last: int, first: int) -> None:
        while last:
            bit = last & -last
            last ^= bit
            self._follow[bit.bit_length() - 1] |= first

    def _position(self, atom: str, folds: bool = False) -> _Fragment:
        if len(self._atoms) == _MOST_POSITIONS:
            raise UnprovableError
        if folds:
            # Where case is free, a class may match several letters at once ("ß" as "ss").
            if not atom.isascii() or "\\p" in atom or "\\P" in atom or atom.startswith("[^"):
                raise UnprovableError
            self._folds = True
        bit = 1 << len(self._atoms)
        self._atoms.append(f"(?i:{atom})" if folds else atom)
        self._follow.append(0)
        return _Fragment(False, bit, bit)

    def _accept(self, sign: str) -> bool:
        accepted = self._source.startswith(sign, self._at)
        self._at += len(sign) if accepted else 0
        return accepted


def _union(masks: Iterable[int]) -> int:
    result = 0
    for mask in masks:
        result |= mask
    return result


def _escaped(character: str) -> str:
    plain = character.isalnum() or character == "_" or not character.isascii()
    return character if plain else f"\\x{ord(character):02x}"


def _flags_alone(source: str, start: int) -> str | None:
    """Return the flags of a group that consists of nothing else, such as "(?i)"; None for other groups."""
    flags = source[start + 2 : max(source.find(")", start), start + 2)]
    return flags if flags and set(flags) <= set("imx-") else None


def _folds(flags: str, folds: bool) -> bool:
    """Return whether case is free under flags such as "i" and "-i"."""
    if not set(flags) <= set("i-"):
        raise UnprovableError
    on, _, off = flags.partition("-")
    return (folds or "i" in on) and "i" not in off


def _class_end(source: str, start: int) -> int:
    i = start + 1
    i += source.startswith("^", i)
    if source.startswith("]", i):
        raise UnprovableError
    while i < len(source):
        character = source[i]
        if character == "\\":
            i = _escape_end(source, i)
        elif character == "[":
            closing = source.find(":]", i)
            i = closing + 2 if source.startswith("[:", i) and closing > 0 else _class_end(source, i)
        elif character == "]":
            return i + 1
        else:
            i += 1
    raise UnprovableError


def _escape_end(source: str, start: int) -> int:
    """Return where an escape that stands for one character ends. Raises UnprovableError for all others."""
    kind = source[start + 1 : start + 2]
    after = start + 2
    if kind in ("p", "P", "x", "u"):
        if source.startswith("{", after):
            end = source.find("}", after)
            if end < 0:
                raise UnprovableError
            return end + 1
        if kind in "pP":
            raise UnprovableError
        return after + (4 if kind == "u" else 2)
    if kind in _CLASS_ESCAPES or kind in _CONTROL_ESCAPES or kind == "z":
        return after
    if not kind or kind.isalnum():  # anchors, back-references, grapheme clusters, line breaks of two characters, …
        raise UnprovableError
    return after


@lru_cache(65536)
def _takes(atom: str, character: str) -> bool:
    """Return whether an atom of a pattern matches a character, by the tokenizer's own library."""
    return not _splitter(atom).pre_tokenize_str(character)


@lru_cache(4096)
def _splitter(atom: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(atom), "removed")
