"""The unit `byte`: one coin a byte, with each member's exact distribution of the next byte anywhere inside its tokens.

A member that generates alone samples tokens after the text s from `f_i(· | s) = A_i p_i(· | τ_i(s))`, again and again:
that is `piece` with one member. `P_i(x)` is the probability that what it generates begins with the bytes x, however
they are split into tokens, and the unit's target distribution is

    r(b | x) = Σ_i λ_i(x) P_i(x b) / P_i(x)

with end-of-text as one of the b. A cover of x is one way to split it: tokens that join to a text that begins with x,
where only the last may reach beyond x. The text in front of a token is read canonically, whatever tokens it was
sampled in. So the mass of the covers whose last token begins at m is a sum over where the token before it begins:

    α(0) = 1        α(m) = Σ_{k<m} α(k) f_i(x[k:m] | x[:k])        P_i(x) = Σ_{m<n} α(m) f_i(x[m:n]… | x[:m])

with n the length of x, and u… for all tokens that begin with u. Sampling options act on the token distributions f_i.

Example: a member with the tokens a, b and ab has f(a) = 0.5 and f(ab) = 0.3 at the beginning, and f(b | a) = 0.4 after
"a". The text "a" has two covers: a, which ends with it, and ab, which reaches beyond, so P(a) = 0.5 + 0.3 = 0.8. "ab"
has the covers a·b and ab, so P(ab) = 0.5 · 0.4 + 0.3 = 0.5. The next byte after "a" is b with probability 0.5 / 0.8.

Published methods differ in what they sum over. Vieira et al. (2024, arXiv 2412.03719) sum over all token sequences,
each read as it stands, whose number grows exponentially. Phan et al. (2024, arXiv 2410.09303) and Hayase et al. (2025,
arXiv 2506.14123) sum over those that a tokenizer would produce, and leave out the mass of the others. Here the state is
bytes, which have one reading, and the sum over all covers is exact.

A forced boundary is an offset that no token of a member can lie across, given the bytes on both sides: every cover has
a token boundary there, and more text never changes that. The distribution is computed from the last forced boundary
on, where α = 1, since everything before it is a common factor. A member that could not have generated what lies before
it still reads on. In prose, the bytes after the last forced boundary are those of the last word.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mixlm.tokenization.incremental import Encoder, IncrementalEncoder
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Candidates, Floats, Ids, Logits
from mixlm.units.base import TokenBuffer, UnitTraits
from mixlm.units.piece import PieceState, PieceUnit


class PrefixIndex:
    """One member's tokens sorted by their bytes, so that tokens with a common prefix have consecutive ranks.

    The highest rank is end-of-text.
    """

    def __init__(self, pieces: dict[int, bytes], end: int) -> None:
        self.end = end
        self._order = np.array([*sorted(pieces, key=pieces.__getitem__), end], dtype=np.int64)
        self._pieces = [pieces[int(symbol)] for symbol in self._order[:-1]]
        # Rank of each symbol; -1 for symbols that the member does not have.
        self.ranks = np.full(end + 1, -1, dtype=np.int64)
        self.ranks[self._order] = np.arange(self._order.size)

    def __len__(self) -> int:
        """Number of ranks: the member's tokens of distinct bytes, and end-of-text."""
        return self._order.size

    def token_bytes(self, rank: int) -> bytes:
        """Return the bytes of a rank that is not end-of-text."""
        return self._pieces[rank]

    def symbols(self, ranks: Sequence[int]) -> Ids:
        """Return the symbols of ranks, int64 (n,)."""
        return self._order[np.asarray(ranks, dtype=np.int64)]

    def prefixes_of(self, text: bytes) -> list[tuple[int, int]]:
        """Return length and rank of every token that is a prefix of a text, or all of it."""
        matches = []
        for length in range(1, len(text) + 1):
            start, stop = self.with_prefix(text[:length])
            if start == stop:
                break
            if self._pieces[start] == text[:length]:
                matches.append((length, start))
        return matches

    def extensions_of(self, text: bytes) -> tuple[int, int]:
        """Return the range of ranks, (start, stop), of the tokens that begin with a text and are longer."""
        start, stop = self.with_prefix(text)
        return start + (start < stop and self._pieces[start] == text), stop

    def with_prefix(self, prefix: bytes) -> tuple[int, int]:
        """Return the range of ranks, (start, stop), of the tokens that begin with these bytes."""
        start = bisect_left(self._pieces, prefix)
        incrementable = prefix.rstrip(b"\xff")
        if not incrementable:
            return start, len(self._pieces)
        next_prefix = incrementable[:-1] + bytes([incrementable[-1] + 1])
        return start, bisect_left(self._pieces, next_prefix, lo=start)

    def reach(self, text: bytes) -> int:
        """Return how many bytes of a text, from its beginning, one token can cover: all if a token is longer."""
        start, stop = self.with_prefix(text)
        if start < stop:
            return len(text)
        return max((length for length, _ in self.prefixes_of(text)), default=0)


