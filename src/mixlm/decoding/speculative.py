"""`speculative`: the mixture's text, with fewer forwards of the large members.

The coins of the next positions are tossed first. A draft proposes a symbol for each of them. Each member then verifies
the positions whose coin is its own, and only those, in the one forward in which it catches up anyway. The noise of a
position is a function of the position, so "accept with min(1, p/q), else sample from the residual" (Leviathan et al.,
2023; Chen et al., 2023) becomes: sample from the member's own distribution with the same noise, and accept where that
gives the same symbol. The text is exactly what `mixture` writes with this noise, whatever the draft proposed.

A block ends just before a position of another member: the forward that verifies the block yields that symbol too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mixlm.core.options import GenerationOptions
from mixlm.decoding import StrategyContext
from mixlm.decoding.drafts import Draft, allowed_after, build_draft, prefix_groups
from mixlm.engines.requests import AllowedIds, LogitsRequest, SampleRequest, SampleResponse
from mixlm.generation.dispatch import RequestFlow
from mixlm.generation.sequence import Choice, DecodeStep, Flow, SpeculationStats, Strategy
from mixlm.types import Ids, LogitsRow, TopKFilter

MAX_BLOCK = 32  # positions


def build(options: GenerationOptions, context: StrategyContext) -> Strategy:
    """Return the strategy with the draft of the options, else the default draft."""
    return speculative(build_draft(options.draft, context), options.block, context.speculation)


@dataclass(slots=True)
class _Position:
    """One position of a block: its coin, and what it takes to sample there."""

    member: int
    ids: Ids
    sample: Callable[[LogitsRow], SampleResponse]
    top_k_filter: TopKFilter | None
    allowed: AllowedIds
    proposal: int | None = None
    response: SampleResponse | None = None


def speculative(draft: Draft, block: int, stats: SpeculationStats | None = None) -> Strategy:
    """Return the strategy.

    Args:
        draft: What proposes symbols.
        block: Proposals of a block that are verified, at most; with 0 it is the mixture itself.
        stats: Records how many were verified and accepted.
    """
    stats = stats or SpeculationStats()

    def strategy(step: DecodeStep) -> Flow:
        positions = yield from _draft_block(step, draft, block)
        return (yield from verify(positions, stats))

    return strategy


def _draft_block(step: DecodeStep, draft: Draft, block: int) -> RequestFlow[list[_Position]]:
    positions: list[_Position] = []
    current: DecodeStep | None = step
    proposals = 0
    while current is not None and len(positions) < MAX_BLOCK:
        member = current.noise.coin(current.weights)
        view = current.views[member]
        # A copy: the state goes on changing.
        sampler, allowed = view.sampler(current.noise), view.allowed_ids()
        position = _Position(member, view.ids().copy(), sampler, view.top_k_filter, allowed)
        positions.append(position)
        if (row := current.observed_row(member)) is not None:
            position.response = position.sample(row)
            position.proposal = position.response.symbol
        elif member == draft.member:
            [response] = yield [SampleRequest(member, view.ids(), sampler, view.top_k_filter, allowed=allowed)]
            position.response = response
            position.proposal = response.symbol
        elif proposals < block:
            position.proposal = yield from draft.propose(current)
            proposals += 1
        if position.proposal is None:
            break
        current = yield from current.following(position.proposal)
    return positions


def verify(positions: list[_Position], stats: SpeculationStats) -> Flow:
    """Run the members at their positions, the earliest first, until a proposal is rejected or all are sampled."""
    length = len(positions)
    while waiting := [position for position in positions[:length] if position.response is None]:
        member = waiting[0].member
        same_member = [position for position in waiting if position.member == member]
        group = [same_member[index] for index in prefix_groups([position.ids for position in same_member])[0]]
        ids, shortest = group[-1].ids, len(group[0].ids)
        allowed = allowed_after([position.ids for position in group], [position.allowed for position in group])
        last = len(ids) - shortest + 1
        [rows] = yield [LogitsRequest(member, ids, last, group[0].top_k_filter, allowed=allowed)]
        for position in group:
            position.response = position.sample(rows[len(position.ids) - shortest])
            if position.proposal is None:
                continue
            stats.drafted += 1
            if position.proposal != position.response.symbol:
                length = next(index for index, other in enumerate(positions) if other is position) + 1
                break
            stats.accepted += 1
    return [
        Choice(position.response.symbol, position.member, position.response.logprob, position.response.top_logprobs)
        for position in positions[:length]
        if position.response is not None
    ]
