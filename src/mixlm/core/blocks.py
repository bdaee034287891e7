"""Parts of a vocabulary that stay in the cache of a core.

A temporary array of a whole vocabulary costs several times as much as the arithmetic on it.
"""

from __future__ import annotations

from collections.abc import Iterator

BLOCK = 8192


def blocks(size: int) -> Iterator[slice]:
    """Yield slices that cover `size` elements, each of at most `BLOCK`."""
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))