class RankedDistribution(NamedTuple):
    """A member's token distribution at one boundary, sorted by rank in its `PrefixIndex`.

    ranks, symbols: int64 (n,). logprobs: float64 (n,).
    """

    ranks: Ids
    symbols: Ids
    logprobs: Floats

    @classmethod
    def from_candidates(cls, index: PrefixIndex, distribution: Candidates) -> RankedDistribution:
        """Sort a distribution over symbols by rank."""
        positions = np.full(len(index), -1, dtype=np.int64)
        positions[index.ranks[distribution.ids]] = np.arange(distribution.ids.size)
        ranks = np.flatnonzero(positions >= 0)
        order = positions[ranks]
        return cls(ranks, distribution.ids[order], distribution.logprobs[order])

    def span(self, start: int, stop: int) -> slice:
        """Return the slice of this distribution that holds a range of ranks."""
        first, last = np.searchsorted(self.ranks, (start, stop))
        return slice(int(first), int(last))

    def mass(self, span: slice) -> float:
        """Return the probability of the tokens in a slice."""
        return float(np.exp(self.logprobs[span]).sum())


class BoundaryOutput(NamedTuple):
    """A member's output at one boundary: its logits, (vocab,), and its distribution."""

    logits: Logits
    distribution: RankedDistribution


class ByteState(PieceState):
    """The bytes generated so far and, for each member, its last forced boundary and its known outputs after that."""

    def __init__(self, unit: ByteUnit, prompts: Sequence[Ids]) -> None:
        super().__init__(unit, prompts)
        self.prefix_indexes = unit.prefix_indexes
        # Encodings of prefixes of the text, beside those of the whole.
        self._prefix_encodings = [
            (IncrementalEncoder(encoder), TokenBuffer(prompt))
            for encoder, prompt in zip(unit.encoders, prompts, strict=True)
        ]
        # Forced boundaries by member: the offset, and the length of the text that showed it.
        self._boundaries = [[(0, 0)] for _ in prompts]
        # Outputs by member and offset, with the text in front of it: a rolled back text may be generated again.
        self._outputs: list[dict[int, tuple[bytes, BoundaryOutput]]] = [{} for _ in prompts]

    def rollback(self, count: int) -> None:
        """Remove the last `count` bytes."""
        super().rollback(count)
        for encoding, _ in self._prefix_encodings:
            encoding.truncate(len(self._text))
        for boundaries in self._boundaries:
            while boundaries[-1][1] > len(self._text):
                boundaries.pop()

    def ids_at(self, member: int, offset: int) -> Ids:
        """Return the member's prompt and its canonical tokens of the text up to an offset."""
        if offset == len(self._text):
            return self.ids(member)
        encoding, buffer = self._prefix_encodings[member]
        encoding.truncate(offset)
        buffer.replace_tail(*encoding.update(self._text[:offset]))
        return buffer.ids

    def forced_boundary(self, member: int) -> int:
        """Return the offset of the member's last forced boundary in front of the last byte; 0 if there is none."""
        boundaries = self._boundaries[member]
        offset, length = boundaries[-1]
        if length < len(self._text):
            offset += last_forced_boundary(self.prefix_indexes[member], self.substring(offset))
            boundaries.append((offset, len(self._text)))
        return offset

    def cached_output(self, member: int, offset: int) -> BoundaryOutput | None:
        """Return the member's output at an offset, if it is known."""
        entry = self._outputs[member].get(offset)
        return entry[1] if entry is not None and entry[0] == self._text[:offset] else None

    def cache_output(self, member: int, offset: int, output: BoundaryOutput) -> None:
        """Keep a member's output at an offset, and drop those in front of its last forced boundary."""
        outputs, boundary = self._outputs[member], self.forced_boundary(member)
        for old in [old for old in outputs if old < boundary]:
            del outputs[old]
        outputs[offset] = self.substring(0, offset), output


def last_forced_boundary(index: PrefixIndex, text: bytes) -> int:
    """Return the last offset in front of the last byte of a text that no token can lie across.

    The text begins at a forced boundary.
    """
    boundary = reached = 0
    for start in range(len(text)):
        if reached <= start:
            boundary = start
        reached = max(reached, start + index.reach(text[start:]))
    return boundary


class ByteUnit(PieceUnit):
    """Symbols 0 to 255 are the bytes of the text; the others are what members sample: the bytes of their tokens."""

    name = "byte"
    traits = UnitTraits(("mixture", "single", "auto"), "byte_mixture", full_distributions=False, counts_bytes=True)
    state_type = ByteState

    def __init__(self, vocabularies: Sequence[Vocabulary], encoders: Sequence[Encoder]) -> None:
        super().__init__(vocabularies, encoders, first=[bytes([b]) for b in range(256)])
        self.prefix_indexes = [
            PrefixIndex({int(symbol): self._pieces[symbol] for symbol in symbols if 0 <= symbol < self.end}, self.end)
            for symbols in self._symbols
        ]
