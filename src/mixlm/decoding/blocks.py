"""Blocks: positions that a draft reaches ahead of the members, which verify them in few forwards.

A position says which members it needs next, and chooses its symbol from their distributions and its own noise alone. So
the text does not depend on the draft: a proposal is accepted where it is the symbol that the position chooses, and what
lies behind a rejected one is dropped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from mixlm.decoding.drafts import Draft
from mixlm.engines.requests import AllowedIds, LogitsRequest, Request
from mixlm.generation.dispatch import RequestFlow
from mixlm.generation.sequence import Choice, DecodeStep, Flow, SpeculationStats, Strategy
from mixlm.types import Ids, LogitsRow, TopKFilter

MAX_BLOCK = 32  # positions


class Position(ABC):
    """One position of a block.

    Attributes:
        step: The decode step.
        members: Those that take part.
        ids: The tokens there of members that are read.
        allowed: Which of their ids are allowed there, see `AllowedIds`.
        parts: What is known of the members that ran, by member.
        proposal: The symbol that the next position of the block stands behind.
        is_guess: Whether the proposal was made before the symbol was chosen.
        choice: What it chose, once that is certain.
    """

    def __init__(self, step: DecodeStep, members: Sequence[int]) -> None:
        self.step = step
        self.members = members
        self.ids: dict[int, Ids] = {}
        self.allowed: dict[int, AllowedIds] = {}
        self.parts: dict[int, Any] = {}
        self.proposal: int | None = None
        self.is_guess = False
        self.choice: Choice | None = None
        self._filters: dict[int, TopKFilter | None] = {}
        for member in members:
            if (row := step.observed_row(member)) is not None:
                self.read(member)
                self.receive(member, row)

    def read(self, member: int) -> None:
        """Keep what a request to a member says of the position; call it while the text ends there."""
        if member not in self.ids:
            self._read(member)

    def _read(self, member: int) -> None:
        view = self.step.views[member]
        self.ids[member], self.allowed[member] = view.ids().copy(), view.allowed_ids()  # the state goes on changing
        self._filters[member] = view.top_k_filter

    @abstractmethod
    def needs(self) -> Sequence[int]:
        """Return the members that have to run next; none once the symbol is chosen."""

    @abstractmethod
    def advance(self) -> None:
        """Choose the symbol, where the members that ran decide it."""

    @abstractmethod
    def guess(self, member: int) -> int | None:
        """Return the symbol that a member which ran proposes; None for none."""

    def request(self, member: int, before: Sequence[Position] = ()) -> LogitsRequest:
        """Return the request for a member's logits here and at the positions before, whose tokens begin these."""
        group = [*before, self]
        sequences = [position.ids[member] for position in group]
        allowed = allowed_after(sequences, [position.allowed[member] for position in group])
        last = len(sequences[-1]) - len(sequences[0]) + 1
        return LogitsRequest(member, sequences[-1], last, self.top_k_filter(member), allowed=allowed)

    def top_k_filter(self, member: int) -> TopKFilter | None:
        """Return the part of the member's logits that is needed; None for all of them."""
        return self._filters[member]

    @abstractmethod
    def receive(self, member: int, logits: LogitsRow) -> None:
        """Take a member's logits."""

    def run(self, member: int) -> RequestFlow[None]:
        """Run a member, while the text ends at the position."""
        self.read(member)
        [rows] = yield [self.request(member)]
        self.receive(member, rows[0])


P = TypeVar("P", bound=Position)


def block_strategy(
    position_at: Callable[[DecodeStep], Position],
    draft: Draft | None = None,
    block: int = 0,
    stats: SpeculationStats | None = None,
) -> Strategy:
    """Return the strategy that chooses the symbols of positions, a block at a time.

    Args:
        position_at: Returns the position of a decode step.
        draft: What proposes symbols, if anything.
        block: Proposals of a block that are verified, at most.
        stats: Records how many were verified and accepted.
    """

    def strategy(step: DecodeStep) -> Flow:
        positions = yield from draft_block(step, draft or Draft(), block, position_at)
        return (yield from verify(positions, stats or SpeculationStats()))

    return strategy


