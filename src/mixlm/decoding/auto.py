"""`auto`: mixture or speculative, whichever is faster here, measured as the text is written.

All of them write the same text for the same noise, so it may change its mind at any position and no law changes.
"""

from __future__ import annotations

from collections.abc import Sequence

from mixlm.decoding.cost_model import Costs, mixture_cost, speculative_cost
from mixlm.decoding.drafts import LookupDraft, MemberDraft
from mixlm.decoding.speculative import speculative
from mixlm.generation.sequence import DecodeStep, Flow, SpeculationStats
from mixlm.types import Floats

CHECKS = (1, 2, 3, 4, 6, 8)
_GAIN = 0.97  # a plan must be this much cheaper than the mixture, or its forwards are not worth the variance
_AGAIN = 64  # steps after which a plan that was given up is tried once more
_LOOKUP = 0.25  # acceptance from which guesses that cost no forward are worth checking


class Auto:
    """A strategy that picks the draft and the length of each block."""

    def __init__(self, costs: Costs, names: Sequence[str], tally: SpeculationStats) -> None:
        self._costs = costs
        self._names = names
        self._tally = tally
        self._known: dict[str, SpeculationStats] = {}
        self._steps = 0
        self._hopeful_at = 0

    def __call__(self, step: DecodeStep) -> Flow:
        """Write with the plan that promises most."""
        draft, checks = self._plan(step.weights)
        own = self._known.setdefault(draft.name, SpeculationStats())
        before = own.drafted, own.accepted
        choices = yield from speculative(draft, checks, own)(step)
        self._tally.drafted += own.drafted - before[0]
        self._tally.accepted += own.accepted - before[1]
        self._tally.plan = f"speculative: {draft.name} drafts, {checks} checked" if checks else "mixture"
        self._steps += len(choices)
        return choices

    def _plan(self, weights: Floats) -> tuple[MemberDraft | LookupDraft, int]:
        hopeful = self._steps >= self._hopeful_at
        if hopeful:
            self._hopeful_at = self._steps + _AGAIN
        seconds, slopes = self._costs.measure()
        least, plan = mixture_cost(weights, seconds, slopes) * _GAIN, None
        for member, name in enumerate(self._names):
            right = self._acceptance(name, hopeful)
            for checks in CHECKS:
                cost = speculative_cost(weights, seconds, slopes, (member, checks, right))
                if weights[member] < 1 and cost < least:
                    least, plan = cost, (member, checks)
        if plan is not None:
            return MemberDraft(plan[0], self._names[plan[0]]), plan[1]
        lookup = LookupDraft()
        return lookup, 4 if self._acceptance(lookup.name, hopeful) > _LOOKUP else 0

    def _acceptance(self, name: str, hopeful: bool) -> float:
        """Return how often a draft's guesses were right, as far as is known; at least a good rate where hopeful."""
        known = self._known.get(name, SpeculationStats())
        measured = (known.accepted + 3.6) / (known.drafted + 4)
        return max(measured, 0.9) if hopeful else measured
