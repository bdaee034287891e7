"""Decoding strategies: how the next symbols of a sequence are chosen. One file each, imported when it is first used.

`mixture`, `speculative`, `auto` and `conventional` sample one target distribution `Σ λ_i q_i`; `greedy` takes its mode.
`layered`, `conventional` and `greedy` do so for any combination rule.
A strategy is a function from a `DecodeStep` to a flow of requests; its module has `build(options, context)`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from mixlm.core.options import GenerationOptions
from mixlm.core.rule_options import AnyRule, check_whole_tokens
from mixlm.engines.requests import Forward
from mixlm.errors import UnsupportedError
from mixlm.generation.sequence import SpeculationStats, Strategy
from mixlm.types import Floats
from mixlm.units import unit_traits
from mixlm.units.base import UnitTraits

if TYPE_CHECKING:
    from mixlm.generation.target import RuleTarget


@dataclass(frozen=True)
class StrategyContext:
    """What a strategy is built for.

    Args:
        weights: float64 (members,).
        names: The members' names.
        sampling: Each member's own sampling options.
        sizes: Bytes of each member's weights.
        forwards: Returns each member's forwards so far, for strategies that measure them.
        unit: The name of the unit.
        traits: What the unit can do.
        speculation: Records what becomes of drafts.
        observed: The member that the router observes; it runs at every position.
        target: What the combination rule makes of the members; None for the average.
        batch_keys: Equal for members whose requests of one moment run in one forward; () for none.
    """

    weights: Floats
    names: Sequence[str]
    sampling: Sequence[Mapping[str, Any]]
    sizes: Sequence[int]
    forwards: Callable[[], Sequence[Sequence[Forward]]]
    unit: str = "piece"
    traits: UnitTraits = field(default_factory=UnitTraits)
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    observed: int | None = None
    target: RuleTarget | None = None
    batch_keys: Sequence[Hashable] = ()

    @classmethod
    def unloaded(cls, weights: Floats, names: Sequence[str], sampling: Sequence[Mapping[str, Any]]) -> StrategyContext:
        """Return the context of members that are not loaded, to check options."""
        return cls(weights, names, sampling, [1] * len(names), lambda: [[] for _ in names])

    @property
    def heaviest_member(self) -> int:
        """The member of the largest weight, which `single` uses; the first of them where several have it."""
        return int(np.argmax(self.weights))


def build_strategy(options: GenerationOptions, context: StrategyContext) -> Strategy:
    """Return the strategy that the options name.

    Raises:
        ConfigError: The draft is not a member.
        UnsupportedError: The unit cannot be sampled by the method, or the options have no common average; or the method
            does not take the router.
    """
    check_unit_method(options.method, context.unit)
    if context.observed is not None:
        check_observing(options.method, context.names[context.observed])
    module = import_module(f"mixlm.decoding.{strategy_name(options, context)}")
    strategy: Strategy = module.build(options, context)
    return strategy


def check_observing(method: str, observed: str) -> None:
    """Raise UnsupportedError where a method does not take a router that observes a member. observed: its name."""
    if method == "layered":
        raise UnsupportedError(
            f"the router observes {observed}, and {method} orders members and drafts before any of them has run",
            "use --method mixture, speculative or conventional, or a router of the text",
        )


def strategy_name(options: GenerationOptions, context: StrategyContext) -> str:
    """Return the name of the strategy, and of its module, that the options name."""
    if options.method == "mixture" or (options.method == "auto" and not context.traits.full_distributions):
        return context.traits.mixture
    return options.method


def check_unit_method(method: str, unit: str, rule: AnyRule | None = None) -> None:
    """Raise UnsupportedError where a unit's target distribution cannot be sampled by a method, or a rule has none."""
    traits = unit_traits(unit)
    if rule is not None and method != "single":
        check_whole_tokens(rule, full_distributions=traits.full_distributions)
    if method not in traits.methods:
        raise UnsupportedError(
            f"{method} does not work with the unit {unit} ({', '.join(traits.methods)} do): it needs a member's full "
            f"distribution over {unit}s, which one forward pass does not give",
            f"use --method mixture, or --unit piece with {method}",
        )
