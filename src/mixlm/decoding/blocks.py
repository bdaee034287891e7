"""Blocks: positions that a draft reaches ahead of the members, which verify them in few forwards.

A position says which members it needs next, and chooses its symbol from their distributions and its own noise alone. So
the text does not depend on the draft: a proposal is accepted where it is the symbol that the position chooses, and what
follows a rejected one is dropped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from mixlm.decoding.drafts import Draft
from mixlm.engines.requests import LogitsRequest
from mixlm.generation.dispatch import RequestFlow
from mixlm.generation.sequence import Choice, DecodeStep, Flow, SpeculationStats, Strategy
from mixlm.types import Ids, LogitsRow

MAX_BLOCK = 32  # positions


class Position(ABC):
    """One position of a block.

    Attributes:
        step: The decode step.
        members: Those that take part.
        parts: What is known of the members that ran, by member.
        proposal: The symbol assumed here by the block's next position.
        is_guess: Whether the proposal was made before the symbol was chosen.
        choice: What it chose, once that is certain.
    """

    def __init__(self, step: DecodeStep, members: Sequence[int]) -> None:
        self.step = step
        self.members = members
        self._requests: dict[int, LogitsRequest] = {}  # of members that are read
        self.parts: dict[int, Any] = {}
        self.proposal: int | None = None
        self.is_guess = False
        self.choice: Choice | None = None
        for member in members:
            if (row := step.observed_row(member)) is not None:
                self.read(member)
                self.receive(member, row)

    def read(self, member: int) -> None:
        """Keep what a request to a member says of the position; call it while the text ends there."""
        if member not in self._requests:
            self._read(member)

    def _read(self, member: int) -> None:
        request = self.step.views[member].logits_request()
        self._requests[member] = replace(request, ids=request.ids.copy())  # the state goes on changing

    @abstractmethod
    def needs(self) -> Sequence[int]:
        """Return the members that have to run next; none once the symbol is chosen."""

    @abstractmethod
    def advance(self) -> None:
        """Choose the symbol, where the members that ran decide it."""

    @abstractmethod
    def guess(self, member: int) -> int | None:
        """Return the symbol that a member which ran proposes; None for none."""

    def request(self, member: int) -> LogitsRequest:
        """Return the request for the logits of a member that was read."""
        return self._requests[member]

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

    Positions that the draft alone decides are not proposals: the block goes on after them at no risk.

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
        requests = _requests(waiting)
        responses = yield [request for request, _ in requests]
        for index, position in enumerate(waiting):
            for (request, rows), response in zip(requests, responses, strict=True):
                if index in rows:
                    position.receive(request.member, response[rows[index]])
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


def _requests(waiting: Sequence[Position]) -> list[tuple[LogitsRequest, dict[int, int]]]:
    """Return requests for what the first position needs, at all positions that need it; see `join_requests`."""
    joined = []
    for member in waiting[0].needs():
        requests: dict[int, LogitsRequest] = {}
        for index, position in enumerate(waiting):
            if member in position.needs():
                position.read(member)
                requests[index] = position.request(member)
        needed = requests[0].top_k_filter
        joined += join_requests({index: own for index, own in requests.items() if own.top_k_filter is needed})
    return joined


def join_requests(requests: Mapping[int, LogitsRequest]) -> list[tuple[LogitsRequest, dict[int, int]]]:
    """Return few requests for those of one member, and for each of them which it covers: rows of its response by key.

    Requests whose tokens begin with those of the one before take one forward with it. Canonical tokens of a longer text
    do not always begin with those of a shorter one.
    """
    groups: list[list[int]] = []
    before: Ids | None = None
    for key, request in requests.items():
        if before is not None and np.array_equal(request.ids[: len(before)], before):
            groups[-1].append(key)
        else:
            groups.append([key])
        before = request.ids
    joined = []
    for first, *others in groups:
        shortest, longest = requests[first], requests[others[-1] if others else first]
        rows = {key: len(requests[key].ids) - len(shortest.ids) for key in (first, *others)}
        masks = {row: requests[key].allowed[0] for key, row in rows.items() if requests[key].allowed}
        count = len(longest.ids) - len(shortest.ids) + 1
        allowed = [masks.get(row) for row in range(count)] if masks else ()
        joined.append((replace(longest, last=count, allowed=allowed), rows))
    return joined
