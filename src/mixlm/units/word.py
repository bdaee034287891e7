"""The unit `word`: one coin a word. The drawn member writes the whole word, and decides where it ends.

Members meet in words, whatever tokens they write them in: `r(w | s) = Σ_i λ_i(s) P_i(w | s)`, where s is a text in
which a word has just ended, and `P_i(w | s)` is the probability that member i, made to begin a word there, writes w and
then ends it. No member continues another's half word. No average over tokens has this law, so there is no
`conventional` and no `greedy` for it.

Where a word begins is a rule on bytes. A symbol begins a word when

    it is end-of-text; or
    its first byte is ASCII whitespace and the text's last byte is not; or
    its first byte is 0xE3 to 0xE9: it begins with a character from U+3000 to U+9FFF, which are the punctuation, kana
    and ideographs of scripts that put no spaces between words.

So a word brings the whitespace in front of it, all of it: a line break with the indentation behind it and the first
word of the line are one. The other bytes of a character are from 0x80 to 0xBF and begin nothing, so no character is
split. Hangul has spaces, and is outside the range. Symbols are never cut: where a word begins inside one (".\\n",
"of the") is no place for a coin.

A symbol says who wrote it as well as its bytes, so that the state, a function of the symbols, knows whose word it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mixlm.core.rng import Noise
from mixlm.tokenization.incremental import Encoder
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Ids, Likeliest
from mixlm.units.piece import PieceState, PieceUnit

WHITESPACE = b" \t\n\v\f\r"
_UNSPACED = range(0xE3, 0xEA)
_NEVER, _BEHIND_TEXT, _ALWAYS = 0, 1, 2


def begins_word(symbol: bytes, before: bytes) -> bool:
    """Tell whether a symbol's bytes, not empty, begin a word behind the text `before`."""
    if symbol[0] in _UNSPACED:
        return True
    return symbol[0] in WHITESPACE and bool(before) and before[-1] not in WHITESPACE


class WordUnit(PieceUnit):
    """Symbols number the distinct byte strings of all members' tokens, once for each member that may write them."""

    name = "word"

    def __init__(self, vocabularies: Sequence[Vocabulary], encoders: Sequence[Encoder]) -> None:
        super().__init__(vocabularies, encoders)
        self._count = self.end
        self.end = self._count * len(vocabularies)
        for member, symbols in enumerate(self._symbols):
            ends = symbols == self._count
            symbols[symbols >= 0] += member * self._count
            symbols[ends] = self.end
        firsts = [one[0] for one in self._pieces]
        kinds = [_ALWAYS if b in _UNSPACED else _BEHIND_TEXT if b in WHITESPACE else _NEVER for b in firsts]
        self._kinds = np.array([*kinds * len(vocabularies), _ALWAYS], dtype=np.int8)

    def data(self, symbol: int) -> bytes:
        """Return the byte string of a symbol."""
        return self._pieces[symbol % self._count]

    def unowned(self, symbols: Ids) -> Ids:
        """Return symbols, int64 (n,), as those of the first member: equal for equal bytes, whoever writes them."""
        own = (symbols >= 0) & (symbols != self.end)
        numbers: Ids = np.where(own, symbols % self._count, symbols)
        return numbers

    def owner(self, symbol: int) -> int:
        """Return the member that writes a symbol, which is not end-of-text."""
        return symbol // self._count

    def begins(self, symbols: Ids, before: bytes) -> npt.NDArray[np.bool_]:
        """Mark the symbols, (n,), that begin a word behind the text `before`, of which the last byte is enough."""
        behind_text = bool(before) and before[-1] not in WHITESPACE
        marks: npt.NDArray[np.bool_] = self._kinds[symbols] >= (_BEHIND_TEXT if behind_text else _ALWAYS)
        return marks

    def begin(self, prompts: Sequence[Ids]) -> WordState:
        """Return the empty text behind each member's prompt."""
        return WordState(self, self._encoders, prompts)


class WordState(PieceState):
    """The bytes written so far, and whose word they end in."""

    def __init__(self, unit: WordUnit, encoders: Sequence[Encoder], prompts: Sequence[Ids]) -> None:
        super().__init__(unit, encoders, prompts)
        self._words = unit
        self._written: list[int] = []
        # What members have drawn, with the text in front of it: what has been taken back may be written again.
        self._drawn: dict[tuple[int, Noise], tuple[bytes, tuple[int, float, Likeliest]]] = {}

    @property
    def last(self) -> int | None:
        """The last symbol; None where nothing is written."""
        return self._written[-1] if self._written else None

    @property
    def owner(self) -> int | None:
        """The member that wrote the last symbol; None where nothing is written."""
        return self._words.owner(self._written[-1]) if self._written else None

    def append(self, symbol: int) -> None:
        """Add a symbol's bytes to the text; its member has the word."""
        super().append(symbol)
        self._written.append(symbol)

    def cut(self, count: int) -> None:
        """Take back the last `count` symbols."""
        super().cut(count)
        del self._written[len(self._written) - count :]

    def text(self) -> bytes:
        """Return the text so far."""
        return bytes(self._text)

    def begins_here(self) -> Callable[[Ids], npt.NDArray[np.bool_]]:
        """Return the function that marks the symbols, (n,), that begin a word behind the text as it stands now."""
        before = self.tail(1)
        return lambda symbols: self._words.begins(symbols, before)

    def drawn(self, member: int, noise: Noise) -> tuple[int, float, Likeliest] | None:
        """Return what a member is known to draw here with some noise: a symbol and its log-probability."""
        found = self._drawn.get((member, noise))
        return found[1] if found is not None and found[0] == self._text else None

    def learn(self, member: int, noise: Noise, before: bytes, drawn: tuple[int, float, Likeliest]) -> None:
        """Remember what a member draws behind a text with some noise."""
        self._drawn[member, noise] = before, drawn

    def forget(self) -> None:
        """Forget what was drawn behind texts that are shorter than this one."""
        for key in [key for key, (before, _) in self._drawn.items() if len(before) < len(self._text)]:
            del self._drawn[key]
