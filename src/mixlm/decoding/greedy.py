"""`greedy`: the most likely symbol of the average. It needs the average, so the mixture's shortcut does not apply.

Two forms with one result. Plain: one symbol at a time, asking no more members than it takes to be certain. Drafted: a
draft writes ahead, every member reads the block in one forward, and symbols stand as long as they are the average's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mixlm.core.mixing import mix, responsibilities
from mixlm.decoding.drafts import Draft, prefix_groups
from mixlm.engines.base import LogitsRequest, Request
from mixlm.generation.sequence import Choice, DecodeStep, Flow, SpeculationStats, Strategy
from mixlm.types import Candidates, Floats, Ids, Logits


def greedy(step: DecodeStep) -> Flow:
    """Ask members from the heaviest on, and stop as soon as the rest cannot change the winner.

    A symbol's lead is safe when it is larger than the whole weight of the members not asked yet. Equal probabilities go
    to the lowest symbol. The log-probability is the average's when every member was asked, else a lower bound of it;
    where alternatives are told, every member is asked.
    """
    order = _heaviest_first(step.weights)
    parts: list[tuple[float, Candidates]] = []
    left = 1.0
    while True:
        i = order[len(parts)]
        [logits] = yield [LogitsRequest(i, step.views[i].ids())]
        parts.append((float(step.weights[i]), step.views[i].distribution(logits[0])))
        left -= step.weights[i]
        law = mix(parts)
        best = int(np.argmax(law.logprobs))
        certain = not step.views[0].member.top_logprobs and _lead(law, best) > left + 1e-9
        if certain or len(parts) == len(order):
            return [_chosen(step, parts, order)]


def greedy_alone(member: int) -> Strategy:
    """Return the strategy that always takes one member's most likely symbol."""

    def strategy(step: DecodeStep) -> Flow:
        return (yield from greedy(replace(step, weights=np.eye(len(step.views))[member])))

    return strategy


@dataclass(slots=True)
class _Position:
    """One position of a block: what each member reads, how its logits become its law, and its logits."""

    step: DecodeStep
    ids: list[Ids]
    laws: list[Callable[[Logits], Candidates]]
    logits: dict[int, Logits]
    guess: int | None = None


def greedy_drafted(draft: Draft, length: int, tally: SpeculationStats | None = None) -> Strategy:
    """Return greedy decoding with `length` symbols written ahead: by a member, its likeliest ones, or by looking back.

    Members other than the draft run one forward for a block, and the block yields one symbol more than was guessed
    right.
    """
    tally = tally or SpeculationStats()

    def strategy(step: DecodeStep) -> Flow:
        block: list[_Position] = []
        here: DecodeStep | None = step
        while here is not None:
            views = here.views
            position = _Position(here, [v.ids().copy() for v in views], [v.bind_distribution() for v in views], {})
            block.append(position)
            if draft.member >= 0:
                [logits] = yield [LogitsRequest(draft.member, position.ids[draft.member])]
                position.logits[draft.member] = logits[0]
            if len(block) > length:
                break
            if draft.member >= 0:
                law = position.laws[draft.member](position.logits[draft.member])
                position.guess = int(law.ids[np.argmax(law.logprobs)]) if law.ids.size else None
            else:
                position.guess = yield from draft.propose(here)
            if position.guess is None:
                break
            here = here.push(position.guess)
        asks, places = _reading(block)
        replies = yield asks
        for ask, at, logits in zip(asks, places, replies, strict=True):
            for one in at:
                block[one].logits[ask.member] = logits[len(block[one].ids[ask.member]) - len(ask.ids) - 1]
        return _verified(block, tally)

    return strategy


def _reading(block: list[_Position]) -> tuple[list[Request], list[list[int]]]:
    """Return what to ask so that every member's logits are known at every position, and which ones an answer holds."""
    asks: list[Request] = []
    places: list[list[int]] = []
    for member in range(len(block[0].ids)):
        open_at = [at for at, one in enumerate(block) if one.step.weights[member] > 0 and member not in one.logits]
        for group in prefix_groups([block[at].ids[member] for at in open_at]):
            at = [open_at[one] for one in group]
            ids, first = block[at[-1]].ids[member], block[at[0]].ids[member]
            asks.append(LogitsRequest(member, ids, len(ids) - len(first) + 1))
            places.append(at)
    return asks, places


def _verified(block: list[_Position], tally: SpeculationStats) -> list[Choice]:
    """Take the average's likeliest symbol at each position, as far as the guesses before it were right."""
    out: list[Choice] = []
    for one in block:
        weights = one.step.weights
        order = _heaviest_first(weights)
        parts = [(float(weights[i]), one.laws[i](one.logits[i])) for i in order]
        out.append(_chosen(one.step, parts, order))
        if one.guess is None:
            break
        tally.drafted += 1
        if out[-1].symbol != one.guess:
            break
        tally.accepted += 1
    return out


def _heaviest_first(weights: Floats) -> list[int]:
    return [int(i) for i in np.argsort(-weights, kind="stable") if weights[i] > 0]


def _chosen(step: DecodeStep, parts: list[tuple[float, Candidates]], order: list[int]) -> Choice:
    """Return the likeliest symbol of an average, and the member that is likeliest to have written it."""
    law = mix(parts)
    best = int(np.argmax(law.logprobs))
    symbol = int(law.ids[best])
    author = order[int(np.argmax(responsibilities(symbol, parts)))]
    return Choice(symbol, author, float(law.logprobs[best]), step.top_logprobs(law))


def _lead(law: Candidates, best: int) -> float:
    """Return how much more probability the best symbol has than any other."""
    others = np.delete(law.logprobs, best)
    return float(np.exp(law.logprobs[best]) - (np.exp(others.max()) if others.size else 0.0))
