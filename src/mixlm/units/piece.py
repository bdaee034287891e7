"""The unit `piece`: members with different vocabularies, whose tokens meet as byte strings.

Two tokens are the same symbol when their bytes are equal, whatever their ids or spellings. All kinds of end-of-text are
one symbol. The state of a text is its bytes. Each member reads `template ⊕ enc(bytes)`, its own canonical tokens of the
whole text, so its distribution depends on the text alone and never on which member sampled which part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixlm.tokenization.incremental import Encoder, IncrementalEncoder
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Ids
from mixlm.units.base import TextState, Unit, UnitTraits


class PieceState(TextState):
    """The bytes generated so far. A member's tokens are brought up to date when `ids` asks for them."""

    def __init__(self, unit: PieceUnit, prompts: Sequence[Ids]) -> None:
        super().__init__(unit, prompts)
        self._lengths: list[int] = []  # of the text in front of each symbol
        self._encodings = [IncrementalEncoder(encoder) for encoder in unit.encoders]
        self._encoded = [0] * len(prompts)  # length of the text that each buffer stands for

    def append(self, symbol: int) -> None:
        """Add a symbol's bytes to the text."""
        self._lengths.append(len(self._text))
        self._text += self._unit.symbol_bytes(symbol)

    def rollback(self, count: int) -> None:
        """Remove the last `count` symbols."""
        if count == 0:
            return
        length = self._lengths[-count]
        del self._lengths[-count:], self._text[length:]
        for member, encoding in enumerate(self._encodings):
            encoding.truncate(length)
            if self._encoded[member] > length:
                self._encoded[member] = -1  # no text has this length, so the next `ids` encodes again

    def ids(self, member: int) -> Ids:
        """Return the member's prompt and its canonical tokens of the text."""
        if self._encoded[member] != len(self._text):
            self._buffers[member].replace_tail(*self._encodings[member].update(self._text))
            self._encoded[member] = len(self._text)
        return self._buffers[member].ids


class PieceUnit(Unit):
    """Symbols number the distinct byte strings of all members' tokens.

    Args:
        vocabularies: One a member.
        encoders: One a member.
        first: Byte strings that get the first symbols, whether or not a member has a token for them.
    """

    name = "piece"
    traits = UnitTraits()
    state_type: type[TextState] = PieceState

    def __init__(
        self, vocabularies: Sequence[Vocabulary], encoders: Sequence[Encoder], first: Sequence[bytes] = ()
    ) -> None:
        self.encoders = list(encoders)
        symbol_of = {piece: symbol for symbol, piece in enumerate(first)}
        self._symbols = []
        for vocabulary in vocabularies:
            symbols = [symbol_of.setdefault(piece, len(symbol_of)) if piece else -1 for piece in vocabulary.tokens]
            self._symbols.append(np.array(symbols, dtype=np.int64))
        self.end = len(symbol_of)
        self._pieces = list(symbol_of)
        for vocabulary, array in zip(vocabularies, self._symbols, strict=True):
            array[list(vocabulary.end_ids)] = self.end
