"""`conventional`: run every member, sample from what is made of all (paper, section 3.1, algorithm 1)."""

from __future__ import annotations

from mixlm.core.options import GenerationOptions
from mixlm.decoding import StrategyContext
from mixlm.decoding.blocks import block_strategy
from mixlm.decoding.rule_position import SampledPosition
from mixlm.generation.sequence import Strategy
from mixlm.generation.target import RuleTarget, average_target


def build(options: GenerationOptions, context: StrategyContext) -> Strategy:
    """Return the strategy for the average, or for the combination rule of the context."""
    return conventional(context.target or average_target())


def conventional(target: RuleTarget) -> Strategy:
    """Return the strategy that samples from what a rule makes of all members, built in full."""
    return block_strategy(lambda step: SampledPosition(step, target, dense=True))
