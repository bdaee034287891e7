"""`single`: one member writes alone. The baseline that an ensemble is compared with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mixlm.core.options import GenerationOptions
from mixlm.decoding import StrategyContext
from mixlm.decoding.mixture import mixture
from mixlm.errors import UnsupportedError
from mixlm.generation.dispatch import RequestFlow
from mixlm.generation.sequence import DecodeStep, Strategy


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

        return single(member, byte_mixture)
    if is_greedy:
        from mixlm.decoding.greedy import greedy
        from mixlm.generation.target import average_target

        return single(member, greedy(average_target()))
    return single(member, mixture)


def single(member: int, strategy: Strategy) -> Strategy:
    """Return a strategy for one member, whatever the weights."""

    def alone(step: DecodeStep) -> DecodeStep:
        def following(symbol: int) -> RequestFlow[DecodeStep | None]:
            after = yield from step.following(symbol)
            return None if after is None else alone(after)

        return replace(step, weights=np.eye(len(step.views))[member], following=following)

    return lambda step: strategy(alone(step))
