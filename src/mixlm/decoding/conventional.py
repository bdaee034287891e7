"""`conventional`: run every member, average, draw from the average (paper, section 3.1, algorithm 1)."""

from __future__ import annotations

import numpy as np

from mixlm.decoding.base import Choice, Flow, Step, Strategy
from mixlm.engines.base import Ask
from mixlm.mixing import mixed, responsibilities
from mixlm.records import Sampling
from mixlm.sampling import Candidates, Transform


def conventional(step: Step) -> Flow:
    """Draw from `Σ λ_i K_i A_i p_i`, built in full."""
    return (yield from _averaged(step, None))


def mix_then_truncate(sampling: Sampling) -> Strategy:
    """Return the variant that truncates and tempers after mixing; members contribute plain distributions.

    This is another law than every other strategy's, and has no form that runs one member only. It is here because
    published ensembles sample it.
    """
    after = Transform(sampling, np.zeros(0, dtype=np.int64))

    def strategy(step: Step) -> Flow:
        return (yield from _averaged(step, after))

    return strategy


def _averaged(step: Step, after: Transform | None) -> Flow:
    asked = [i for i, weight in enumerate(step.weights) if weight > 0]
    replies = yield [Ask(i, step.views[i].ids()) for i in asked]
    parts = [(step.weights[i], step.views[i].law(logits[0])) for i, logits in zip(asked, replies, strict=True)]
    law = mixed(parts)
    if after is not None:
        kept = after(law.logprobs)
        law = Candidates(law.ids[kept.ids], kept.logprobs)
    at = step.noise.draw(law.ids, law.logprobs)
    symbol = int(law.ids[at])
    author = asked[int(np.argmax(responsibilities(symbol, parts)))]
    return [Choice(symbol, author, float(law.logprobs[at]))]
