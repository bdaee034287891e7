"""`conventional`: run every member, average, sample from the average (paper, section 3.1, algorithm 1)."""

from __future__ import annotations

import numpy as np

from mixlm.core.mixing import mix, responsibilities
from mixlm.core.options import GenerationOptions
from mixlm.core.rng import Noise
from mixlm.core.sampling import Transform
from mixlm.decoding import StrategyContext
from mixlm.engines.requests import LogitsRequest
from mixlm.errors import UnsupportedError
from mixlm.generation.sequence import Choice, DecodeStep, Flow, Strategy
from mixlm.types import Candidates, Sampling


def build(options: GenerationOptions, context: StrategyContext) -> Strategy:
    """Return the strategy, or with `mix_then_truncate` its variant."""
    return mix_then_truncate(common_sampling(options, context)) if options.mix_then_truncate else conventional


def conventional(step: DecodeStep) -> Flow:
    """Sample from the target `Σ λ_i K_i A_i p_i`, built in full."""
    return (yield from _sample_average(step, None))


def mix_then_truncate(sampling: Sampling) -> Strategy:
    """Return the variant that applies temperature and truncation to the average; members contribute plain ones.

    Its target distribution differs from that of every other strategy, and has no form that runs one member only. It is
    here because published ensembles sample it.
    """

    def strategy(step: DecodeStep) -> Flow:
        return (yield from _sample_average(step, sampling))

    return strategy


def common_sampling(options: GenerationOptions, context: StrategyContext) -> Sampling:
    """Return the sampling options that apply to the average. Raises UnsupportedError where members have their own."""
    first, *others = [options.mixed_sampling(sampling) for sampling in context.sampling]
    if first is None or any(sampling != first for sampling in others):
        raise UnsupportedError(
            "members have sampling options of their own, and "
            f"{options.rule or 'mix-then-truncate'} has one average to apply them to",
            "give the same options to all members",
        )
    return first


def sample_mixed(noise: Noise, distribution: Candidates, sampling: Sampling | None) -> tuple[Candidates, int]:
    """Apply `sampling` to a distribution and sample from it.

    Returns:
        The distribution that was sampled, and the index of the sample in it. Temperature 0 takes the most likely
        symbol, the first of equally likely ones, with its probability in the distribution as it was.
    """
    if sampling is not None and sampling.temperature == 0:
        return distribution, int(np.argmax(distribution.logprobs))
    if sampling is not None:
        candidates = Transform(sampling, np.zeros(0, dtype=np.int64))(distribution.logprobs)
        distribution = Candidates(distribution.ids[candidates.ids], candidates.logprobs)
    return distribution, noise.sample(distribution.ids, distribution.logprobs)


def _sample_average(step: DecodeStep, sampling: Sampling | None) -> Flow:
    members = step.weighted_members
    responses = yield [LogitsRequest(i, step.views[i].ids(), top_k_filter=step.views[i].top_k_filter) for i in members]
    parts = [(step.weights[i], step.views[i].distribution(rows[0])) for i, rows in zip(members, responses, strict=True)]
    average, index = sample_mixed(step.noise, mix(parts), sampling)
    symbol = int(average.ids[index])
    top_contributor = members[int(np.argmax(responsibilities(symbol, parts)))]
    return [Choice(symbol, top_contributor, float(average.logprobs[index]), step.top_logprobs(average))]
