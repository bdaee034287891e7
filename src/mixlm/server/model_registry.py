"""The ensembles that are served, by name."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from threading import Lock
from typing import Any

from mixlm.config import UNITS, Method, UnitName, methods_of
from mixlm.ensemble import Ensemble
from mixlm.server.api_errors import ApiError, refused
from mixlm.types import Sampling
from mixlm.units.token import conflict
from mixlm.version import __version__


class Served:
    """An ensemble and the name that requests call it by. created: seconds since 1970.

    The units that it was not loaded with are made when one is first asked for, on the same engines, and kept: there are
    as many as there are names of units, and no request makes more.
    """

    def __init__(self, name: str, ensemble: Ensemble) -> None:
        self.name = name
        self.ensemble = ensemble
        self.created = int(time.time())
        self._conflict = conflict([one.engine.vocabulary for one in ensemble.members])
        self._units = {ensemble.unit.name: ensemble}
        self._making = Lock()

    @property
    def units(self) -> dict[str, tuple[Method, ...]]:
        """The units that its members can meet in, and the methods of each."""
        names = [one for one in UNITS if one != "auto" and (one != "token" or self._conflict is None)]
        return {one: methods_of(one) for one in names}

    def has_unit(self, unit: UnitName | None) -> bool:
        """Whether `in_unit` has nothing to make."""
        return unit in (None, "auto") or unit in self._units

    def in_unit(self, unit: UnitName | None) -> Ensemble:
        """Return the ensemble in a unit; None and "auto" for the one it was loaded with.

        The first time this looks at every token of every member, for up to a second: not for the event loop. Raises
        ApiError where the members have no such unit.
        """
        if unit is None or unit == "auto":
            return self.ensemble
        if unit not in self.units:
            raise refused(
                "mixlm.unit",
                f"these members share no vocabulary ({self._conflict}); {', '.join(self.units)} are possible",
            )
        if unit not in self._units:
            with self._making:
                if unit not in self._units:
                    self._units[unit] = self.ensemble.with_unit(unit)
        return self._units[unit]

    @property
    def fingerprint(self) -> str:
        """A short text that changes when equal requests may no longer be answered equally."""
        one = self.ensemble
        what = repr((one.names, one.weights.tolist(), one.unit.name, one.defaults.method, one.defaults.sampling))
        return f"mixlm-{__version__}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"

    def as_dict(self) -> dict[str, Any]:
        """Return what /v1/models says of it."""
        one = self.ensemble
        members = [
            {"name": member.name, "weight": float(weight), "context_length": member.engine.context_length}
            for member, weight in zip(one.members, one.weights, strict=True)
        ]
        plain = Sampling(**{**one.members[0].sampling, **one.defaults.sampling})
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "mixlm",
            "mixlm": {
                "members": members,
                "unit": one.unit.name,
                "method": one.defaults.method,
                "methods": list(methods_of(one.unit.name)),
                "units": {name: list(methods) for name, methods in self.units.items()},
                "temperature": plain.temperature,
                "top_k": plain.top_k,
                "max_tokens": one.defaults.max_tokens,
            },
        }


class Registry:
    """Served ensembles by name. Raises nothing: names are distinct where it is built."""

    def __init__(self, ensembles: Mapping[str, Ensemble]) -> None:
        self._served = {name: Served(name, one) for name, one in ensembles.items()}

    def __iter__(self) -> Iterator[Served]:
        return iter(self._served.values())

    def find(self, name: str | None) -> Served:
        """Return the ensemble of a name; of none, the only one. Raises ApiError when there is no such."""
        if name is None and len(self._served) == 1:
            return next(iter(self._served.values()))
        if name is None:
            raise ApiError(
                400, f"model is missing; it is one of {', '.join(self._served)}", param="model", code="missing"
            )
        if name not in self._served:
            known = ", ".join(self._served)
            raise ApiError(404, f"there is no model {name!r}; there is {known}", param="model", code="model_not_found")
        return self._served[name]
