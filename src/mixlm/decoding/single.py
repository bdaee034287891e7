"""`single`: one member writes alone. The baseline that an ensemble is compared with."""

from __future__ import annotations

from mixlm.core.options import GenerationOptions
from mixlm.decoding import StrategyContext
from mixlm.decoding.mixture import generate_run, sample_request
from mixlm.errors import UnsupportedError
from mixlm.generation.sequence import Choice, DecodeStep, Flow, Strategy


def build(options: GenerationOptions, context: StrategyContext) -> Strategy:
    """Return the strategy for the member of the largest weight; greedy decoding of it at temperature 0."""
    member = context.heaviest_member
    is_greedy = options.is_greedy(context.sampling[member])
    if context.traits.counts_bytes:
        if is_greedy:
            raise UnsupportedError(
                "temperature is 0, and the most likely byte of a member is not known", "use --unit piece"
            )
        from mixlm.decoding.byte_mixture import byte_mixture

        return byte_mixture(member)
    if is_greedy:
        from mixlm.decoding.greedy import greedy_single

        return greedy_single(member)
    return single(member)


def single(member: int) -> Strategy:
    """Return the strategy that always samples from one member, whatever the weights."""

    def strategy(step: DecodeStep) -> Flow:
        if step.views[member].member.samples_itself:
            return (yield from generate_run(step, member, single_member=True))
        [response] = yield [sample_request(step, member, single_member=True)]
        return [Choice(response.symbol, member, response.logprob, response.top_logprobs)]

    return strategy
