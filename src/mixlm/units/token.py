"""The unit `token`: members that share a vocabulary generate token by token.

Members share a vocabulary when equal ids spell equal bytes, whatever names or sizes their tokenizers have. Ids that
only some members use (padding rows, extra special tokens) are masked. All kinds of end-of-text are one symbol.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.units.base import TextState, Unit, UnitTraits


def vocabulary_conflict(vocabularies: Sequence[Vocabulary]) -> str | None:
    """Return why the members share no vocabulary, or None when they do."""
    first = vocabularies[0]
    for other in vocabularies[1:]:
        pairs = zip(first.tokens, other.tokens, strict=False)
        differing = [i for i, (a, b) in enumerate(pairs) if a and b and a != b]
        if differing:
            i, count = differing[0], len(differing)
            a, b = first.tokens[i], other.tokens[i]
            return f"{count} ids spell different tokens, the first of them {i}: {a!r} and {b!r}"
    return None


class TokenState(TextState):
    """The shared ids generated so far, after each member's own prompt."""

    def append(self, symbol: int) -> None:
        """Add one shared id."""
        self._text += self._unit.symbol_bytes(symbol)
        for buffer in self._buffers:
            buffer.replace_tail(0, [symbol])

    def rollback(self, count: int) -> None:
        """Remove the last `count` ids."""
        ids = self._buffers[0].ids
        removed = sum(len(self._unit.symbol_bytes(int(i))) for i in ids[len(ids) - count :])
        del self._text[len(self._text) - removed :]
        for buffer in self._buffers:
            buffer.replace_tail(count, [])


class TokenUnit(Unit):
    """Symbols are the shared ids, and the state of a text is the ids themselves."""

    name = "token"
    traits = UnitTraits(shared_vocabulary=True)
    state_type = TokenState

    def __init__(self, vocabularies: Sequence[Vocabulary]) -> None:
        self.end = max(vocabulary.size for vocabulary in vocabularies)
        common_size = min(vocabulary.size for vocabulary in vocabularies)
        shared = np.flatnonzero([all(v.tokens[i] for v in vocabularies) for i in range(common_size)])
        self._pieces = vocabularies[0].tokens
        self._symbols = []
        for vocabulary in vocabularies:
            symbols = np.full(vocabulary.size, -1, dtype=np.int64)
            symbols[shared] = shared
            symbols[list(vocabulary.end_ids)] = self.end
            self._symbols.append(symbols)
