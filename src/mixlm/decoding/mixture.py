"""`mixture`: draw one member by its weight, and only that one runs (paper, section 3.2, algorithm 2)."""

from __future__ import annotations

from mixlm.decoding.engine_sampling import generate_run, sample_request
from mixlm.generation.sequence import Choice, DecodeStep, Flow


def mixture(step: DecodeStep) -> Flow:
    """Draw `z ~ λ`, then a symbol from member z. The others catch up when they are next drawn."""
    z = step.noise.coin(step.weights)
    view = step.views[z]
    if view.member.samples_itself:
        return (yield from generate_run(step, z))
    [drawn] = yield [sample_request(step, z)]
    return [Choice(drawn.symbol, z, drawn.logprob, drawn.top_logprobs)]
