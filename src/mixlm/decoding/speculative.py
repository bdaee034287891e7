"""`speculative`: the mixture's text, with fewer forwards of the members that are dear.

The coins of the next positions are drawn first. A draft writes ahead through all of them. Each other member then checks
the positions whose coin is its own, and only those, in the one forward in which it catches up anyway. The noise of a
position is a function of the position, so "accept with min(1, p/q), else draw from the residual" (Leviathan et al.,
2023; Chen et al., 2023) becomes: draw with the member's own law and the same noise, and see whether it is the same
symbol. What is kept is exactly what `mixture` writes with this noise, whatever the draft guessed: the law is the same,
and so is the text.

A block ends just before a position of another member: the forward that checks the block yields that symbol too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from mixlm.decoding.drafts import Draft, prefix_groups
from mixlm.engines.base import LogitsRequest, Request, Response, SampleRequest, SampleResponse
from mixlm.generation.sequence import Choice, DecodeStep, Flow, SpeculationStats, Strategy
from mixlm.types import Ids, LogitsRow, TopKFilter

LONGEST = 32


@dataclass(slots=True)
class _Position:
    """One position of a block: its member, what that reads and how it draws, what was guessed, what is certain."""

    member: int
    ids: Ids
    choose: Callable[[LogitsRow], SampleResponse]
    cut: TopKFilter | None
    guess: int | None = None
    drawn: SampleResponse | None = None


def speculative(draft: Draft, checks: int, tally: SpeculationStats | None = None) -> Strategy:
    """Return the strategy with blocks of at most `checks` guessed positions; with none it is the mixture itself."""
    tally = tally or SpeculationStats()

    def strategy(step: DecodeStep) -> Flow:
        block = yield from _write_ahead(step, draft, checks)
        return (yield from _checked(block, tally))

    return strategy


def _write_ahead(
    step: DecodeStep, draft: Draft, checks: int
) -> Generator[list[Request], list[Response], list[_Position]]:
    block: list[_Position] = []
    here: DecodeStep | None = step
    guessed = 0
    while here is not None and len(block) < LONGEST:
        member = here.noise.coin(here.weights)
        view = here.views[member]
        # A copy: the state goes on changing.
        position = _Position(member, view.ids().copy(), view.sampler(here.noise), view.top_k_filter)
        block.append(position)
        if member == draft.member:
            [drawn] = yield [SampleRequest(member, view.ids(), position.choose, view.top_k_filter)]
            position.drawn = drawn
            position.guess = drawn.symbol
        elif guessed < checks:
            position.guess = yield from draft.propose(here)
            guessed += 1
        if position.guess is None:
            break
        here = here.push(position.guess)
    return block


def _checked(block: list[_Position], tally: SpeculationStats) -> Flow:
    """Ask the members for their positions, the earliest first, until a guess was wrong or all are known."""
    reached = len(block)
    while waiting := [one for one in block[:reached] if one.drawn is None]:
        mine = [one for one in waiting if one.member == waiting[0].member]
        group = [mine[at] for at in prefix_groups([one.ids for one in mine])[0]]
        ids, first = group[-1].ids, len(group[0].ids)
        [logits] = yield [LogitsRequest(group[0].member, ids, len(ids) - first + 1, group[0].cut)]
        for one in group:
            one.drawn = one.choose(logits[len(one.ids) - first])
            if one.guess is None:
                continue
            tally.drafted += 1
            if one.guess != one.drawn.symbol:
                reached = next(at for at, other in enumerate(block) if other is one) + 1
                break
            tally.accepted += 1
    drawn = [(one.member, one.drawn) for one in block[:reached] if one.drawn]
    return [Choice(one.symbol, member, one.logprob, one.top_logprobs) for member, one in drawn]
