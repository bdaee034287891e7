"""The unit `byte`: one coin a byte, and each member's exact law of the next byte at any point inside its tokens.

A member that writes alone draws a token behind the text s from `f_i(· | s) = A_i p_i(· | τ_i(s))`, again and again:
that is `piece` with one member. `P_i(x)` is the probability that what it writes begins with the bytes x, however they
are cut into tokens, and the unit's law is

    r(b | x) = Σ_i λ_i(x) P_i(x b) / P_i(x)

with end-of-text as one of the b. A cover of x is a way to cut it: tokens that join to a text that begins with x, where
only the last may reach beyond x. What stands in front of a token is read canonically, whatever tokens it was written
in. So the mass of the covers whose last token begins at m is a sum over where the token before it begins:

    α(0) = 1        α(m) = Σ_{k<m} α(k) f_i(x[k:m] | x[:k])        P_i(x) = Σ_{m<n} α(m) f_i(x[m:n]… | x[:m])

with n the length of x, and u… for all tokens that begin with u. Sampling options act on the laws of tokens, f_i.

What has been published differs in what is summed over. Vieira et al. (2024, arXiv 2412.03719) sum over all sequences of
tokens, each read as it stands, whose number grows exponentially; Phan et al. (2024, arXiv 2410.09303) and Hayase et al.
(2025, arXiv 2506.14123) over those that a tokenizer would write, and leave out the others' mass. A state that is bytes
has one reading, and the sum over all covers is exact.

A seam is a place that no token of a member lies across, given the bytes on both sides: every cover has a boundary
there, and more text never changes that. The law is taken from the last seam on, α(seam) = 1, since all that comes
before it is a common factor; a member that could not have written that still reads on. In prose, the bytes behind the
last seam are those of the last word.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mixlm.tokenization.incremental import Encoder, Growing
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Candidates, Floats, Ids, Logits
from mixlm.units.base import TokenBuffer
from mixlm.units.piece import PieceState, PieceUnit


class ByteUnit(PieceUnit):
    """Symbols 0 to 255 are the bytes a text is written in; the others are what members draw: their tokens' bytes."""

    name = "byte"

    def __init__(self, vocabularies: Sequence[Vocabulary], encoders: Sequence[Encoder]) -> None:
        super().__init__(vocabularies, encoders, first=[bytes([b]) for b in range(256)])
        self._lexicons = [
            Lexicon({int(one): self._pieces[one] for one in symbols if 0 <= one < self.end}, self.end)
            for symbols in self._symbols
        ]

    def begin(self, prompts: Sequence[Ids]) -> ByteState:
        """Return the empty text behind each member's prompt."""
        return ByteState(self, self._encoders, prompts, self._lexicons)


class Lexicon:
    """One member's tokens in the order of their bytes, so that those with a common beginning stand side by side."""

    def __init__(self, pieces: dict[int, bytes], end: int) -> None:
        self.end = end
        self._order = np.array([*sorted(pieces, key=pieces.__getitem__), end], dtype=np.int64)
        self._spelled = [pieces[int(one)] for one in self._order[:-1]]
        # Rank of each symbol; end-of-text stands behind all tokens, and what the member does not have is nowhere.
        self.ranks = np.full(end + 1, -1, dtype=np.int64)
        self.ranks[self._order] = np.arange(self._order.size)

    def __len__(self) -> int:
        """Ranks: the member's tokens of distinct bytes, and end-of-text."""
        return self._order.size

    def spelled(self, rank: int) -> bytes:
        """Return the bytes of a rank that is not end-of-text."""
        return self._spelled[rank]

    def symbols(self, ranks: Sequence[int]) -> Ids:
        """Return the symbols of ranks, int64 (n,)."""
        return self._order[np.asarray(ranks, dtype=np.int64)]

    def along(self, text: bytes) -> list[tuple[int, int]]:
        """Return length and rank of every token that a text begins with, or is."""
        out = []
        for length in range(1, len(text) + 1):
            start, stop = self.within(text[:length])
            if start == stop:
                break
            if self._spelled[start] == text[:length]:
                out.append((length, start))
        return out

    def beyond(self, text: bytes) -> tuple[int, int]:
        """Return the ranks, from and up to, of the tokens that begin with a text and are longer."""
        start, stop = self.within(text)
        return start + (start < stop and self._spelled[start] == text), stop

    def within(self, beginning: bytes) -> tuple[int, int]:
        """Return the ranks, from and up to, of the tokens that begin with these bytes."""
        start = bisect_left(self._spelled, beginning)
        behind = beginning.rstrip(b"\xff")
        if not behind:
            return start, len(self._spelled)
        return start, bisect_left(self._spelled, behind[:-1] + bytes([behind[-1] + 1]), lo=start)

    def reach(self, text: bytes) -> int:
        """Return how much of a text, from its beginning, one token can take: all of it if one reaches beyond."""
        start, stop = self.within(text)
        if start < stop:
            return len(text)
        return max((length for length, _ in self.along(text)), default=0)


