"""`greedy`: the most likely symbol of the average. It needs the average, so one member's forward does not suffice.

Two forms with one result. Plain: one symbol at a time, running no more members than it takes to be certain. Drafted: a
draft proposes a block, every member runs it in one forward, and proposals are accepted as long as they are the
average's most likely symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from mixlm.core.mixing import mix, responsibilities
from mixlm.core.options import GenerationOptions
from mixlm.decoding import StrategyContext
from mixlm.decoding.drafts import Draft, build_draft, prefix_groups
from mixlm.engines.requests import LogitsRequest, Request
from mixlm.generation.dispatch import RequestFlow
from mixlm.generation.sequence import Choice, DecodeStep, Flow, SpeculationStats, Strategy
from mixlm.types import Candidates, Floats, Ids, LogitsRow


def build(options: GenerationOptions, context: StrategyContext) -> Strategy:
    """Return the plain form, or the drafted one where the options name a draft."""
    if options.draft is None:
        return greedy
    return greedy_drafted(build_draft(options.draft, context), options.block, context.speculation)


def greedy(step: DecodeStep) -> Flow:
    """Run members from the heaviest on, and stop as soon as the others cannot change the winner.

    A symbol's lead is safe when it is larger than the whole weight of the members that have not run. Of equal
    probabilities, the lowest symbol wins. The log-probability is the average's when every member ran, else a lower
    bound of it; where `top_logprobs` are requested, every member runs.
    """
    order = _heaviest_first(step.weights)
    parts: list[tuple[float, Candidates]] = []
    remaining = 1.0
    while True:
        member = order[len(parts)]
        [rows] = yield [LogitsRequest(member, step.views[member].ids())]
        parts.append((float(step.weights[member]), step.views[member].distribution(rows[0])))
        remaining -= step.weights[member]
        average = mix(parts)
        is_certain = not step.views[0].member.top_logprobs and _lead(average) > remaining + 1e-9
        if is_certain or len(parts) == len(order):
            return [_most_likely(step, parts, order)]


def greedy_single(member: int) -> Strategy:
    """Return the strategy that always takes one member's most likely symbol."""

    def strategy(step: DecodeStep) -> Flow:
        return (yield from greedy(replace(step, weights=np.eye(len(step.views))[member])))

    return strategy


@dataclass(slots=True)
class _GreedyPosition:
    """One position of a block, and by member: its tokens, the function from logits to its distribution, its logits."""

    step: DecodeStep
    ids: list[Ids]
    distributions: list[Callable[[LogitsRow], Candidates]]
    logits: dict[int, LogitsRow] = field(default_factory=dict)
    proposal: int | None = None

    @classmethod
    def of(cls, step: DecodeStep) -> _GreedyPosition:
        ids = [view.ids().copy() for view in step.views]  # copies: the state goes on changing
        return cls(step, ids, [view.bind_distribution() for view in step.views])


def greedy_drafted(draft: Draft, block: int, stats: SpeculationStats | None = None) -> Strategy:
    """Return greedy decoding with a draft.

    A member proposes its most likely symbols. Members other than the draft run one forward a block, which yields one
    symbol more than are accepted.

    Args:
        draft: What proposes symbols.
        block: Proposals of a block, at most.
        stats: Records how many were verified and accepted.
    """
    stats = stats or SpeculationStats()

    def strategy(step: DecodeStep) -> Flow:
        positions = yield from _draft_block(step, draft, block)
        requests, covered = _verification_requests(positions)
        responses = yield requests
        for request, indices, rows in zip(requests, covered, responses, strict=True):
            for index in indices:
                ids = positions[index].ids[request.member]
                positions[index].logits[request.member] = rows[len(ids) - len(request.ids) - 1]
        return _verify(positions, stats)

    return strategy


def _draft_block(step: DecodeStep, draft: Draft, block: int) -> RequestFlow[list[_GreedyPosition]]:
    """Return the positions of a block; a draft that is a member runs at all of them."""
    positions: list[_GreedyPosition] = []
    current: DecodeStep | None = step
    while current is not None:
        position = _GreedyPosition.of(current)
        positions.append(position)
        if draft.member >= 0:
            [rows] = yield [LogitsRequest(draft.member, position.ids[draft.member])]
            position.logits[draft.member] = rows[0]
        if len(positions) > block:
            break
        if draft.member >= 0:
            distribution = position.distributions[draft.member](position.logits[draft.member])
            if distribution.ids.size:
                position.proposal = int(distribution.ids[np.argmax(distribution.logprobs)])
        else:
            position.proposal = yield from draft.propose(current)
        if position.proposal is None:
            break
        current = yield from current.following(position.proposal)
    return positions


def _verification_requests(positions: list[_GreedyPosition]) -> tuple[list[Request], list[list[int]]]:
    """Return the requests for all logits that are missing, and the positions that each of them covers."""
    requests: list[Request] = []
    covered: list[list[int]] = []
    for member in range(len(positions[0].ids)):
        missing = [
            index
            for index, position in enumerate(positions)
            if position.step.weights[member] > 0 and member not in position.logits
        ]
        for group in prefix_groups([positions[index].ids[member] for index in missing]):
            indices = [missing[index] for index in group]
            longest, shortest = positions[indices[-1]].ids[member], positions[indices[0]].ids[member]
            requests.append(LogitsRequest(member, longest, len(longest) - len(shortest) + 1))
            covered.append(indices)
    return requests, covered


def _verify(positions: list[_GreedyPosition], stats: SpeculationStats) -> list[Choice]:
    """Take the average's most likely symbol at each position, as far as the proposals before it are accepted."""
    choices: list[Choice] = []
    for position in positions:
        weights = position.step.weights
        order = _heaviest_first(weights)
        parts = [(float(weights[i]), position.distributions[i](position.logits[i])) for i in order]
        choices.append(_most_likely(position.step, parts, order))
        if position.proposal is None:
            break
        stats.drafted += 1
        if choices[-1].symbol != position.proposal:
            break
        stats.accepted += 1
    return choices


def _heaviest_first(weights: Floats) -> list[int]:
    return [int(i) for i in np.argsort(-weights, kind="stable") if weights[i] > 0]


def _most_likely(step: DecodeStep, parts: list[tuple[float, Candidates]], order: list[int]) -> Choice:
    """Return the most likely symbol of an average, and the member that most likely wrote it."""
    average = mix(parts)
    best = int(np.argmax(average.logprobs))
    symbol = int(average.ids[best])
    top_contributor = order[int(np.argmax(responsibilities(symbol, parts)))]
    return Choice(symbol, top_contributor, float(average.logprobs[best]), step.top_logprobs(average))


def _lead(average: Candidates) -> float:
    """Return how much more probability the most likely symbol has than any other."""
    best = int(np.argmax(average.logprobs))
    others = np.delete(average.logprobs, best)
    return float(np.exp(average.logprobs[best]) - (np.exp(others.max()) if others.size else 0.0))
