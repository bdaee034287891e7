"""`conventional`: run every member, average, sample from the average (paper, section 3.1, algorithm 1)."""

from __future__ import annotations

import numpy as np

from mixlm.core.mixing import mix, responsibilities
from mixlm.core.options import GenerationOptions
from mixlm.decoding import StrategyContext
from mixlm.generation.sequence import Choice, DecodeStep, Flow, Strategy


def build(options: GenerationOptions, context: StrategyContext) -> Strategy:
    """Return the strategy for the average, or for the combination rule of the context."""
    if context.target is None:
        return conventional
    from mixlm.decoding.rule_position import dense

    return dense(context.target)


def conventional(step: DecodeStep) -> Flow:
    """Sample from the target `Σ λ_i K_i A_i p_i`, built in full."""
    members = step.weighted_members
    rows = {i: row for i in members if (row := step.observed_row(i)) is not None}
    others = [i for i in members if i not in rows]
    responses = yield [step.views[i].logits_request() for i in others]
    rows |= {i: response[0] for i, response in zip(others, responses, strict=True)}
    parts = [(step.weights[i], step.views[i].check_possible(step.views[i].distribution(rows[i]))) for i in members]
    average = mix(parts)
    index = step.noise.sample(average.ids, average.logprobs)
    symbol = int(average.ids[index])
    top_contributor = members[int(np.argmax(responsibilities(symbol, parts)))]
    return [Choice(symbol, top_contributor, float(average.logprobs[index]), step.top_logprobs(average))]
