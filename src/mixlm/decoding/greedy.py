"""`greedy`: the most likely symbol of the average, or of a combination rule. One member's forward does not suffice.

Two forms with one result. Plain: one symbol at a time, running no more members than it takes to be certain. Drafted:
a draft proposes a block, every member runs it in one forward, and proposals are accepted as long as they are the
most likely symbols."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from mixlm.core.mixing import mix, responsibilities
from mixlm.core.options import GenerationOptions
from mixlm.decoding import StrategyContext
from mixlm.decoding.blocks import Position, draft_block, verify
from mixlm.decoding.drafts import Draft, NoDraft, build_draft
from mixlm.generation.sequence import Choice, DecodeStep, Flow, SpeculationStats, Strategy
from mixlm.generation.target import RuleTarget
from mixlm.types import Candidates, Floats


def build(options: GenerationOptions, context: StrategyContext) -> Strategy:
    """Return the plain form, or the drafted one where the options name a draft."""
    draft = None if options.draft is None else build_draft(options.draft, context)
    if context.target is not None:
        is_one_forward = len({*context.batch_keys}) == 1
        return greedy_by_rule(context.target, draft, options.block, context.speculation, together=is_one_forward)
    if draft is None:
        return greedy
    return greedy_drafted(draft, options.block, context.speculation)


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
        view = step.views[member]
        [rows] = yield [view.logits_request()]
        parts.append((float(step.weights[member]), view.check_possible(view.distribution(rows[0]))))
        remaining -= step.weights[member]
        if len(parts) == len(order):
            return [_most_likely(step, parts, order)]
        if not step.views[0].member.top_logprobs and _lead(mix(parts)) > remaining + 1e-9:
            return [_most_likely(step, parts, order)]


def greedy_single(member: int) -> Strategy:
    """Return the strategy that always takes one member's most likely symbol."""

    def strategy(step: DecodeStep) -> Flow:
        return (yield from greedy(replace(step, weights=np.eye(len(step.views))[member])))

    return strategy


class _AveragePosition(Position):
    """A position whose symbol is the most likely one of the average, once every member has run."""

    def __init__(self, step: DecodeStep) -> None:
        super().__init__(step, _heaviest_first(step.weights), [view.bind_distribution() for view in step.views])

    def needs(self) -> Sequence[int]:
        """Return the members that have not run."""
        return [member for member in self.members if member not in self.parts]

    def advance(self) -> None:
        """Choose the symbol if every member has run."""
        if not self.needs():
            possible = [self.step.views[member].check_possible(self.parts[member]) for member in self.members]
            parts = [*zip(self.step.weights[list(self.members)].tolist(), possible, strict=True)]
            self.choice = _most_likely(self.step, parts, list(self.members))

    def guess(self, member: int) -> int | None:
        """Return the member's most likely symbol."""
        part = self.parts[member]
        return int(part.ids[np.argmax(part.logprobs)]) if part.ids.size else None


def greedy_drafted(draft: Draft, block: int, stats: SpeculationStats | None = None) -> Strategy:
    """Return greedy decoding with a draft.

    A member proposes its most likely symbols. Members other than the draft run one forward a block, which yields one
    symbol more than are accepted.

    Args:
        draft: What proposes symbols.
        block: Proposals of a block, at most.
        stats: Records how many were verified and accepted.
    """
    return _drafted(_AveragePosition, draft, block, stats or SpeculationStats())


def greedy_by_rule(
    target: RuleTarget, draft: Draft | None, block: int, stats: SpeculationStats, *, together: bool = False
) -> Strategy:
    """Return greedy decoding of a combination rule: the most likely symbol of what it makes of the members.

    Members run one after another, and no more of them than it takes for a symbol that the others cannot overtake; with
    a draft, in blocks.

    Args:
        target: The rule.
        draft: What proposes symbols, if anything.
        block: Proposals of a block, at most.
        stats: Records how many were verified and accepted.
        together: Run all members at once, which is one forward.
    """
    from mixlm.decoding.rule_position import GreedyPosition

    if draft is None:
        return _drafted(lambda step: GreedyPosition(step, target, together=together), NoDraft(), 0, stats)
    return _drafted(lambda step: GreedyPosition(step, target, together=True), draft, block, stats)


def _drafted(
    position_at: Callable[[DecodeStep], Position], draft: Draft, block: int, stats: SpeculationStats
) -> Strategy:
    def strategy(step: DecodeStep) -> Flow:
        positions = yield from draft_block(step, draft, block, position_at)
        return (yield from verify(positions, stats))

    return strategy


def _heaviest_first(weights: Floats) -> list[int]:
    return [int(i) for i in np.argsort(-weights, kind="stable") if weights[i] > 0]


def _most_likely(step: DecodeStep, parts: list[tuple[float, Candidates]], order: list[int]) -> Choice:
    """Return the most likely symbol of an average, and the member that most likely wrote it."""
    average = mix(parts)
    symbol = int(average.ids[average.logprobs == average.logprobs.max()].min())
    best = int(np.argmax(average.ids == symbol))
    top_contributor = order[int(np.argmax(responsibilities(symbol, parts)))]
    return Choice(symbol, top_contributor, float(average.logprobs[best]), step.top_logprobs(average))


def _lead(average: Candidates) -> float:
    """Return how much more probability the most likely symbol has than any other."""
    best = int(np.argmax(average.logprobs))
    second = max(average.logprobs[:best].max(initial=-np.inf), average.logprobs[best + 1 :].max(initial=-np.inf))
    return float(np.exp(average.logprobs[best]) - np.exp(second))
