"""The mathematics, free of I/O: transforms of logits, random numbers, mixtures of distributions."""

from __future__ import annotations

from collections.abc import Iterator

# Elements of a part of a vocabulary that stays in the cache of a core: a temporary array of a whole vocabulary costs
# several times as much as the arithmetic on it.
SLICE_SIZE = 8192


def slices(size: int) -> Iterator[slice]:
    """Yield slices that cover `size` elements, each of at most `SLICE_SIZE`."""
    for start in range(0, size, SLICE_SIZE):
        yield slice(start, min(start + SLICE_SIZE, size))
