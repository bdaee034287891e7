"""Drafts: cheap proposals of the next symbols, which `speculative` and `greedy` verify."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixlm.decoding import StrategyContext
from mixlm.errors import ConfigError, did_you_mean
from mixlm.generation.sequence import DecodeStep
from mixlm.types import Floats, Ids

# A member drafts by default where its weights take at most this share of the largest other member's.
_MAX_RELATIVE_SIZE = 0.75

_NGRAMS = (4, 3, 2)  # lengths of what is looked up


class Draft:
    """Something that proposes symbols; this base class proposes nothing.

    member: the one that runs at the positions of a block and proposes what it would write there; -1 for none.
    """

    member = -1
    name = "none"

    def propose(self, step: DecodeStep) -> int | None:
        """Return a symbol for a position, where no member drafts; None: there is no proposal."""
        return None


class MemberDraft(Draft):
    """A member. What it samples with the noise of a position is the coupling with the highest acceptance."""

    def __init__(self, member: int, name: str) -> None:
        self.member = member
        self.name = name


class LookupDraft(Draft):
    """Prompt lookup decoding (Saxena, 2023): proposes what followed the last few tokens before, without a forward.

    Tokens are those of the member whose coin fell, its prompt included.
    """

    name = "lookup"

    def propose(self, step: DecodeStep) -> int | None:
        """Look up the last tokens in the text."""
        view = step.views[step.noise.coin(step.weights)]
        token = lookup_continuation(view.ids())
        symbol = -1 if token is None else view.symbol(token)
        return symbol if symbol >= 0 else None


def default_draft(sizes: Sequence[int], weights: Floats) -> int | None:
    """Return the smallest member where it is clearly smaller than another one that has weight; None for prompt lookup.

    sizes: bytes of each member's weights. weights: float64 (members,).
    """
    smallest = int(np.argmin(sizes))
    others = [size for i, size in enumerate(sizes) if i != smallest and weights[i] > 0]
    return smallest if others and sizes[smallest] <= _MAX_RELATIVE_SIZE * max(others) else None


def build_draft(name: str | None, context: StrategyContext) -> Draft:
    """Return the draft of a name, a member's, "lookup" or "none"; the default for None. Raises ConfigError for others.

    The default is the member that the router observes, since its samples cost no forward; else `default_draft`.
    """
    names = context.names
    if name is None:
        member = default_draft(context.sizes, context.weights) if context.observed is None else context.observed
        return LookupDraft() if member is None else MemberDraft(member, names[member])
    if name == LookupDraft.name:
        return LookupDraft()
    if name == Draft.name:
        return Draft()
    if name not in names:
        allowed = [*names, LookupDraft.name, Draft.name]
        raise ConfigError(f"draft is {name!r}; it must be one of {', '.join(allowed)}", did_you_mean(name, allowed))
    return MemberDraft(list(names).index(name), name)


def lookup_continuation(ids: Ids) -> int | None:
    """Return what followed the latest earlier occurrence of the longest of some suffixes of `ids` that has one."""
    for length in _NGRAMS:
        if len(ids) <= length:
            continue
        suffix = ids[-length:]
        # Where the last token of the suffix occurred before.
        ends = np.flatnonzero(ids[length - 1 : -1] == suffix[-1]) + length - 1
        for back in range(1, length):
            ends = ends[ids[ends - back] == suffix[-1 - back]]
        if ends.size:
            return int(ids[ends[-1] + 1])
    return None
