"""Decoding strategies: how the next tokens of an ensemble are found. One file each; all sample the same law."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mixlm.config import supported_methods
from mixlm.core.options import GenerationOptions
from mixlm.decoding.auto import Auto
from mixlm.decoding.byte_mixture import byte_mixture
from mixlm.decoding.conventional import conventional, mix_then_truncate
from mixlm.decoding.cost_model import Costs
from mixlm.decoding.drafts import Draft, LookupDraft, MemberDraft
from mixlm.decoding.gac import gac
from mixlm.decoding.greedy import greedy, greedy_alone, greedy_drafted
from mixlm.decoding.mixture import mixture
from mixlm.decoding.single import single
from mixlm.decoding.speculative import speculative
from mixlm.decoding.unite import unite
from mixlm.decoding.word_mixture import word_mixture
from mixlm.errors import ConfigError, UnsupportedError, did_you_mean
from mixlm.generation.sequence import SpeculationStats, Strategy
from mixlm.types import Floats

__all__ = ["SpeculationStats", "StrategyContext", "build_strategy", "check_method"]

# Members whose sizes differ by less are not worth drafting with: a guess costs as much as what it saves.
_CHEAPER = 0.75


class StrategyContext(NamedTuple):
    """What a strategy is built for.

    weights: float64 (members,). names: the members'. own: their own sampling options. sizes: bytes of their weights.
    costs: what their forwards take. unit: the name of what they meet in.
    """

    weights: Floats
    names: Sequence[str]
    own: Sequence[Mapping[str, Any]]
    sizes: Sequence[int]
    costs: Costs
    unit: str = "piece"

    @classmethod
    def unmeasured(cls, weights: Floats, names: Sequence[str], own: Sequence[Mapping[str, Any]]) -> StrategyContext:
        """Return the parts of members of which nothing is known yet but what was asked for."""
        sizes = [1] * len(names)
        return cls(weights, names, own, sizes, Costs(lambda: [[] for _ in names], sizes))


def build_strategy(settings: GenerationOptions, parts: StrategyContext, tally: SpeculationStats) -> Strategy:
    """Return the strategy that settings ask for. tally: takes down what became of guesses.

    `single` writes with the member of the largest weight, the first of them where several have it. Raises ConfigError
    for a draft that is no member, UnsupportedError for options that have no common average, and for a method that the
    unit has no law for.
    """
    check_method(settings.method, parts.unit)
    if settings.method == "single":
        return _alone(settings, parts)
    after = settings.mixed_sampling(parts.own[0])
    if any(settings.mixed_sampling(one) != after for one in parts.own):
        raise UnsupportedError(
            "members have sampling options of their own, and "
            f"{settings.rule or 'mix-then-truncate'} has one average to apply them to",
            "give the same options to all members",
        )
    if after is not None:
        return {None: mix_then_truncate, "gac": gac, "unite": unite}[settings.rule](after)
    if settings.method == "speculative" or (settings.method == "greedy" and settings.draft is not None):
        drafted = speculative if settings.method == "speculative" else greedy_drafted
        return drafted(_draft(settings.draft, parts), settings.block, tally)
    if parts.unit in ("word", "byte"):
        return word_mixture() if parts.unit == "word" else byte_mixture()
    if settings.method == "auto":
        return Auto(parts.costs, parts.names, tally)
    return {"mixture": mixture, "conventional": conventional, "greedy": greedy}[settings.method]


def _alone(settings: GenerationOptions, parts: StrategyContext) -> Strategy:
    heaviest = int(np.argmax(parts.weights))
    if not settings.is_greedy(parts.own[heaviest]):
        return byte_mixture(heaviest) if parts.unit == "byte" else single(heaviest)
    if parts.unit == "byte":
        raise UnsupportedError(
            "temperature is 0, and the most likely byte of a member is not known", "use --unit piece"
        )
    return greedy_alone(heaviest)


def check_method(method: str, unit: str) -> None:
    """Raise UnsupportedError for a method that a unit has no law for."""
    if method not in supported_methods(unit):
        raise UnsupportedError(
            f"{method} does not go with the unit {unit}: a member's law of {unit}s is sampled, and never known in full",
            f"use --method mixture, or --unit piece with {method}",
        )


def _draft(name: str | None, parts: StrategyContext) -> Draft:
    """Return the draft of a name; with none, the cheapest member where one is clearly cheaper, else looking back."""
    names = list(parts.names)
    if name is None:
        cheapest = int(np.argmin(parts.sizes))
        others = [size for i, size in enumerate(parts.sizes) if i != cheapest and parts.weights[i] > 0]
        if not others or parts.sizes[cheapest] > _CHEAPER * max(others):
            return LookupDraft()
        return MemberDraft(cheapest, names[cheapest])
    if name == LookupDraft.name:
        return LookupDraft()
    if name not in names:
        allowed = [*names, LookupDraft.name]
        raise ConfigError(f"draft is {name!r}; it must be one of {', '.join(allowed)}", did_you_mean(name, allowed))
    return MemberDraft(names.index(name), name)
