"""Log-probabilities under the ensemble's average, or its rule, for symbols that were chosen some other way.

The choices stay; every member with weight runs at each of the positions, without another forward where it ran there
already. The text is that of the strategy, and the cost is conventional's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mixlm.generation.next_distribution import ensemble_parts
from mixlm.generation.sequence import Choice, DecodeStep, Flow, Strategy

if TYPE_CHECKING:
    from mixlm.generation.target import RuleTarget


def ensemble_logprobs(choices: Sequence[Choice], target: RuleTarget | None = None) -> Strategy:
    """Return the strategy that repeats these choices with the ensemble's log-probability and `top_logprobs`.

    Args:
        choices: The choices.
        target: What a combination rule makes of the members; None for the average.
    """

    def strategy(step: DecodeStep) -> Flow:
        current: DecodeStep | None = step
        repeated: list[Choice] = []
        for choice in choices:
            assert current is not None
            ensemble = (yield from ensemble_parts(current, target)).combined
            index = np.flatnonzero(ensemble.ids == choice.symbol)
            logprob = float(ensemble.logprobs[index[0]]) if index.size else -np.inf
            repeated.append(choice._replace(logprob=logprob, top_logprobs=current.top_logprobs(ensemble)))
            current = (yield from current.following(choice.symbol)) if len(repeated) < len(choices) else None
        return repeated

    return strategy
