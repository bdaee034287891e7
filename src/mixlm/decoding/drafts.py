"""Drafts: cheap proposals of the next symbols, which `speculative` and `greedy` verify."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mixlm.decoding import StrategyContext
from mixlm.engines.requests import AllowedIds, SampleRequest
from mixlm.errors import ConfigError, did_you_mean
from mixlm.generation.dispatch import RequestFlow
from mixlm.generation.sequence import DecodeStep
from mixlm.types import Floats, Ids

# A member drafts by default where its weights take at most this share of the largest other member's.
_MAX_RELATIVE_SIZE = 0.75


class Draft(Protocol):
    """Something that proposes symbols. member: the member whose own positions it samples exactly; -1 for none."""

    member: int
    name: str

    def propose(self, step: DecodeStep) -> RequestFlow[int | None]:
        """Return a symbol for a position, or None where it has no proposal."""
        ...


class MemberDraft:
    """A member proposes what it samples with the noise of the position: the coupling with the highest acceptance."""

    def __init__(self, member: int, name: str) -> None:
        self.member = member
        self.name = name

    def propose(self, step: DecodeStep) -> RequestFlow[int | None]:
        """Sample from the member, unless the grammar leaves it no token, or it is unavailable."""
        view = step.views[self.member]
        if view.stuck or self.member in step.unavailable:
            return None
        if (row := step.observed_row(self.member)) is not None:
            proposal: int = view.sampler(step.noise)(row).symbol
            return proposal
        sampler, allowed = view.sampler(step.noise), view.allowed_ids()
        [response] = yield [SampleRequest(self.member, view.ids(), sampler, view.top_k_filter, allowed=allowed)]
        symbol: int = response.symbol
        return symbol


class NoDraft:
    """Proposes nothing."""

    member = -1
    name = "none"

    def propose(self, step: DecodeStep) -> RequestFlow[int | None]:
        """Return None."""
        yield from ()
        return None


class LookupDraft:
    """Prompt lookup decoding (Saxena, 2023): proposes what followed the last few tokens before, without a forward.

    Tokens are those of the member whose coin fell, its prompt included.
    """

    member = -1
    name = "lookup"

    def __init__(self, max_ngram: int = 4, min_ngram: int = 2) -> None:
        self._lengths = range(max_ngram, min_ngram - 1, -1)

    def propose(self, step: DecodeStep) -> RequestFlow[int | None]:
        """Look up the last tokens in the text; nothing is requested."""
        yield from ()
        view = step.views[step.noise.coin(step.weights)]
        token = lookup_continuation(view.ids(), self._lengths)
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
    """Return the draft of a name, a member's or "lookup"; the default for None. Raises ConfigError for others.

    The default is the member that the router observes, since its samples cost no forward; else `default_draft`.
    """
    names = context.names
    if name is None:
        member = default_draft(context.sizes, context.weights) if context.observed is None else context.observed
        return LookupDraft() if member is None else MemberDraft(member, names[member])
    if name == LookupDraft.name:
        return LookupDraft()
    if name == NoDraft.name:
        return NoDraft()
    if name not in names:
        allowed = [*names, LookupDraft.name, NoDraft.name]
        raise ConfigError(f"draft is {name!r}; it must be one of {', '.join(allowed)}", did_you_mean(name, allowed))
    return MemberDraft(list(names).index(name), name)


def lookup_continuation(ids: Ids, lengths: Sequence[int]) -> int | None:
    """Return what followed the latest earlier occurrence of the longest suffix of `ids` that has one.

    lengths: of the suffixes to look for, longest first.
    """
    for length in lengths:
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


def prefix_groups(sequences: Sequence[Ids]) -> list[list[int]]:
    """Group consecutive token sequences of which each begins with the one before; a group takes one forward.

    Canonical tokens of a longer text do not always begin with those of a shorter one; a new group begins there.
    """
    groups: list[list[int]] = []
    for index, ids in enumerate(sequences):
        previous = sequences[index - 1] if index else None
        if previous is not None and len(previous) <= len(ids) and np.array_equal(ids[: len(previous)], previous):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def allowed_after(sequences: Sequence[Ids], allowed: Sequence[AllowedIds]) -> AllowedIds:
    """Return what is allowed after each prefix, from the shortest to the longest of a group; None in between."""
    if not any(allowed):
        return ()
    masks = {len(ids): mask for ids, (mask,) in zip(sequences, allowed, strict=True)}
    return [masks.get(length) for length in range(min(masks), max(masks) + 1)]
