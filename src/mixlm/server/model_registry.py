"""The served models: ensembles by name."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields
from threading import Lock
from typing import Any

from mixlm.choices import METHODS, UNITS, Method, UnitName
from mixlm.core.combinations import ALIASES, COMBINATIONS, combination_class
from mixlm.core.options import OPTIONS
from mixlm.core.rule_options import RULE_PARAMETERS, is_average, rule_as_dict, rule_name
from mixlm.ensemble import Ensemble
from mixlm.routing.base import FixedRouter, observed_by
from mixlm.server.api_errors import ApiError, unsupported_field
from mixlm.types import Sampling
from mixlm.units import unit_traits
from mixlm.units.token import vocabulary_conflict
from mixlm.version import __version__

# The methods that sample any combination rule; `single` takes one member's distribution, whatever the rule.
COMBINATION_METHODS: tuple[Method, ...] = ("layered", "conventional", "greedy")


class ServedModel:
    """An ensemble under the name by which requests select it.

    Units other than the loaded one are built on first use, on the same engines, and kept. Requests cannot build more
    than there are names of units.

    Attributes:
        name: The name in requests.
        ensemble: The ensemble in the unit it was loaded with.
        created: Unix time, in seconds.
        units: The units its members can meet in, with the methods of each.
        rule: The ensemble's combination rule.
        rules: The combination rules that fit its members, with the methods of each.
    """

    def __init__(self, name: str, ensemble: Ensemble) -> None:
        self.name = name
        self.ensemble = ensemble
        self.created = int(time.time())
        self._conflict = vocabulary_conflict([member.engine.vocabulary for member in ensemble.members])
        self.units: dict[str, tuple[Method, ...]] = {
            unit: unit_traits(unit).methods
            for unit in UNITS
            if unit != "auto" and not (self._conflict and unit_traits(unit).shared_vocabulary)
        }
        rule = rule_name(ensemble.defaults.rule or "average")
        self.rule = ALIASES.get(rule, rule)
        self.rules = _rules(len(ensemble.members), shared_vocabulary=self._conflict is None)
        self.rules.setdefault(self.rule, COMBINATION_METHODS)
        if observed_by(ensemble.router) is not None:  # layered takes no router that observes a member
            for listed in (self.units, self.rules):
                listed |= {
                    name: tuple(method for method in methods if method != "layered") for name, methods in listed.items()
                }
        self._by_unit = {ensemble.unit.name: ensemble}
        self._lock = Lock()

    def has_unit(self, unit: UnitName | None) -> bool:
        """Whether `with_unit` returns at once."""
        return unit in (None, "auto") or unit in self._by_unit

    def with_unit(self, unit: UnitName | None) -> Ensemble:
        """Return the ensemble in a unit; None and "auto" select the loaded one.

        The first call for a unit reads every member's vocabulary, for up to a second: not on the event loop.

        Raises:
            ApiError: The members cannot meet in this unit.
        """
        if unit is None or unit == "auto":
            return self.ensemble
        if unit not in self.units:
            raise unsupported_field(
                "mixlm.unit",
                f"these members share no vocabulary ({self._conflict}); {', '.join(self.units)} are possible",
            )
        with self._lock:
            if unit not in self._by_unit:
                self._by_unit[unit] = self.ensemble.with_unit(unit)
            return self._by_unit[unit]

    @property
    def fingerprint(self) -> str:
        """A text that changes when equal requests may no longer give equal completions."""
        ensemble = self.ensemble
        parts = (
            ensemble.names,
            ensemble.weights.tolist(),
            ensemble.unit.name,
            ensemble.defaults.method,
            ensemble.defaults.sampling,
            ensemble.defaults.rule and rule_as_dict(ensemble.defaults.rule, ensemble.defaults.rule_parameters),
        )
        return f"mixlm-{__version__}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"

    def _rule_parameters(self) -> dict[str, dict[str, Any]]:
        """Return the parameters of each rule that has some, with the ensemble's own values for its rule.

        A rule that the ensemble has as an object keeps its own: by a name and parameters, it would be another one.
        """
        out: dict[str, dict[str, Any]] = {}
        fixed = None if isinstance(self.ensemble.defaults.rule, str | None) else self.rule
        for rule in (name for name in COMBINATIONS if name in self.rules and name != fixed):
            own = self.ensemble.defaults if rule == self.rule else None
            for field in fields(combination_class(rule)):
                if field.name in RULE_PARAMETERS:
                    given = getattr(own, field.name, None)
                    default = field.default if given is None else given
                    choices = list(OPTIONS[field.name].choices)
                    out.setdefault(rule, {})[field.name] = {"default": default, "choices": choices}
        return out

    def to_dict(self) -> dict[str, Any]:
        """Return the entry in /v1/models."""
        ensemble, defaults = self.ensemble, self.ensemble.defaults
        members = [
            {"name": member.name, "weight": float(weight), "context_length": member.engine.context_length}
            for member, weight in zip(ensemble.members, ensemble.weights, strict=True)
        ]
        sampling = Sampling(**{**ensemble.members[0].sampling, **defaults.sampling})
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "mixlm",
            "mixlm": {
                "members": members,
                "unit": ensemble.unit.name,
                "method": defaults.method,
                "methods": list(ensemble.unit.traits.methods),
                "units": {unit: list(methods) for unit, methods in self.units.items()},
                "rule": self.rule,
                "rules": {rule: list(methods) for rule, methods in self.rules.items()},
                "rule_parameters": self._rule_parameters(),
                "routed": not isinstance(ensemble.router, FixedRouter),
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "max_tokens": defaults.max_tokens,
            },
        }


def _rules(members: int, *, shared_vocabulary: bool) -> dict[str, tuple[Method, ...]]:
    """Return the combination rules for a number of members, and the methods that sample each."""
    rules: dict[str, tuple[Method, ...]] = {"average": METHODS}
    for name in COMBINATIONS:
        rule = combination_class(name)
        if members < rule.minimum_members or (rule.roles and members != len(rule.roles)):
            continue
        if not is_average(name) and (shared_vocabulary or not rule.shared_vocabulary):
            rules[name] = COMBINATION_METHODS
    return rules


class ModelRegistry:
    """The served models by name."""

    def __init__(self, ensembles: Mapping[str, Ensemble]) -> None:
        self._models = {name: ServedModel(name, ensemble) for name, ensemble in ensembles.items()}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def get(self, name: str | None) -> ServedModel:
        """Return a model by name; None selects the only one. Raises ApiError for an unknown or missing name."""
        if name is None and len(self._models) == 1:
            return next(iter(self._models.values()))
        names = ", ".join(self._models)
        if name is None:
            raise ApiError(400, f"model is missing; it must be one of {names}", param="model", code="missing")
        if name not in self._models:
            message = f"there is no model {name!r}; there is {names}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self._models[name]
