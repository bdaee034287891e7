"""The distribution of the next symbol, in full: what the ensemble makes of its members, and each member's part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mixlm.core.rng import Noise
from mixlm.generation.dispatch import RequestFlow
from mixlm.generation.sequence import Choice, DecodeStep, Flow, Strategy
from mixlm.generation.target import RuleTarget, average_target
from mixlm.types import Candidates, Floats, Ids

if TYPE_CHECKING:
    from mixlm.generation.generation import GenerationContext
    from mixlm.generation.prompt import EncodedPrompt
    from mixlm.units.base import Unit


class EnsembleParts(NamedTuple):
    """What was computed at one position, over the unit's symbols.

    members: those that took part. weights: float64 (members,). parts: the distribution of each. combined: the
    ensemble's.
    """

    members: list[int]
    weights: Floats
    parts: list[Candidates]
    combined: Candidates


@dataclass(frozen=True, eq=False)
class NextDistribution:
    """The exact distribution of the next symbol.

    Attributes:
        symbols: The symbols that have any probability, the most likely one first, int64 (n,).
        probs: Their probabilities, float64 (n,), summing to 1.
        members: The distribution of each member that took part, `K_i A_i p_i`: float64 (members, n). A row sums to less
            than 1 where the rule gives what a member may write no probability.
        weights: The weights of these members at this position, float64 (members,); for the average,
            `probs = weights @ members`.
        names: The names of these members.
    """

    symbols: Ids
    probs: Floats
    members: Floats
    weights: Floats
    names: tuple[str, ...]
    _unit: Unit = field(repr=False)

    @cached_property
    def symbol_bytes(self) -> tuple[bytes, ...]:
        """The bytes of each symbol; `b""` is end of text."""
        return tuple(map(self._unit.symbol_bytes, self.symbols.tolist()))

    @property
    def units(self) -> tuple[bytes, ...]:
        """Another name of `symbol_bytes`."""
        return self.symbol_bytes

    def __len__(self) -> int:
        return len(self.symbols)

    def __repr__(self) -> str:
        first = zip(self.symbols[:5].tolist(), self.probs[:5], strict=True)
        top = ", ".join(f"{self._unit.symbol_bytes(symbol)!r}: {prob:.3g}" for symbol, prob in first)
        return f"<NextDistribution of {len(self)} symbols by {', '.join(self.names)}: {top}{', …' * (len(self) > 5)}>"


def ensemble_parts(step: DecodeStep, target: RuleTarget) -> RequestFlow[EnsembleParts]:
    """Run every member that takes part, and combine them."""
    members = target.members(step)
    weights, views = target.weights(step, members), [step.views[i] for i in members]
    distributions = [target.distribution(step, i) for i in members]
    responses = yield [view.logits_request() for view in views]
    parts = [
        view.check_possible(distribution(response[0]))
        for view, distribution, response in zip(views, distributions, responses, strict=True)
    ]
    combined = target.in_symbols(step, target.combine(members, parts, weights))
    return EnsembleParts(members, weights, [target.in_symbols(step, part) for part in parts], combined)


def ensemble_logprobs(choices: Sequence[Choice], target: RuleTarget) -> Strategy:
    """Return the strategy that repeats these choices with the ensemble's log-probability and `top_logprobs`.

    Every member with weight runs at each of the positions, without another forward where it ran there already: the text
    is that of the strategy that chose, and the cost is conventional's.
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


def next_distribution(context: GenerationContext, prompt: EncodedPrompt) -> NextDistribution:
    """Return the distribution of the symbol after a prompt. The unit has distributions over all symbols."""
    result: list[EnsembleParts] = []

    def strategy(step: DecodeStep) -> Flow:
        result.append((yield from ensemble_parts(step, context.target or average_target())))
        return []

    context = replace(context, router=context.scoring_router, strategy=strategy)
    context.decode_step(context.begin_sequence(prompt), Noise(0))
    [(members, weights, parts, combined)] = result
    order = np.lexsort((combined.ids, -combined.logprobs))
    symbols = combined.ids[order]
    probs = np.exp(combined.logprobs[order])
    return NextDistribution(
        symbols,
        probs / probs.sum(),
        np.array([np.bincount(part.ids, np.exp(part.logprobs), context.unit.end + 1)[symbols] for part in parts]),
        weights,
        tuple(context.members[i].name for i in members),
        context.unit,
    )
