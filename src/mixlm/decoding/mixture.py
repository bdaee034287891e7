"""`mixture`: draw one member by its weight, and only that one runs (paper, section 3.2, algorithm 2)."""

from __future__ import annotations

from mixlm.decoding.runs import asked, written
from mixlm.generation.sequence import Choice, Flow, Step


def mixture(step: Step) -> Flow:
    """Draw `z ~ λ`, then a symbol from member z. The others catch up when they are next drawn."""
    z = step.noise.choice(step.weights)
    view = step.views[z]
    if view.member.writes:
        return (yield from written(step, z))
    [drawn] = yield [asked(step, z)]
    return [Choice(drawn.symbol, z, drawn.logprob, drawn.likeliest)]
