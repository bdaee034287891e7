"""The ensembles that are served, by name."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mixlm import __version__
from mixlm.config import METHODS
from mixlm.ensemble import Ensemble
from mixlm.records import Sampling
from mixlm.server.problems import ApiError


@dataclass(frozen=True)
class Served:
    """An ensemble and the name that requests call it by. created: seconds since 1970."""

    name: str
    ensemble: Ensemble
    created: int = field(default_factory=lambda: int(time.time()))

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
                "methods": list(METHODS),
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
