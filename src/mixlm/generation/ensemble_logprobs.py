"""Log-probabilities of the ensemble's average at places that were chosen some other way.

What was chosen stays; every member with weight is asked for its law at each of the places, those that ran there already
without another forward. The text is that of the strategy, and the cost is conventional's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixlm.core.mixing import mix
from mixlm.engines.base import LogitsRequest
from mixlm.generation.sequence import Choice, DecodeStep, Flow, Strategy


def ensemble_logprobs(choices: Sequence[Choice]) -> Strategy:
    """Return the strategy that makes these choices again, with the average's figures: log-probability, alternatives."""

    def strategy(step: DecodeStep) -> Flow:
        here: DecodeStep | None = step
        out: list[Choice] = []
        for choice in choices:
            assert here is not None
            asked = [i for i, weight in enumerate(here.weights) if weight > 0]
            replies = yield [LogitsRequest(i, here.views[i].ids()) for i in asked]
            parts = [
                (float(here.weights[i]), here.views[i].distribution(rows[0]))
                for i, rows in zip(asked, replies, strict=True)
            ]
            law = mix(parts)
            at = np.flatnonzero(law.ids == choice.symbol)
            logprob = float(law.logprobs[at[0]]) if at.size else -np.inf
            out.append(choice._replace(logprob=logprob, top_logprobs=here.top_logprobs(law)))
            here = here.push(choice.symbol) if len(out) < len(choices) else None
        return out

    return strategy
