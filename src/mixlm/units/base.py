"""What members share when they write one text: units, and the state of a text in them.

A unit fixes three things: which tokens a member may draw, which shared symbol each of them stands for (the map `K_i`),
and which tokens each member reads for a state (the function `τ_i`). Symbols are numbers; the last one is end-of-text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mixlm.types import Ids


class Text(Protocol):
    """What has been written so far, as it can be looked at."""

    def ids(self, member: int) -> Ids:
        """Return the member's prompt and its tokens for the text: int64 (n,), valid until the state changes."""
        ...

    def prompt_length(self, member: int) -> int:
        """Return how many of `ids` are the prompt's."""
        ...

    def tail(self, length: int) -> bytes:
        """Return at most the last `length` bytes of the text."""
        ...


class State(Text, Protocol):
    """What has been written so far, as every member reads it."""

    def append(self, symbol: int) -> None:
        """Add a symbol that is not end-of-text."""
        ...

    def cut(self, count: int) -> None:
        """Take back the last `count` symbols."""
        ...


class Unit(Protocol):
    """A way for members to share a text, and the symbols it is written in."""

    name: str
    end: int

    def symbols(self, member: int) -> Ids:
        """Return the shared symbol of each of the member's ids, int64 (vocab,); -1 for those it may not draw."""
        ...

    def data(self, symbol: int) -> bytes:
        """Return the bytes a symbol adds to the text."""
        ...

    def begin(self, prompts: Sequence[Ids]) -> State:
        """Return the empty state behind each member's prompt."""
        ...


class TokenBuffer:
    """One member's tokens: a prompt, then a reply whose end may be taken back and written anew."""

    def __init__(self, prompt: Ids) -> None:
        self._room = np.zeros(max(2 * prompt.size, 256), dtype=np.int64)
        self._room[: prompt.size] = prompt
        self._length = prompt.size

    def rewrite(self, fallen: int, ids: Sequence[int] | Ids) -> None:
        """Drop the last `fallen` tokens and add `ids`."""
        start = self._length - fallen
        self._length = start + len(ids)
        if self._length > self._room.size:
            room = np.zeros(2 * self._length, dtype=np.int64)
            room[:start] = self._room[:start]
            self._room = room
        self._room[start : self._length] = ids

    @property
    def ids(self) -> Ids:
        """All tokens, as a view that the next `rewrite` may change."""
        return self._room[: self._length]


def doubled(symbols: Ids) -> npt.NDArray[np.bool_]:
    """Mark the ids whose symbol another id has too, (vocab,): their probabilities have to be added up."""
    drawn = symbols[symbols >= 0]
    counts = np.bincount(drawn) if drawn.size else np.zeros(1, dtype=np.int64)
    marks: npt.NDArray[np.bool_] = (symbols >= 0) & (counts[symbols] > 1)
    return marks
