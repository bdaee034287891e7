"""Counter-based random numbers: each one is a hash of (seed, sequence, position, purpose).

The same seed gives the same text whatever the order of work, and strategies that use the noise of the same position get
the same numbers. Coins and samples use different streams of a position, so the coin is independent of the sample.

The hash is SplitMix64 (Steele, Lea and Flood, 2014): its finalizer for each part of the key, its stream for symbols.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from mixlm.core import SLICE_SIZE, slices

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_COIN, _SAMPLE = 1, 2
_PURPOSES = 2
_NEAR = 8.0  # nats below the most likely symbol, beyond which few symbols win, and all but these need no Gumbel noise


def _mix(x: int) -> int:
    """Return SplitMix64's finalizer of a 64-bit integer."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def _key(*parts: int) -> int:
    key = 0
    for part in parts:
        key = _mix(((key + _GOLDEN) & _MASK) ^ _mix((part + _GOLDEN) & _MASK))
    return key


def _uniform(key: int, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return a uniform number in the open interval (0, 1) for each index: SplitMix64's stream of the seed `key`."""
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
    """The random numbers of one position of one sequence.

    Attributes:
        seed: Seed of the generation.
        sequence: Number of the sequence in its batch or conversation.
        position: Number of symbols generated before this one.
        round: Which of the position's independent sets of numbers this is.
    """

    seed: int
    sequence: int = 0
    position: int = 0
    round: int = 0

    def at(self, position: int) -> Noise:
        """Return the noise of another position of the same sequence."""
        return Noise(self.seed, self.sequence, position)

    def next_round(self) -> Noise:
        """Return another, independent set of numbers of the same position: for a sample that depends on the first."""
        return replace(self, round=self.round + 1)

    def uniform(self) -> float:
        """Return the number in (0, 1) that decides the coin."""
        return (self._key(_COIN) + 0.5) * 2.0**-64

    def coin(self, weights: npt.NDArray[np.float64]) -> int:
        """Toss the coin: return an index with probability proportional to its weight.

        Args:
            weights: Non-negative, shape (members,), not all zero.
        """
        # There are few members, and coins are tossed ahead: plain floats take less than half the time of arrays.
        values = weights.tolist()
        edges = list(accumulate(values))
        # bisect_right never picks an index of weight zero; the last line guards the last edge against rounding.
        index = bisect_right(edges, self.uniform() * edges[-1])
        return index if index < len(values) and values[index] else max(i for i, value in enumerate(values) if value)

    def engine_seed(self) -> int:
        """Return a seed, 0 to 2**63 - 1, for an engine that samples with its own random numbers."""
        return _key(self.seed, self.sequence, self.position, -1 - self.round) >> 1

    @property
    def sample_key(self) -> int:
        """The key of `gumbel`, 0 to 2**64 - 1. It is all that another device needs to sample the same symbols."""
        return self._key(_SAMPLE)

    def gumbel(self, symbols: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return standard Gumbel noise for each symbol, float64, shape as `symbols`; equal symbols get equal noise."""
        key, noise = self.sample_key, np.empty(symbols.size)
        for elements in slices(symbols.size):
            part = noise[elements]
            np.log(_uniform(key, symbols[elements]), out=part)
            np.negative(part, out=part)
            np.log(part, out=part)
            np.negative(part, out=part)
        return noise

    def sample(self, symbols: npt.NDArray[np.int64], logprobs: npt.NDArray[np.float64]) -> int:
        """Sample an index of `symbols` with probability exp(logprobs), by the Gumbel-max trick.

        Args:
            symbols: Distinct symbols, int64 (n,). Two entries of one symbol would share their noise.
            logprobs: Their natural log-probabilities, float64 (n,).
        """
        winners = self._possible_winners(symbols, logprobs) if symbols.size > SLICE_SIZE else None
        if winners is None:
            return int(np.argmax(logprobs + self.gumbel(symbols)))
        return int(winners[np.argmax(logprobs[winners] + self.gumbel(symbols[winners]))])

    def _possible_winners(
        self, symbols: npt.NDArray[np.int64], logprobs: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.int64] | None:
        """Return indices of symbols among which `sample` finds its own, ascending; None where they would be many.

        Where the best score of the likely symbols is b, and u a symbol's uniform number, another one of log-probability
        p wins only if `1 - u ≤ -log u < exp(p - b)`, and p is at most the least of the likely ones: u is nearly 1.
        """
        least = logprobs.max() - _NEAR
        likely = np.flatnonzero(logprobs >= least)
        if likely.size > symbols.size // 8:
            return None
        best = (logprobs[likely] + self.gumbel(symbols[likely])).max()
        beyond = 1 - np.exp(least - best) * (1 + 1e-6) - 1e-15  # the margin is for rounding
        key = self.sample_key
        lucky = [
            np.flatnonzero(_uniform(key, symbols[elements]) >= beyond) + elements.start
            for elements in slices(symbols.size)
        ]
        return np.union1d(likely, np.concatenate(lucky))

    def _key(self, purpose: int) -> int:
        return _key(self.seed, self.sequence, self.position, purpose + _PURPOSES * self.round)
