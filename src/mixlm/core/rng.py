"""Randomness as a function, not a stream: every number is a hash of (seed, sequence, position, what it is for).

The same seed gives the same text for any order of work, and two strategies that ask for the noise of one position get
the same noise. Coins and draws use different streams of a position, so a coin says nothing about the draw after it.

The hash is SplitMix64 (Steele, Lea and Flood, 2014): its finaliser for each part of the key, its stream for symbols.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_COIN, _DRAW = 1, 2
_PURPOSES = 2


def _mix(x: int) -> int:
    """Return SplitMix64's finaliser of one 64-bit integer."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def _key(*parts: int) -> int:
    key = 0
    for part in parts:
        key = _mix(((key + _GOLDEN) & _MASK) ^ _mix((part + _GOLDEN) & _MASK))
    return key


def _uniform(key: int, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return one uniform number in (0, 1) for each index, never 0 or 1: SplitMix64's stream of the seed `key`.

    In place wherever it can be: with the whole vocabulary in question, memory is what this costs.
    """
    x = index.astype(np.uint64)
    x += np.uint64(1)
    x *= np.uint64(_GOLDEN)
    x += np.uint64(key)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    x >>= np.uint64(11)
    u = x.astype(np.float64)
    u += 0.5
    u *= 2.0**-53
    return np.minimum(u, 1 - 2.0**-53, out=u)


@dataclass(frozen=True, slots=True)
class Noise:
    """The noise of one position of one sequence."""

    seed: int
    sequence: int = 0
    position: int = 0
    turn: int = 0

    def at(self, position: int) -> Noise:
        """Return the noise of another position of the same sequence."""
        return Noise(self.seed, self.sequence, position)

    def again(self) -> Noise:
        """Return more noise of the same position, independent of this: for a second draw that depends on the first."""
        return replace(self, turn=self.turn + 1)

    def uniform(self) -> float:
        """Return the number in (0, 1) that the coin is drawn with."""
        return (self._key(_COIN) + 0.5) * 2.0**-64

    def coin(self, weights: npt.NDArray[np.float64]) -> int:
        """Draw the coin: an index with probability proportional to `weights`, shape (n,), not all zero."""
        # Members are few, and coins are tossed ahead: plain floats take less than half the time of arrays.
        parts = weights.tolist()
        edges = list(accumulate(parts))
        # The edge on the right never picks an index of weight zero; the rest guards the last one against rounding.
        drawn = bisect_right(edges, self.uniform() * edges[-1])
        return drawn if drawn < len(parts) and parts[drawn] else max(i for i, part in enumerate(parts) if part)

    def for_engine(self) -> int:
        """Return a seed for random numbers of an engine's own, from 0 to 2**63 - 1."""
        return _key(self.seed, self.sequence, self.position, -1 - self.turn) >> 1

    @property
    def sample_key(self) -> int:
        """What `gumbel` hashes symbols with, 0 to 2**64 - 1: all that it takes to draw alike elsewhere."""
        return self._key(_DRAW)

    def gumbel(self, symbols: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return standard Gumbel noise for each symbol, the same for a symbol whoever asks: shape as `symbols`."""
        noise = _uniform(self.sample_key, symbols)
        for _ in range(2):
            np.log(noise, out=noise)
            np.negative(noise, out=noise)
        return noise

    def sample(self, symbols: npt.NDArray[np.int64], logprobs: npt.NDArray[np.float64]) -> int:
        """Draw an index of `symbols` with probability exp(logprobs), by the Gumbel-max rule.

        Symbols must be distinct: two rows of one symbol share their noise and would not add up.
        """
        return int(np.argmax(logprobs + self.gumbel(symbols)))

    def _key(self, purpose: int) -> int:
        return _key(self.seed, self.sequence, self.position, purpose + _PURPOSES * self.turn)
