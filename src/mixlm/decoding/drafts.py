"""Guesses of what comes next, for strategies that write ahead and check."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

import numpy as np

from mixlm.engines.base import Request, Response, SampleRequest
from mixlm.generation.sequence import DecodeStep
from mixlm.types import Ids

Proposal = Generator[list[Request], list[Response], int | None]


class Draft(Protocol):
    """Something that guesses symbols. member: the member whose own positions it knows for certain; -1 for none."""

    member: int
    name: str

    def propose(self, step: DecodeStep) -> Proposal:
        """Return a symbol for a position, or None where it has no guess."""
        ...


class MemberDraft:
    """A member guesses by drawing with the noise of the position: the coupling that makes it right most often."""

    def __init__(self, member: int, name: str) -> None:
        self.member = member
        self.name = name

    def propose(self, step: DecodeStep) -> Proposal:
        """Let the member draw, if it has anything to go on with."""
        view = step.views[self.member]
        if view.stuck:
            return None
        [drawn] = yield [SampleRequest(self.member, view.ids(), view.sampler(step.noise), view.top_k_filter)]
        symbol: int = drawn.symbol
        return symbol


class LookupDraft:
    """Guesses that what followed the last few tokens before follows them again. It costs no forward.

    (Prompt lookup decoding, Saxena 2023.) Tokens are those of the member whose coin fell, its prompt included.
    """

    member = -1
    name = "lookup"

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._lengths = range(longest, shortest - 1, -1)

    def propose(self, step: DecodeStep) -> Proposal:
        """Look at the text; nothing is asked."""
        yield from ()
        view = step.views[step.noise.coin(step.weights)]
        follows = continued(view.ids(), self._lengths)
        symbol = -1 if follows is None else view.symbol(follows)
        return symbol if symbol >= 0 else None


def continued(ids: Ids, lengths: Sequence[int]) -> int | None:
    """Return what followed the latest earlier occurrence of the longest end of `ids` that has one, of these lengths."""
    for length in lengths:
        if len(ids) <= length:
            continue
        tail = ids[-length:]
        # Where the last token of the tail stood before, not counting where it stands now.
        at = np.flatnonzero(ids[length - 1 : -1] == tail[-1]) + length - 1
        for back in range(1, length):
            at = at[ids[at - back] == tail[-1 - back]]
        if at.size:
            return int(ids[at[-1] + 1])
    return None


def prefix_groups(texts: Sequence[Ids]) -> list[list[int]]:
    """Group consecutive texts of which each begins with the one before it: a group is read in one forward.

    Canonical tokens of a longer text do not always begin with those of a shorter one; the group ends there.
    """
    groups: list[list[int]] = []
    for at, ids in enumerate(texts):
        before = texts[at - 1] if at else None
        if before is not None and len(before) <= len(ids) and np.array_equal(ids[: len(before)], before):
            groups[-1].append(at)
        else:
            groups.append([at])
    return groups
