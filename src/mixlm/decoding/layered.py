"""`layered`: any rule's distribution, with no more members at a position than it takes to be certain of the symbol.

A rule decides a position coin first, by its envelope (`core/combinations/base`), or not before every member has run.
Then the symbol is sampled from `C` with the noise of the position, as `conventional` does: the text is the same, symbol
for symbol.

Any of the three is combined with drafts (`blocks`). What a position chooses depends on its noise and on the members'
distributions, never on a draft; so a member may run ahead as the draft, the others verify several positions in one
forward, and positions that the draft's own sub-distribution decides need no verification.

The order of the members. Which symbol is sampled depends on it, though its distribution does not. So that equal seeds
give equal texts, whatever runs beside them and however fast, the order is a function of the text alone: first comes
the member with the least `c_i / s_i`, where `c_i` is the size of its weights and `s_i` the mean mass that the envelope
had when it alone had run, at earlier positions of this text at which it came first. The order changes every `_EPOCH`
positions, and a block ends there. Given the text before it, the order is independent of the noise of its position,
which is all that exactness needs. Drafts, the length of blocks, and which members run at once do not change the text;
they follow measured times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np

from mixlm.core.combinations.base import Combination
from mixlm.core.options import GenerationOptions
from mixlm.decoding import StrategyContext
from mixlm.decoding.blocks import MAX_BLOCK, draft_block, verify
from mixlm.decoding.cost_model import (
    BLOCKS,
    MIN_GAIN,
    TRIAL_INTERVAL,
    DraftPlan,
    ForwardCostEstimator,
    ForwardCosts,
    layered_drafted_seconds,
    layered_lookup_seconds,
    layered_seconds,
    smoothed_acceptance,
)
from mixlm.decoding.drafts import Draft, LookupDraft, MemberDraft, build_draft
from mixlm.decoding.rule_position import SampledPosition, checks_bounds
from mixlm.generation.sequence import DecodeStep, Flow, SpeculationStats, Strategy
from mixlm.generation.target import RuleTarget
from mixlm.types import Floats

LOOKUP_BLOCKS = (1, 2, 3, 4)
_EPOCH = 16  # positions
_PRIOR_ACCEPTANCE = 0.5  # where members decide what is easy alone, and the rest is what they disagree on
_PRIOR_MASS = 0.7  # with which a member decides alone, before any position has shown it


def build(options: GenerationOptions, context: StrategyContext) -> Strategy:
    """Return the strategy; with the draft and the block of the options, or else with those that promise most."""
    draft = None if options.draft is None else build_draft(options.draft, context)
    assert context.target is not None
    return Layered(context.target, context, draft, options.block)


@dataclass(frozen=True, slots=True)
class LayeredPlan:
    """What drafts, how many proposals of a block are verified, and whether members that are missing run at once."""

    draft: Draft
    block: int
    together: bool = False


class Layered:
    """The strategy for one sequence: it learns what members decide alone, and how often drafts are right.

    Args:
        target: The rule.
        context: The members.
        draft: What proposes symbols; None for what the measured times suggest.
        block: Proposals of a block, at most, with that draft.
    """

    def __init__(
        self, target: RuleTarget, context: StrategyContext, draft: Draft | None = None, block: int = 4
    ) -> None:
        self._target = target
        self._names = context.names
        self._sizes = np.maximum(np.array(context.sizes, dtype=np.float64), 1.0)
        self._costs = ForwardCostEstimator(context.forwards, context.sizes, context.batch_keys)
        self._total = context.speculation
        self._given = None if draft is None else LayeredPlan(draft, block)
        self._stats: dict[str, SpeculationStats] = {}
        self._steps = 0
        # Where members may decide alone, drafts are tried once it is known how often they do.
        self._decides_alone = target.has_bounds and not target.rule.speculates
        self._next_trial = TRIAL_INTERVAL if self._decides_alone else 0
        # The mass with which each member decides positions alone: of how many at which it came first, and in all.
        self._first_counts, self._first_masses = np.zeros(len(self._names)), np.zeros(len(self._names))
        self._epoch = -1
        self._ranking: list[int] = []
        self._has_envelope = cache(partial(has_envelope, target.rule))

    def __call__(self, step: DecodeStep) -> Flow:
        """Choose the symbols of a block."""
        members = self._target.members(step)
        plan = self._plan(step, members)
        limit = _EPOCH - step.noise.position % _EPOCH if self._learns_order(members) else MAX_BLOCK

        def position_at(current: DecodeStep) -> SampledPosition:
            taking_part = self._target.members(current)
            return SampledPosition(
                current,
                self._target,
                self._order(current.noise.position, taking_part) if self._has_order(taking_part) else None,
                complete=checks_bounds(self._target.rule, current.noise.position),
                together=plan.together,
            )

        positions = yield from draft_block(step, plan.draft, plan.block, position_at, limit)
        stats = SpeculationStats()
        choices = yield from verify(positions, stats)
        self._record(plan, stats, positions[: len(choices)])
        return choices

    def _order(self, position: int, members: Sequence[int]) -> list[int]:
        """Return the members in the order of a position: each first in turn in the first epoch, then by what it showed.

        Later epochs try one other member at their first position, unless it has never decided anything.
        """
        if not self._learns_order(members):
            return list(members)
        epoch, offset = divmod(position, _EPOCH)
        if epoch != self._epoch:
            self._epoch = epoch
            means = self._first_masses / np.maximum(self._first_counts, 1)
            cost = self._sizes / np.maximum(means, 1e-6)
            self._ranking = [int(i) for i in np.argsort(cost if epoch else self._sizes, kind="stable")]
        order = [member for member in self._ranking if member in members]
        tried = members[(offset if epoch == 0 else epoch) % len(members)]
        if epoch == 0 or (offset == 0 and (self._first_masses[tried] > 0 or not self._first_counts[tried])):
            order.remove(tried)
            order.insert(0, tried)
        return order

    def _has_order(self, members: Sequence[int]) -> bool:
        """Whether the rule has an envelope for so many members; they may become fewer in the course of a text."""
        return self._target.has_bounds and self._has_envelope(len(members))

    def _learns_order(self, members: Sequence[int]) -> bool:
        return self._has_order(members) and not self._target.rule.speculates

    def _plan(self, step: DecodeStep, members: Sequence[int]) -> LayeredPlan:
        """Return the cheapest plan, by the times of forwards and what was decided and accepted so far."""
        is_trial = self._steps >= self._next_trial
        if is_trial:
            self._next_trial = self._steps + TRIAL_INTERVAL
        costs = self._costs.estimate()
        # Smoothed towards what rules with bounds often have.
        prior = _PRIOR_MASS if self._decides_alone else 0.0
        masses = (self._first_masses[members] + 4 * prior) / (self._first_counts[members] + 4)
        first = self._target.rule.first_member(self._target.weights(step, members))
        if first is None:
            first = np.zeros(len(members))
            first[int(np.argmin(self._sizes[members] / np.maximum(masses, 1e-6)))] = 1.0
        plain, at_once = layered_seconds(members, first, masses, costs), costs.together(members)
        together = at_once <= plain
        if self._given is not None:
            return replace(self._given, together=together)
        if self._decides_alone and self._steps < _EPOCH:  # times and masses of few positions say little
            return LayeredPlan(Draft(), 0, together)
        drafted = self._cheapest_draft(members, first * masses, costs, is_trial=is_trial)
        if drafted is not None and drafted[0] < min(plain, at_once) * MIN_GAIN:
            return drafted[1]
        lookup = LookupDraft()
        if is_trial or lookup.name in self._stats:
            acceptance = self._acceptance(lookup.name, is_trial=is_trial)
            looked_up = [
                (layered_lookup_seconds(members, first, masses, costs, drafting), drafting.block)
                for drafting in (DraftPlan(lookup.member, block, acceptance) for block in LOOKUP_BLOCKS)
            ]
            seconds, block = min(looked_up)
            if seconds < min(plain, at_once) * MIN_GAIN:
                return LayeredPlan(lookup, block, together)
        return LayeredPlan(Draft(), 0, together)

    def _cheapest_draft(
        self, members: Sequence[int], decided: Floats, costs: ForwardCosts, *, is_trial: bool
    ) -> tuple[float, LayeredPlan] | None:
        """Return the seconds of a token and the plan of the best draft that is a member."""
        if len(members) == 1:
            return None
        plans = []
        for share, member in zip(decided.tolist(), members, strict=True):
            name = self._names[member]
            for block in BLOCKS:
                drafting = DraftPlan(member, block, self._acceptance(name, is_trial=is_trial))
                seconds = layered_drafted_seconds(members, costs, drafting, share)
                plans.append((seconds, member, block))
        seconds, member, block = min(plans)
        return seconds, LayeredPlan(MemberDraft(member, self._names[member]), block)

    def _record(self, plan: LayeredPlan, stats: SpeculationStats, positions: Sequence[SampledPosition]) -> None:
        self._steps += len(positions)
        for position in positions:
            if position.first is not None and position.first_mass is not None:
                self._first_masses[position.first] += position.first_mass
                self._first_counts[position.first] += 1
        of_draft = self._stats.setdefault(plan.draft.name, SpeculationStats())
        for record in (of_draft, self._total):
            record.drafted += stats.drafted
            record.accepted += stats.accepted
        if self._given is None and self._decides_alone and plan.draft.name == Draft.name:
            self._record_proposals(positions)

    def _record_proposals(self, positions: Sequence[SampledPosition]) -> None:
        """Record whose proposals would have been right at positions where every member ran: nothing has to be tried."""
        for position in positions:
            if len(position.parts) < len(position.members):
                continue
            assert position.choice is not None
            for member in position.members:
                stats = self._stats.setdefault(self._names[member], SpeculationStats())
                stats.drafted += 1
                stats.accepted += position.guess(member) == position.choice.symbol

    def _acceptance(self, name: str, *, is_trial: bool) -> float:
        """Return a draft's acceptance rate so far, smoothed towards that of a trial.

        Where members decide positions alone, those of members are known without a trial, from what they would have
        proposed.
        """
        stats = self._stats.get(name, SpeculationStats())
        if self._decides_alone and name in self._names:
            return (stats.accepted + 4 * _PRIOR_ACCEPTANCE) / (stats.drafted + 4)
        return smoothed_acceptance(stats, is_trial=is_trial)


def has_envelope(rule: Combination, members: int) -> bool:
    """Whether a rule has an envelope, and no coin to toss first."""
    weights = np.full(members, 1 / members)
    if members < 2 or rule.first_member(weights) is not None:
        return False
    return rule.envelope(np.full((members, 2), 0.5), weights, [0]) is not None
