"""Combination rules: one distribution from those of several members.

`base` says what a rule is. Its file is imported when the rule is asked for by its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from typing import Any

from mixlm.core.combinations.base import Aligned, Combination, Unreported, align
from mixlm.errors import ConfigError, did_you_mean

__all__ = ["COMBINATIONS", "Aligned", "Combination", "Unreported", "align", "combination", "combination_class"]

# Module and class of each rule.
COMBINATIONS: Mapping[str, tuple[str, str]] = {
    "average": ("average", "Average"),
    "geometric": ("log_linear", "Geometric"),
    "power": ("power", "Power"),
    "max": ("power", "Max"),
    "min": ("power", "Min"),
    "contrastive": ("contrastive", "Contrastive"),
    "proxy": ("log_linear", "Proxy"),
    "guidance": ("log_linear", "Guidance"),
    "mean-then-truncate": ("average", "MeanThenTruncate"),
    "mean-then-temper": ("average", "MeanThenTemper"),
    "union-top-k": ("union_top_k", "UnionTopK"),
    "gac": ("average", "GaC"),
    "vote": ("vote", "Vote"),
    "defer": ("defer", "Defer"),
}
ALIASES: Mapping[str, str] = {"unite": "union-top-k"}


def combination_class(name: str) -> type[Combination]:
    """Return the class of a rule. Raises ConfigError where there is none of this name."""
    entry = COMBINATIONS.get(ALIASES.get(name, name)) if isinstance(name, str) else None
    if entry is None:
        known = [*COMBINATIONS, *ALIASES]
        hint = did_you_mean(name, known) if isinstance(name, str) else None
        raise ConfigError(f"there is no rule {name!r}", hint or f"the rules are {', '.join(COMBINATIONS)}")
    module = import_module(f"mixlm.core.combinations.{entry[0]}")
    rule: type[Combination] = getattr(module, entry[1])
    return rule


def combination(name: str, **parameters: Any) -> Combination:
    """Return the rule of a name with its parameters.

    Raises:
        ConfigError: There is no such rule, it has no such parameter, or a value is not allowed.
    """
    rule = combination_class(name)
    check_parameters(name, parameters, [parameter.name for parameter in fields(rule)])
    return rule(**parameters)


def check_parameters(rule: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise ConfigError where a parameter is not among those of a rule."""
    for parameter in given:
        if parameter not in known:
            allowed = f"its parameters are {', '.join(known)}" if known else "it has no parameters"
            hint = did_you_mean(parameter, known) or allowed
            raise ConfigError(f"{parameter} is given, and rule {rule} has no such parameter", hint)
