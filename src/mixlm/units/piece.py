"""The unit `piece`: members of different vocabularies write tokens that meet as byte strings.

Two tokens are one symbol when their bytes are equal, whatever ids or spellings they have; end-of-text of every kind is
one symbol. The state is bytes. Each member reads `template ⊕ enc(bytes)`, its own canonical tokens of the whole text,
so what it is asked depends on the text alone and never on who wrote which part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixlm.tokenization.incremental import Encoder, Growing
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Ids
from mixlm.units.base import TokenBuffer


class PieceUnit:
    """Symbols number the distinct byte strings of all members' tokens."""

    name = "piece"

    def __init__(
        self, vocabularies: Sequence[Vocabulary], encoders: Sequence[Encoder], first: Sequence[bytes] = ()
    ) -> None:
        self._encoders = list(encoders)
        table = {data: number for number, data in enumerate(first)}
        self._symbols = []
        for one in vocabularies:
            numbers = [table.setdefault(data, len(table)) if data else -1 for data in one.tokens]
            self._symbols.append(np.array(numbers, dtype=np.int64))
        self.end = len(table)
        self._pieces = list(table)
        for one, symbols in zip(vocabularies, self._symbols, strict=True):
            symbols[list(one.ends)] = self.end

    def symbols(self, member: int) -> Ids:
        """Return the shared symbol of each of the member's ids; -1 for control tokens and padding."""
        return self._symbols[member]

    def data(self, symbol: int) -> bytes:
        """Return the byte string of a symbol."""
        return self._pieces[symbol]

    def begin(self, prompts: Sequence[Ids]) -> PieceState:
        """Return the empty text behind each member's prompt."""
        return PieceState(self, self._encoders, prompts)


class PieceState:
    """The bytes written so far. A member's tokens are brought up to date when they are asked for."""

    def __init__(self, unit: PieceUnit, encoders: Sequence[Encoder], prompts: Sequence[Ids]) -> None:
        self._unit = unit
        self._text = bytearray()
        self._lengths: list[int] = []
        self._prompts = [prompt.size for prompt in prompts]
        self._buffers = [TokenBuffer(prompt) for prompt in prompts]
        self._growing = [Growing(one) for one in encoders]
        self._read = [0] * len(prompts)

    def append(self, symbol: int) -> None:
        """Add a symbol's bytes to the text."""
        self._lengths.append(len(self._text))
        self._text += self._unit.data(symbol)

    def cut(self, count: int) -> None:
        """Take back the last `count` symbols. What members read is brought up to date when they are asked."""
        if count == 0:
            return
        length = self._lengths[-count]
        del self._lengths[-count:], self._text[length:]
        for member, growing in enumerate(self._growing):
            growing.cut(length)
            if self._read[member] > length:
                self._read[member] = -1  # never the length of a text, so the next question reads it again

    def ids(self, member: int) -> Ids:
        """Return the member's prompt and its canonical tokens of the text."""
        if self._read[member] != len(self._text):
            self._buffers[member].rewrite(*self._growing[member].extend(self._text))
            self._read[member] = len(self._text)
        return self._buffers[member].ids

    def prompt_length(self, member: int) -> int:
        """Return the length of the member's prompt."""
        return self._prompts[member]

    def tail(self, length: int) -> bytes:
        """Return the last bytes of the text."""
        return bytes(self._text[max(len(self._text) - length, 0) :])
