"""How far a pre-tokenizer's pattern reads: which of its decisions no later text can change.

A pattern decides at each character whether a match begins there, and where it ends. The decision is final once no way
to go on reading is left: `PatternReach` follows all ways at once, as the positions of the pattern (Glushkov, 1961) that
could consume a character. Lookaheads are ways like any other. Whether a position takes a character is asked of the
regular-expression library that the tokenizer itself uses. Every simplification keeps more ways than there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache, reduce
from operator import or_
from typing import Any, NamedTuple

_MOST_POSITIONS = 600
# The parts of a pattern. None of them matches where it looks behind or back, or where its form is not known here.
_ESCAPE = r"\\(?:[pPxu]\{[^}]*\}|x..|u....|[sSdDwWhHrntfvea]|[\W_])"
_CLASS = "(?!)"
for _ in range(4):  # classes stand in classes
    _CLASS = rf"\[\^?+(?!\])(?:{_ESCAPE}|\[:.*?:\]|{_CLASS}|[^\[\]\\])+\]"
_GROUP = r"\((?![?*])|\(\?(?:[=!>]|<(?![=!])[^>]*>|[i-]*:|[i-]+\))"
_TOKEN = re.compile(rf"{_GROUP}|{_CLASS}|{_ESCAPE}|\\z|\{{(?:\d+,?\d*|,\d+)\}}|[^\\\[({{^]", re.DOTALL)


class UnprovableError(Exception):
    """A pattern may look behind, or has a part whose reach is not known here."""


class Reach:
    """What a stage can read: here each character by itself, and the one after it."""

    def limit(self, text: str, end: int) -> int:
        """Return an offset before which every decision depends on the first `end` characters of the text alone."""
        return next((i for i in range(end - 1, 0, -1) if not self.joins(text[i - 1], text[i])), 0)

    def joins(self, left: str, right: str) -> bool:
        """Return whether a cut between two adjacent characters may change what the stage does to either side."""
        return False


class _Fragment(NamedTuple):
    """A part of a pattern: whether it can be empty, and the positions (as bits) that it begins and ends with."""

    nullable: bool
    first: int
    last: int


_EMPTY = _Fragment(True, 0, 0)


class PatternReach(Reach):
    """What a pattern can read.

    Args:
        pattern: A regular expression in Oniguruma's syntax, as `tokenizers.Regex` takes it.

    Raises:
        UnprovableError: the pattern looks behind or has a part that is not known here.
    """

    def __init__(self, pattern: str) -> None:
        self._atoms: list[str] = []  # by position
        self._follow: list[int] = []
        self._folds = False
        self._tokens, self._at = [*_TOKEN.findall(pattern), ")"], 0
        if "".join(self._tokens) != f"{pattern})":
            raise UnprovableError
        self.nullable = self._alternatives(folds=False).nullable
        if self._at < len(self._tokens) - 1:
            raise UnprovableError
        self._distinct = {atom: sum(1 << i for i, a in enumerate(self._atoms) if a == atom) for atom in self._atoms}
        self._every = (1 << len(self._atoms)) - 1
        self._takers = lru_cache(1 << 16)(self._find_takers)  # some scripts have tens of thousands of characters
        self._before = lru_cache(4096)(self._find_before)

    def limit(self, text: str, end: int) -> int:
        """Follow all ways to read on, from the last character back to one at which none is left."""
        reading = self._every
        for start in range(end - 1, -1, -1):
            takers = self._takers(text[start])
            reading = takers if start == end - 1 or self._folds_apart(text[start]) else self._before(takers, reading)
            if not reading:
                return start + 1
        return 0

    def joins(self, left: str, right: str) -> bool:
        """Return whether it may read two adjacent characters in one go."""
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

    # The parser: each method reads tokens from `_at` on and returns a fragment.

    def _alternatives(self, *, folds: bool) -> _Fragment:
        """Read what is in a group."""
        options = [_EMPTY]
        while (token := self._tokens[self._at]) != ")":
            if token == "|":
                self._at += 1
                options.append(_EMPTY)
            elif token.startswith("(?") and token.endswith(")"):
                self._at += 1  # the flags hold for what follows in the group, alternatives included
                options[-1] = self._joined(options[-1], self._alternatives(folds=_folds(token, folds)))
            else:
                options[-1] = self._joined(options[-1], self._repeated(folds))
        return _Fragment(
            any(option.nullable for option in options),
            _union(option.first for option in options),
            _union(option.last for option in options),
        )

    def _repeated(self, folds: bool) -> _Fragment:
        """Read an atom with its quantifiers. A lazy or possessive one reads no more than a greedy one."""
        start = self._at
        fragment = self._atom(folds)
        if self._tokens[self._at][0] == "{":
            fragment = self._counted(fragment, start, folds)
        while (sign := self._tokens[self._at]) in ("*", "+", "?"):
            self._at += 1
            if sign != "?":
                self._connect(fragment.last, fragment.first)
            fragment = fragment._replace(nullable=fragment.nullable or sign != "+")
        if sign[0] == "{":  # it counts what is repeated already
            raise UnprovableError
        return fragment

    def _atom(self, folds: bool) -> _Fragment:
        token = self._tokens[self._at]
        self._at += 1
        if token[0] == "(":
            inner = self._alternatives(folds=_folds(token, folds) if token.endswith(":") else folds)
            self._at += 1
            if self._at == len(self._tokens):
                raise UnprovableError
            return _Fragment(True, inner.first, 0) if token in ("(?=", "(?!") else inner
        if token == "\\z":
            return _EMPTY
        if token == "$":  # the end of a line: looks at most one character ahead
            return self._position("\\n")._replace(nullable=True, last=0)
        if token[0] in "*+?{":
            raise UnprovableError
        return self._position(token if len(token) > 1 or token == "." else escaped(token), folds)

    def _counted(self, fragment: _Fragment, start: int, folds: bool) -> _Fragment:
        """Read how often an atom stands, which begins at a token; it is read again for each time."""
        least, comma, greatest = self._tokens[self._at][1:-1].partition(",")
        low, resume = int(least or 0), self._at + 1
        high = int(greatest) if greatest else None if comma else low
        if high is not None and high < low:
            raise UnprovableError
        copies = [fragment]
        for _ in range(max(low, high or 1) - 1):
            self._at = start
            copies.append(self._atom(folds))
        self._at = resume
        if high is None:
            self._connect(copies[-1].last, copies[-1].first)
        whole = _EMPTY
        for number, copy in enumerate(copies if high != 0 else ()):
            whole = self._joined(whole, copy if number < low else copy._replace(nullable=True))
        return whole

    def _joined(self, left: _Fragment, right: _Fragment) -> _Fragment:
        self._connect(left.last, right.first)
        return _Fragment(
            left.nullable and right.nullable,
            left.first | (right.first if left.nullable else 0),
            right.last | (left.last if right.nullable else 0),
        )

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


def _union(masks: Iterable[int]) -> int:
    return reduce(or_, masks)


def escaped(character: str) -> str:
    """Return a pattern of a character."""
    plain = character.isalnum() or character == "_" or not character.isascii()
    return character if plain else f"\\x{ord(character):02x}"


def _folds(token: str, folds: bool) -> bool:
    """Return whether case is free where flags such as "(?i:" and "(?-i)" hold."""
    on, _, off = token.partition("-")
    return (folds or "i" in on) and "i" not in off


@lru_cache(65536)
def _takes(atom: str, character: str) -> bool:
    """Return whether an atom of a pattern matches a character, by the tokenizer's own library."""
    return not _splitter(atom).pre_tokenize_str(character)


@lru_cache(4096)
def _splitter(atom: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(atom), "removed")
