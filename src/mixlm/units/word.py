"""The unit `word`: one coin a word. The sampled member generates the whole word and decides where it ends.

Members meet in words, whatever tokens they spell them with: `r(w | s) = Σ_i λ_i(s) P_i(w | s)`, where s is a text in
which a word has just ended, and `P_i(w | s)` is the probability that member i, conditioned on beginning a word there,
generates w and then ends it. No member continues another member's word. No average over tokens has this distribution,
so the unit has neither `conventional` nor `greedy`.

Where a word begins is a rule on bytes. A symbol begins a word when

    it is end-of-text; or
    its first byte is ASCII whitespace and the text's last byte is not; or
    its first byte is 0xE3 to 0xE9: it begins with a character from U+3000 to U+9FFF, which are the punctuation, kana
    and ideographs of scripts that put no spaces between words.

So a word includes all the whitespace in front of it: a line break, the indentation after it and the first word of the
line are one word. The other bytes of a character are 0x80 to 0xBF and begin no word, so no character is split. Hangul
uses spaces and is outside the range. Symbols are never split: where a word begins inside a symbol (".\\n", "of the"),
no coin is tossed.

Example: after "The river", which member 1 owns, member 1 samples " turns". It begins a word, so a coin is tossed. Where
the coin falls on member 1, " turns" stands. Where it falls on member 2, member 2 samples among the symbols that begin a
word, such as " flow", and owns the word until a symbol begins the next one: "s" continues it, " on" does not.

A symbol identifies the member that generated it as well as its bytes. The state, a function of the symbols, therefore
knows the owner of the current word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mixlm.core.rng import Noise
from mixlm.tokenization.incremental import Encoder
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Ids, TopLogprobs
from mixlm.units.base import UnitTraits
from mixlm.units.piece import PieceState, PieceUnit

WHITESPACE = b" \t\n\v\f\r"
_UNSPACED = range(0xE3, 0xEA)
_NEVER, _AFTER_TEXT, _ALWAYS = 0, 1, 2


def begins_word(symbol: bytes, before: bytes) -> bool:
    """Return whether a symbol's bytes, not empty, begin a word after the text `before`.

    >>> begins_word(b" the", b"in"), begins_word(b"the", b"in "), begins_word(b" ", b"\\n")
    (True, False, False)
    """
    if symbol[0] in _UNSPACED:
        return True
    return symbol[0] in WHITESPACE and bool(before) and before[-1] not in WHITESPACE


class WordState(PieceState):
    """The bytes generated so far, and the owner of the word they end in."""

    def __init__(self, unit: WordUnit, prompts: Sequence[Ids]) -> None:
        super().__init__(unit, prompts)
        self._word_unit = unit
        self._symbols: list[int] = []
        # Samples by member and noise, each with the text in front of it: a rolled back text may be generated again.
        self._samples: dict[tuple[int, Noise], tuple[bytes, tuple[int, float, TopLogprobs]]] = {}

    @property
    def last_symbol(self) -> int | None:
        """The last symbol; None for an empty text."""
        return self._symbols[-1] if self._symbols else None

    @property
    def owner(self) -> int | None:
        """The member that generated the last symbol; None for an empty text."""
        return self._symbols[-1] // self._word_unit.count if self._symbols else None

    def append(self, symbol: int) -> None:
        """Add a symbol's bytes to the text; its member owns the word."""
        super().append(symbol)
        self._symbols.append(symbol)

    def rollback(self, count: int) -> None:
        """Remove the last `count` symbols."""
        super().rollback(count)
        del self._symbols[len(self._symbols) - count :]

    def word_start_marker(self) -> Callable[[Ids], npt.NDArray[np.bool_]]:
        """Return the function that marks the symbols, (n,), that begin a word after the text as it stands now."""
        before = self.tail(1)
        return lambda symbols: self._word_unit.word_starts(symbols, before)

    def cached_sample(self, member: int, noise: Noise) -> tuple[int, float, TopLogprobs] | None:
        """Return a member's known sample here with some noise: symbol, log-probability, top logprobs."""
        entry = self._samples.get((member, noise))
        return entry[1] if entry is not None and entry[0] == self._text else None

    def cache_sample(self, member: int, noise: Noise, before: bytes, sample: tuple[int, float, TopLogprobs]) -> None:
        """Keep what a member samples after the text `before` with some noise."""
        self._samples[member, noise] = before, sample

    def evict_stale_samples(self) -> None:
        """Drop the samples that belong to texts shorter than this one."""
        for key in [key for key, (before, _) in self._samples.items() if len(before) < len(self._text)]:
            del self._samples[key]


class WordUnit(PieceUnit):
    """Symbols number the `count` distinct byte strings of all tokens, once for each member that may generate them."""

    name = "word"
    traits = UnitTraits(("mixture", "single", "auto"), "word_mixture", full_distributions=False)
    state_type = WordState

    def __init__(self, vocabularies: Sequence[Vocabulary], encoders: Sequence[Encoder]) -> None:
        super().__init__(vocabularies, encoders)
        self.count = self.end
        self.end = self.count * len(vocabularies)
        for member, symbols in enumerate(self._symbols):
            ends = symbols == self.count
            symbols[symbols >= 0] += member * self.count
            symbols[ends] = self.end
        first_bytes = [piece[0] for piece in self._pieces]
        kinds = [_ALWAYS if b in _UNSPACED else _AFTER_TEXT if b in WHITESPACE else _NEVER for b in first_bytes]
        self._kinds = np.array([*kinds * len(vocabularies), _ALWAYS], dtype=np.int8)

    def symbol_bytes(self, symbol: int) -> bytes:
        """Return the byte string of a symbol."""
        return super().symbol_bytes(symbol if symbol == self.end else symbol % self.count)

    def without_owner(self, symbols: Ids) -> Ids:
        """Return symbols, int64 (n,), as those of the first member: equal for equal bytes."""
        owned = (symbols >= 0) & (symbols != self.end)
        numbers: Ids = np.where(owned, symbols % self.count, symbols)
        return numbers

    def word_starts(self, symbols: Ids, before: bytes) -> npt.NDArray[np.bool_]:
        """Mark the symbols, (n,), that begin a word after the text `before`; its last byte is enough."""
        after_text = bool(before) and before[-1] not in WHITESPACE
        marks: npt.NDArray[np.bool_] = self._kinds[symbols] >= (_AFTER_TEXT if after_text else _ALWAYS)
        return marks
