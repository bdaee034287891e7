"""How options name a combination rule: by its name and parameters, as an object, or as a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from mixlm.choices import RULES, Rule
from mixlm.errors import ConfigError, UnsupportedError, did_you_mean
from mixlm.types import Floats

if TYPE_CHECKING:
    from mixlm.core.combinations import Combination

    AnyRule: TypeAlias = Rule | Combination | Callable[[Floats, Floats], Floats]
else:
    AnyRule = Any
# The methods that sample the average, and no other rule.
AVERAGE_METHODS = ("mixture", "speculative", "auto")
# Published for the most likely token, so that temperature 0 is a way to sample them.
PUBLISHED_GREEDY = ("gac", "union-top-k", "unite")


def is_average(rule: object) -> bool:
    """Whether options name no rule, or the average."""
    return rule is None or rule == "average"


def rule_name(rule: AnyRule) -> str:
    """Return the name of a rule, for messages."""
    if isinstance(rule, str):
        return rule
    name = getattr(rule, "name", None) or getattr(rule, "__name__", type(rule).__name__)
    return str(name)


def check_rule(rule: object) -> None:
    """Raise ConfigError for what is no rule."""
    if isinstance(rule, str):
        if rule not in RULES:
            raise ConfigError(f"rule is {rule!r}; it must be one of {', '.join(RULES)}", did_you_mean(rule, RULES))
    elif not hasattr(rule, "combine") and not callable(rule):
        raise ConfigError(
            f"rule is {rule!r}; it must be a name, a Combination, or a function of probabilities and weights"
        )


def check_method(rule: AnyRule, method: str) -> None:
    """Raise UnsupportedError where a method samples the average only."""
    if method in AVERAGE_METHODS:
        raise UnsupportedError(
            f"method {method} samples the average, and the rule is {rule_name(rule)}",
            "use it with --method layered, conventional or greedy",
        )


def build_rule(rule: AnyRule, parameters: Mapping[str, Any]) -> Combination:
    """Return the rule.

    Args:
        rule: Its name; or the rule itself; or a function from probabilities, float64 (members, symbols), and weights,
            float64 (members,), to a distribution, float64 (symbols,).
        parameters: The parameters that are given, by name.

    Raises:
        ConfigError: The rule has no such parameter, or a value is not allowed.
    """
    from mixlm.core.combinations import Combination, combination

    if isinstance(rule, str):
        return combination(rule, **parameters)
    if parameters:
        raise ConfigError(
            f"{next(iter(parameters))} is given, and the rule is no name but an object with its own parameters",
            "leave it out",
        )
    return rule if isinstance(rule, Combination) else Combination.of(rule)
