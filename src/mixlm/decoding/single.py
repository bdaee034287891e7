"""`single`: one member writes alone. The baseline that an ensemble is compared with."""

from __future__ import annotations

from mixlm.decoding.engine_sampling import generate_run, sample_request
from mixlm.generation.sequence import Choice, DecodeStep, Flow, Strategy


def single(member: int) -> Strategy:
    """Return the strategy that always draws from one member, whatever the weights."""

    def strategy(step: DecodeStep) -> Flow:
        view = step.views[member]
        if view.member.samples_itself:
            return (yield from generate_run(step, member, always=True))
        [drawn] = yield [sample_request(step, member, always=True)]
        return [Choice(drawn.symbol, member, drawn.logprob, drawn.top_logprobs)]

    return strategy
