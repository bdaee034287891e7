"""`greedy`: the most likely symbol of the average, or of a combination rule. One member's forward does not suffice.

Members run from the heaviest on, and no more of them than it takes for a symbol that the others cannot overtake: in the
average, one whose lead is larger than the whole weight of those that have not run. With a draft, every member runs a
block in one forward, and proposals are accepted as long as they are the most likely symbols. Both have one result.

Of equal probabilities, the lowest symbol wins. The log-probability is that of the combination where every member ran,
else a lower bound of it; where `top_logprobs` are requested, every member runs.
"""

from __future__ import annotations

from mixlm.core.options import GenerationOptions
from mixlm.decoding import StrategyContext
from mixlm.decoding.blocks import block_strategy
from mixlm.decoding.drafts import Draft, build_draft
from mixlm.decoding.rule_position import GreedyPosition
from mixlm.generation.sequence import SpeculationStats, Strategy
from mixlm.generation.target import RuleTarget, average_target


def build(options: GenerationOptions, context: StrategyContext) -> Strategy:
    """Return the strategy, with a draft where the options name one."""
    target = context.target or average_target()
    if options.draft not in (None, "none"):
        return greedy(target, build_draft(options.draft, context), options.block, context.speculation, together=True)
    # One forward for all members; of the average, the heaviest may decide alone.
    together = context.target is not None and len({*context.batch_keys}) == 1
    return greedy(target, together=together)


def greedy(
    target: RuleTarget,
    draft: Draft | None = None,
    block: int = 0,
    stats: SpeculationStats | None = None,
    *,
    together: bool = False,
) -> Strategy:
    """Return greedy decoding of what a rule makes of the members.

    Args:
        target: The rule.
        draft, block, stats: As of `block_strategy`.
        together: Run the members that are missing at once, not one after another.
    """

    return block_strategy(lambda step: GreedyPosition(step, target, together=together), draft, block, stats)
