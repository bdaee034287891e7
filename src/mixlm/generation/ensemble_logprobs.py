"""Log-probabilities of the ensemble's average for symbols that were chosen some other way.

The choices stay; every member with weight runs at each of the positions, without another forward where it ran there
already. The text is that of the strategy, and the cost is conventional's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixlm.core.mixing import mix
from mixlm.engines.requests import LogitsRequest
from mixlm.generation.sequence import Choice, DecodeStep, Flow, Strategy


def ensemble_logprobs(choices: Sequence[Choice]) -> Strategy:
    """Return the strategy that repeats these choices with the average's log-probability and `top_logprobs`."""

    def strategy(step: DecodeStep) -> Flow:
        current: DecodeStep | None = step
        repeated: list[Choice] = []
        for choice in choices:
            assert current is not None
            members = current.weighted_members
            responses = yield [LogitsRequest(i, current.views[i].ids()) for i in members]
            average = mix(
                [
                    (float(current.weights[i]), current.views[i].distribution(rows[0]))
                    for i, rows in zip(members, responses, strict=True)
                ]
            )
            index = np.flatnonzero(average.ids == choice.symbol)
            logprob = float(average.logprobs[index[0]]) if index.size else -np.inf
            repeated.append(choice._replace(logprob=logprob, top_logprobs=current.top_logprobs(average)))
            current = (yield from current.following(choice.symbol)) if len(repeated) < len(choices) else None
        return repeated

    return strategy