class Law(NamedTuple):
    """A member's law of tokens at one boundary, in the order of the lexicon, end-of-text last.

    ranks, symbols: int64 (n,). logprobs: float64 (n,).
    """

    ranks: Ids
    symbols: Ids
    logprobs: Floats

    @classmethod
    def of(cls, lexicon: Lexicon, law: Candidates) -> Law:
        """Sort a law of symbols."""
        places = np.full(len(lexicon), -1, dtype=np.int64)
        places[lexicon.ranks[law.ids]] = np.arange(law.ids.size)
        ranks = np.flatnonzero(places >= 0)
        at = places[ranks]
        return cls(ranks, law.ids[at], law.logprobs[at])

    def span(self, start: int, stop: int) -> slice:
        """Return where the tokens of these ranks stand, from and up to."""
        first, last = np.searchsorted(self.ranks, (start, stop))
        return slice(int(first), int(last))

    def mass(self, span: slice) -> float:
        """Return the probability of the tokens in a span."""
        return float(np.exp(self.logprobs[span]).sum())


class Known(NamedTuple):
    """What a member says at one boundary: its logits (vocab,), how they become a law of symbols there, and its law."""

    logits: Logits
    transform: Callable[[Logits], Candidates]
    law: Law


class ByteState(PieceState):
    """The bytes written so far; for each member, where its last seam is, and what it is known to say behind it."""

    def __init__(
        self, unit: ByteUnit, encoders: Sequence[Encoder], prompts: Sequence[Ids], lexicons: Sequence[Lexicon]
    ) -> None:
        super().__init__(unit, encoders, prompts)
        self.lexicons = lexicons
        # What a member reads for a beginning of the text, beside what it reads for the whole.
        self._aside = [(Growing(one), TokenBuffer(prompt)) for one, prompt in zip(encoders, prompts, strict=True)]
        self._seams = [[(0, 0)] for _ in prompts]  # places, and the length of the text that showed them to be seams
        # By place, with the text in front of it: what has been taken back may be written again.
        self._known: list[dict[int, tuple[bytes, Known]]] = [{} for _ in prompts]

    def __len__(self) -> int:
        return len(self._text)

    def cut(self, count: int) -> None:
        """Take back the last `count` bytes."""
        super().cut(count)
        for growing, _ in self._aside:
            growing.cut(len(self._text))
        for seams in self._seams:
            while seams[-1][1] > len(self._text):
                seams.pop()

    def part(self, start: int, stop: int | None = None) -> bytes:
        """Return the bytes between two places; up to the end, if only one is given."""
        return bytes(self._text[start:stop])

    def ids_at(self, member: int, place: int) -> Ids:
        """Return the member's prompt and its canonical tokens of the text up to a place."""
        if place == len(self._text):
            return self.ids(member)
        growing, buffer = self._aside[member]
        growing.cut(place)
        buffer.rewrite(*growing.extend(self._text[:place]))
        return buffer.ids

    def seam(self, member: int) -> int:
        """Return the member's last seam in front of the last byte; 0 where the text begins."""
        seams = self._seams[member]
        place, seen = seams[-1]
        if seen < len(self._text):
            place = last_seam(self.lexicons[member], self.part(place)) + place
            seams.append((place, len(self._text)))
        return place

    def known(self, member: int, place: int) -> Known | None:
        """Return what the member says behind a place, if it has been asked."""
        found = self._known[member].get(place)
        return found[1] if found is not None and found[0] == self._text[:place] else None

    def learn(self, member: int, place: int, said: Known) -> None:
        """Remember what a member says behind a place; what lies in front of its last seam is no longer needed."""
        known, seam = self._known[member], self.seam(member)
        for old in [one for one in known if one < seam]:
            del known[old]
        known[place] = self.part(0, place), said


def last_seam(lexicon: Lexicon, text: bytes) -> int:
    """Return the last place in front of the last byte of a text that no token lies across; it begins with a seam."""
    seam = reached = 0
    for start in range(len(text)):
        if reached <= start:
            seam = start
        reached = max(reached, start + lexicon.reach(text[start:]))
    return seam
