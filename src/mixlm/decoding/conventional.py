"""`conventional`: run every member, average, draw from the average (paper, section 3.1, algorithm 1)."""

from __future__ import annotations

import numpy as np

from mixlm.core.mixing import mix, responsibilities
from mixlm.core.rng import Noise
from mixlm.core.sampling import Transform
from mixlm.engines.base import LogitsRequest
from mixlm.generation.sequence import Choice, DecodeStep, Flow, Strategy
from mixlm.types import Candidates, Sampling


def conventional(step: DecodeStep) -> Flow:
    """Draw from `Σ λ_i K_i A_i p_i`, built in full."""
    return (yield from _averaged(step, None))


def mix_then_truncate(sampling: Sampling) -> Strategy:
    """Return the variant that truncates and tempers after mixing; members contribute plain distributions.

    This is another law than every other strategy's, and has no form that runs one member only. It is here because
    published ensembles sample it.
    """

    def strategy(step: DecodeStep) -> Flow:
        return (yield from _averaged(step, sampling))

    return strategy


def pick(noise: Noise, law: Candidates, after: Sampling | None) -> tuple[Candidates, int]:
    """Temper and truncate a law by `after`, and draw from it. Returns the law that was drawn from, and the place in it.

    Temperature 0 takes the most likely, of equally likely ones the first, with its probability in the law as it was.
    """
    if after is not None and after.temperature == 0:
        return law, int(np.argmax(law.logprobs))
    if after is not None:
        kept = Transform(after, np.zeros(0, dtype=np.int64))(law.logprobs)
        law = Candidates(law.ids[kept.ids], kept.logprobs)
    return law, noise.sample(law.ids, law.logprobs)


def _averaged(step: DecodeStep, after: Sampling | None) -> Flow:
    asked = [i for i, weight in enumerate(step.weights) if weight > 0]
    replies = yield [LogitsRequest(i, step.views[i].ids(), top_k_filter=step.views[i].top_k_filter) for i in asked]
    parts = [(step.weights[i], step.views[i].distribution(logits[0])) for i, logits in zip(asked, replies, strict=True)]
    law, at = pick(step.noise, mix(parts), after)
    symbol = int(law.ids[at])
    author = asked[int(np.argmax(responsibilities(symbol, parts)))]
    return [Choice(symbol, author, float(law.logprobs[at]), step.top_logprobs(law))]
