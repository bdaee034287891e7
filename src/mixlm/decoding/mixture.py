"""`mixture`: sample one member by its weight; only that member runs (paper, section 3.2, algorithm 2)."""

from __future__ import annotations

from mixlm.core.options import GenerationOptions
from mixlm.decoding import StrategyContext
from mixlm.decoding.engine_sampling import generate_run, sample_member
from mixlm.generation.sequence import Choice, DecodeStep, Flow, Strategy


def build(options: GenerationOptions, context: StrategyContext) -> Strategy:
    """Return the strategy; it has no options."""
    return mixture


def mixture(step: DecodeStep) -> Flow:
    """Toss the coin `z ~ λ`, then sample a symbol from member z. The others catch up when their coin next falls.

    A member that the router observes has run by then, and its sample is free.
    """
    z = step.noise.coin(step.weights)
    if step.views[z].member.samples_itself:
        return (yield from generate_run(step, z))
    response = yield from sample_member(step, z)
    return [Choice(response.symbol, z, response.logprob, response.top_logprobs)]
