"""How options name a combination rule, and with which methods and units it goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeAlias

from mixlm.choices import RULES, Rule
from mixlm.errors import ConfigError, UnsupportedError, did_you_mean
from mixlm.types import Floats

if TYPE_CHECKING:
    from mixlm.core.combinations import Combination

    AnyRule: TypeAlias = Rule | Combination | Callable[[Floats, Floats], Floats]
else:
    AnyRule = Any
# The parameters that are options; objects may have further ones.
RULE_PARAMETERS = ("strength", "alpha", "form", "by")
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


def rule_as_dict(rule: AnyRule, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a rule's name and its parameters, in a form that JSON holds: functions by their names, gates by a digest.

    Args:
        rule: The rule. Of an object, the parameters are those that differ from their defaults.
        parameters: Those that are given with a name.
    """
    from mixlm.core.combinations import Combination

    described = {"name": rule_name(rule), **(parameters or {})}
    if isinstance(rule, Combination):
        values = {field.name: (_plain(getattr(rule, field.name)), _plain(field.default)) for field in fields(rule)}
        described |= {name: value for name, (value, default) in values.items() if value != default}
    return described


def _plain(value: Any) -> Any:
    """Return a number or a text as it is, and of another value what tells it apart."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(digest := getattr(value, "digest", None), str):
        return f"{name} {digest}"
    return name if callable(value) else repr(value)


def check_rule(rule: object) -> None:
    """Raise ConfigError for what is no rule."""
    if isinstance(rule, str):
        if rule not in RULES:
            raise ConfigError(f"rule is {rule!r}; it must be one of {', '.join(RULES)}", did_you_mean(rule, RULES))
    elif isinstance(rule, type) or not (hasattr(rule, "combine") or callable(rule)):
        raise ConfigError(
            f"rule is {rule!r}; it must be a name, a Combination, or a function of probabilities and weights"
        )


def check_rule_method(rule: AnyRule, method: str) -> None:
    """Raise UnsupportedError where a method samples the average only."""
    if method in AVERAGE_METHODS:
        raise UnsupportedError(
            f"method {method} samples the average, and the rule is {rule_name(rule)}",
            "use it with --method layered, conventional or greedy",
        )


def check_whole_tokens(rule: AnyRule, *, full_distributions: bool) -> None:
    """Raise UnsupportedError for a rule in a unit whose members give no distribution over whole tokens."""
    if not full_distributions:
        raise UnsupportedError(
            f"rule {rule_name(rule)} combines the members' distributions over whole tokens, and in the units word and "
            "byte one forward pass gives no distribution",
            "use --unit piece, or --rule average",
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
    from mixlm.core.combinations import Combination, check_parameters, combination, combination_class

    if isinstance(rule, str):
        own = {parameter.name for parameter in fields(combination_class(rule))}
        check_parameters(rule, parameters, [name for name in RULE_PARAMETERS if name in own])
        return combination(rule, **parameters)
    if parameters:
        raise ConfigError(
            f"{next(iter(parameters))} is given, and the rule is no name but an object with its own parameters",
            "leave it out",
        )
    return rule if isinstance(rule, Combination) else Combination.of(rule)
