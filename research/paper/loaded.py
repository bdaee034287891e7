"""Ensembles for runs: loaded one at a time, with other weights, with members alone, on devices of their own."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

from mixlm.benchmark.report import environment
from mixlm.choices import UnitName
from mixlm.config import EnsembleConfig
from mixlm.ensemble import Ensemble
from mixlm.loading import load_config
from research.paper.experiments import Weights


class EnsembleCache:
    """The ensemble that is in memory. say: called with a line for each model that is loaded."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._key = ""
        self._ensemble: Ensemble | None = None

    def get(self, config: EnsembleConfig) -> Ensemble:
        """Return a loaded ensemble; the one before it makes room."""
        key = config.model_dump_json()
        if self._ensemble is None or key != self._key:
            self._ensemble = None
            gc.collect()
            torch = sys.modules.get("torch")
            if torch is not None and torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._ensemble = load_config(config, progress=lambda name: self._say(f"loading {name}"))
            self._key = key
        return self._ensemble


def weighted(ensemble: Ensemble, weights: Weights) -> Ensemble:
    """Return the same members with other weights."""
    return Ensemble(ensemble.members, weights, unit=cast(UnitName, ensemble.unit.name), defaults=ensemble.defaults)


def single(ensemble: Ensemble, member: int) -> Ensemble:
    """Return one member as an ensemble of its own."""
    return Ensemble([ensemble.members[member]], defaults=ensemble.defaults)


def alone(config: EnsembleConfig, member: int) -> EnsembleConfig:
    """Return the configuration of one member."""
    spec = config.members[member].model_copy(update={"weight": None})
    return config.model_copy(update={"members": (spec,)})


def accelerators(config: EnsembleConfig) -> list[str]:
    """Return the names of this machine's accelerators that these members could run on."""
    if all(member.model.startswith("toy:") for member in config.members):
        return []
    try:
        import torch
    except ImportError:
        return []
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def apart(config: EnsembleConfig) -> list[str] | None:
    """Return a device for each member, None where there are too few.

    They are those that the configuration names when they differ, else the machine's accelerators.
    """
    named = [member.device for member in config.members]
    if len(named) > 1 and "auto" not in named and len(set(named)) == len(named):
        return named
    there = accelerators(config)
    return there[: len(named)] if 1 < len(named) <= len(there) else None


def machine(config: EnsembleConfig) -> list[Any]:
    """Return what of this machine speeds depend on, the same before and after models are loaded."""
    accelerators(config)  # imports what knows them
    hardware = environment([], {})
    return [hardware["processor"], hardware["cores"], hardware.get("accelerator")]


def placed(config: EnsembleConfig, devices: Sequence[str]) -> EnsembleConfig:
    """Return a configuration with its members on these devices."""
    members = tuple(
        member.model_copy(update={"device": device}) for member, device in zip(config.members, devices, strict=True)
    )
    return config.model_copy(update={"members": members})


def key(config: EnsembleConfig) -> dict[str, Any]:
    """Return what of an ensemble its runs depend on; weights and method are given for each run."""
    raw = config.model_dump(exclude_none=True, exclude={"method"})
    return {**raw, "members": [{k: v for k, v in member.items() if k != "weight"} for member in raw["members"]]}
