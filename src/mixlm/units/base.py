"""What a unit is: the symbols that the members of an ensemble share, and the state of a text in them.

A unit fixes which tokens a member may sample, which shared symbol each of them stands for (the map `K_i`), and which
tokens a member has for a text (the function `τ_i`). A symbol is an integer; the largest one is end-of-text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from mixlm.choices import METHODS, Method
from mixlm.types import Ids

MixtureStrategy = Literal["mixture", "word_mixture", "byte_mixture"]


@dataclass(frozen=True)
class UnitTraits:
    """What a unit can do. Code outside `units` asks for these, never for a unit's name or class.

    methods: decoding methods that can sample the target distribution. mixture: the strategy behind the method
    `mixture`. shared_vocabulary: equal ids are the same token for every member. full_distributions: one forward gives
    a member's distribution over all symbols; where it does not, that distribution can be sampled and no more.
    counts_bytes: a text is counted in bytes, and may end inside a member's token.
    """

    methods: tuple[Method, ...] = METHODS
    mixture: MixtureStrategy = "mixture"
    shared_vocabulary: bool = False
    full_distributions: bool = True
    counts_bytes: bool = False


class TextView(Protocol):
    """The text generated so far, to be read."""

    def ids(self, member: int) -> Ids:
        """Return the member's prompt and its tokens for the text: int64 (n,), valid until the state changes."""
        ...

    def prompt_length(self, member: int) -> int:
        """Return the length of the member's prompt in tokens."""
        ...

    def tail(self, length: int) -> bytes:
        """Return at most the last `length` bytes of the text."""
        ...


class TokenBuffer:
    """One member's tokens: a prompt, then tokens whose end can be replaced."""

    def __init__(self, prompt: Ids) -> None:
        self._buffer = np.zeros(max(2 * prompt.size, 256), dtype=np.int64)
        self._buffer[: prompt.size] = prompt
        self._length = prompt.size

    def replace_tail(self, dropped: int, ids: Sequence[int] | Ids) -> None:
        """Drop the last `dropped` tokens and append `ids`."""
        start = self._length - dropped
        self._length = start + len(ids)
        if self._length > self._buffer.size:
            larger = np.zeros(2 * self._length, dtype=np.int64)
            larger[:start] = self._buffer[:start]
            self._buffer = larger
        self._buffer[start : self._length] = ids

    @property
    def ids(self) -> Ids:
        """All tokens, as a view that the next `replace_tail` may change."""
        return self._buffer[: self._length]


class TextState(ABC):
    """The text generated so far, as every member reads it; it grows at its end and can be rolled back."""

    def __init__(self, unit: Unit, prompts: Sequence[Ids]) -> None:
        self._unit = unit
        self._text = bytearray()
        self._prompt_lengths = [prompt.size for prompt in prompts]
        self._buffers = [TokenBuffer(prompt) for prompt in prompts]

    @abstractmethod
    def append(self, symbol: int) -> None:
        """Add a symbol that is not end-of-text."""

    @abstractmethod
    def rollback(self, count: int) -> None:
        """Remove the last `count` symbols."""

    def __len__(self) -> int:
        """How many bytes the text has."""
        return len(self._text)

    def ids(self, member: int) -> Ids:
        """Return the member's prompt and its tokens for the text: int64 (n,), valid until the state changes."""
        return self._buffers[member].ids

    def prompt_length(self, member: int) -> int:
        """Return the length of the member's prompt in tokens."""
        return self._prompt_lengths[member]

    def tail(self, length: int) -> bytes:
        """Return at most the last `length` bytes of the text."""
        return self.substring(max(len(self._text) - length, 0))

    def substring(self, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes between two offsets, or up to the end."""
        return bytes(self._text[start:stop])


class Unit:
    """The symbols in which members share one text. end: the symbol of end-of-text. state_type: of its texts."""

    name: str
    traits: UnitTraits
    state_type: type[TextState]
    end: int
    _symbols: list[Ids]
    _pieces: Sequence[bytes]

    def symbols(self, member: int) -> Ids:
        """Return the shared symbol of each of the member's ids, int64 (vocab,); -1 for ids it may not sample."""
        return self._symbols[member]

    def symbol_bytes(self, symbol: int) -> bytes:
        """Return the bytes that a symbol adds to the text: none for end-of-text."""
        return b"" if symbol == self.end else self._pieces[symbol]

    def without_owner(self, symbols: Ids) -> Ids:
        """Return symbols, int64 (n,), that are equal for equal bytes, whichever member they belong to."""
        return symbols

    def initial_state(self, prompts: Sequence[Ids]) -> TextState:
        """Return the state of an empty text after each member's prompt."""
        return self.state_type(self, prompts)


def mark_duplicates(symbols: Ids) -> npt.NDArray[np.bool_]:
    """Mark the ids that share their symbol with another id, (vocab,): their probabilities have to be added up."""
    sampled = symbols[symbols >= 0]
    counts = np.bincount(sampled) if sampled.size else np.zeros(1, dtype=np.int64)
    marks: npt.NDArray[np.bool_] = (symbols >= 0) & (counts[symbols] > 1)
    return marks
