"""`greedy`: the most likely symbol of the average. It needs the average, so the mixture's shortcut does not apply."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mixlm.decoding.base import Choice, Flow, Step, Strategy
from mixlm.engines.base import Ask
from mixlm.mixing import mixed, responsibilities
from mixlm.sampling import Candidates


def greedy(step: Step) -> Flow:
    """Ask members from the heaviest on, and stop as soon as the rest cannot change the winner.

    A symbol's lead is safe when it is larger than the whole weight of the members not asked yet. Equal probabilities go
    to the lowest symbol. The log-probability is the average's when every member was asked, else a lower bound of it.
    """
    order = [int(i) for i in np.argsort(-step.weights, kind="stable") if step.weights[i] > 0]
    parts: list[tuple[float, Candidates]] = []
    left = 1.0
    while True:
        i = order[len(parts)]
        [logits] = yield [Ask(i, step.views[i].ids())]
        parts.append((float(step.weights[i]), step.views[i].law(logits[0])))
        left -= step.weights[i]
        law = mixed(parts)
        best = int(np.argmax(law.logprobs))
        if len(parts) == len(order) or _lead(law, best) > left + 1e-9:
            symbol = int(law.ids[best])
            author = order[int(np.argmax(responsibilities(symbol, parts)))]
            return [Choice(symbol, author, float(law.logprobs[best]))]


def greedy_alone(member: int) -> Strategy:
    """Return the strategy that always takes one member's most likely symbol."""

    def strategy(step: Step) -> Flow:
        return (yield from greedy(replace(step, weights=np.eye(len(step.views))[member])))

    return strategy


def _lead(law: Candidates, best: int) -> float:
    """Return how much more probability the best symbol has than any other."""
    others = np.delete(law.logprobs, best)
    return float(np.exp(law.logprobs[best]) - (np.exp(others.max()) if others.size else 0.0))
