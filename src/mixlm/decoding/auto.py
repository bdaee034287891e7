"""`auto`: mixture or speculative, whichever is faster here, measured as the text is generated.

Both write the same text for the same noise, so it may change its plan at any position without changing the
distribution.
"""

from __future__ import annotations

from collections.abc import Mapping

from mixlm.core.options import GenerationOptions
from mixlm.decoding import StrategyContext
from mixlm.decoding.cost_model import (
    BLOCKS,
    MIN_GAIN,
    TRIAL_INTERVAL,
    DraftPlan,
    ForwardCostEstimator,
    mixture_seconds,
    smoothed_acceptance,
    speculative_seconds,
)
from mixlm.decoding.drafts import Draft, LookupDraft, MemberDraft
from mixlm.decoding.speculative import speculative
from mixlm.generation.sequence import DecodeStep, Flow, SpeculationStats, Strategy
from mixlm.types import Floats

LOOKUP_BLOCK = 4
_MIN_LOOKUP_ACCEPTANCE = 0.25  # from which proposals that cost no forward are worth verifying


def build(options: GenerationOptions, context: StrategyContext) -> Strategy:
    """Return the strategy; it has no options."""
    return Auto(context)


class Auto:
    """A strategy that picks the draft and the length of each block.

    Args:
        context: The members. Where the router observes one, it runs at every position, so no other member drafts.
        acceptance: What is known of each draft by its name, to begin with.
    """

    def __init__(self, context: StrategyContext, acceptance: Mapping[str, SpeculationStats] | None = None) -> None:
        self._costs = ForwardCostEstimator(context.forwards, context.sizes, context.batch_keys)
        self._names = context.names
        self._total = context.speculation
        self._by_draft = dict(acceptance or {})
        self._observed = context.observed
        self._steps = 0
        self._next_trial = 0

    def __call__(self, step: DecodeStep) -> Flow:
        """Generate with the plan that promises most."""
        is_trial = self._steps >= self._next_trial
        if is_trial:
            self._next_trial = self._steps + TRIAL_INTERVAL
        draft, block = self.plan(step.weights, is_trial=is_trial)
        stats = self._by_draft.setdefault(draft.name, SpeculationStats())
        drafted, accepted = stats.drafted, stats.accepted
        choices = yield from speculative(draft, block, stats)(step)
        self._total.drafted += stats.drafted - drafted
        self._total.accepted += stats.accepted - accepted
        self._total.plan = f"speculative: {draft.name} drafts, {block} verified" if block else "mixture"
        self._steps += len(choices)
        return choices

    def plan(self, weights: Floats, *, is_trial: bool = False) -> tuple[Draft, int]:
        """Return what drafts, and how many proposals of a block are verified; 0 for the plain mixture.

        Args:
            weights: float64 (members,).
            is_trial: Assume a good acceptance rate of every draft.
        """
        costs = self._costs.estimate()
        plain = mixture_seconds(weights, costs)
        if self._observed is not None:
            plain += float(1 - weights[self._observed]) * costs(self._observed)
        cheapest, member_plan = plain * MIN_GAIN, None
        for member, name in enumerate(self._names):
            if self._observed not in (None, member):
                continue
            acceptance = self._acceptance(name, is_trial)
            for block in BLOCKS:
                seconds = speculative_seconds(weights, costs, DraftPlan(member, block, acceptance))
                if weights[member] < 1 and seconds < cheapest:
                    cheapest, member_plan = seconds, (member, block)
        if member_plan is not None:
            member, block = member_plan
            return MemberDraft(member, self._names[member]), block
        lookup = LookupDraft()
        if self._observed is not None:
            return lookup, 0
        worthwhile = self._acceptance(lookup.name, is_trial) > _MIN_LOOKUP_ACCEPTANCE
        return lookup, LOOKUP_BLOCK if worthwhile else 0

    def _acceptance(self, name: str, is_trial: bool) -> float:
        return smoothed_acceptance(self._by_draft.get(name, SpeculationStats()), is_trial=is_trial)