def draft_block(
    step: DecodeStep, draft: Draft, block: int, position_at: Callable[[DecodeStep], P], limit: int = MAX_BLOCK
) -> RequestFlow[list[P]]:
    """Return the positions of a block. A draft that is a member runs at all of them.

    Positions that the draft alone decides are not proposals: the block goes on behind them at no risk.

    Args:
        step: The first position.
        draft: What proposes symbols.
        block: Proposals, at most.
        position_at: Returns the position of a decode step.
        limit: Positions, at most.
    """
    positions: list[P] = []
    proposals = 0
    current: DecodeStep | None = step
    while current is not None and len(positions) < limit:
        position = position_at(current)
        positions.append(position)
        if block or draft.member >= 0:  # the text may grow before all have run
            for member in position.members:
                position.read(member)
        may_propose = proposals < block and (draft.member in (-1, *position.members) or _can_run(current, draft.member))
        runs = draft.member >= 0 and position.choice is None and (may_propose or draft.member in position.needs())
        if runs and draft.member not in position.parts:
            yield from position.run(draft.member)
        if position.parts:
            position.advance()
        if len(positions) == limit:
            break
        if position.choice is not None:
            position.proposal = position.choice.symbol
        elif may_propose:
            proposals += 1
            guess = position.guess(draft.member) if draft.member >= 0 else draft.propose(current)
            position.proposal, position.is_guess = guess, guess is not None
        if position.proposal is None:
            break
        current = yield from current.following(position.proposal)
    return positions


def _can_run(step: DecodeStep, member: int) -> bool:
    """Whether a member without weight can draft."""
    return member not in step.unavailable and not step.views[member].stuck


def verify(positions: Sequence[Position], stats: SpeculationStats) -> RequestFlow[list[Choice]]:
    """Run the members that the positions need, until all are chosen up to the first rejected proposal.

    stats: records how many guesses were verified and accepted.
    """
    length = len(positions)
    while waiting := [position for position in positions[:length] if position.choice is None]:
        requests, covered = _requests(waiting)
        responses = yield requests
        received: dict[int, list[tuple[int, LogitsRow]]] = {id(position): [] for position in waiting}
        for request, group, rows in zip(requests, covered, responses, strict=True):
            for position in group:
                offset = len(position.ids[request.member]) - len(request.ids) - 1
                received[id(position)].append((request.member, rows[offset]))
        for position in waiting:
            for member, row in received[id(position)]:
                position.receive(member, row)
            position.advance()
            if _is_rejected(position):
                length = next(i + 1 for i, other in enumerate(positions) if other is position)
                break
    choices: list[Choice] = []
    for position in positions[:length]:
        assert position.choice is not None
        choices.append(position.choice)
        stats.drafted += position.is_guess
        stats.accepted += position.is_guess and not _is_rejected(position)
    return choices


def _is_rejected(position: Position) -> bool:
    return position.choice is not None and position.proposal not in (None, position.choice.symbol)


def _requests(waiting: Sequence[Position]) -> tuple[list[Request], list[list[Position]]]:
    """Return requests for what the first position needs, at all positions that need it, and what each covers."""
    requests: list[Request] = []
    covered: list[list[Position]] = []
    for member in waiting[0].needs():
        same = [position for position in waiting if member in position.needs()]
        for position in same:
            position.read(member)
        needed = waiting[0].top_k_filter(member)
        same = [position for position in same if position.top_k_filter(member) is needed]
        for indices in prefix_groups([position.ids[member] for position in same]):
            group = [same[index] for index in indices]
            requests.append(group[-1].request(member, group[:-1]))
            covered.append(group)
    return requests, covered


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
