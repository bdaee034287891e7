"""From costs and a load to what to expect: speeds, waiting times, and how many machines each member needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mixlm.errors import ConfigError
from research.planning.costs import PlanCosts
from research.planning.simulation import SimulationResult, Workload, quantiles, simulate

# It cannot keep up if a larger share of completions still waits when the last one arrives, or something is always busy.
_LATE, _FULL = 0.02, 0.98
_MOST = 256


@dataclass(frozen=True)
class PlanTarget:
    """Requirements: seconds to the first token for 95 % of completions, and share of time that machines may work."""

    first: float | None = None
    busy: float = 0.85


@dataclass(frozen=True)
class PlanPoint:
    """What to expect of one load on one number of machines."""

    rate: float | None
    replicas: Mapping[str, int]
    processes: int
    seen: SimulationResult
    keeps_up: bool

    def as_dict(self) -> dict[str, Any]:
        """Return figures as plain values; times in seconds."""
        first, last = quantiles(self.seen.first), quantiles(self.seen.whole)
        return {
            "rate": self.rate,
            "replicas": dict(self.replicas),
            "processes": self.processes,
            "keeps_up": self.keeps_up,
            "tokens_per_second": self.seen.tokens_per_second,
            "replies_per_second": self.seen.completions_per_second,
            "first_token": {"p50": first[0], "p95": first[1]},
            "whole_reply": {"p50": last[0], "p95": last[1]},
            "busy": {name: sum(shares) / len(shares) for name, shares in self.seen.busy.items()},
            "router_busy": self.seen.router,
        }


def expected(costs: PlanCosts, load: Workload, *, count: int = 1000, seed: int = 0) -> PlanPoint:
    """Simulate one load."""
    seen = simulate(costs, load, count=count, seed=seed)
    replicas = {name: member.replicas for name, member in costs.members.items()}
    busiest = max(*(sum(shares) / len(shares) for shares in seen.busy.values()), seen.router)
    keeps_up = load.rate is None or (seen.late <= _LATE and busiest < _FULL)
    return PlanPoint(load.rate, replicas, costs.router.processes, seen, keeps_up)


def sweep(
    costs: PlanCosts, load: Workload, rates: Sequence[float | None], *, count: int = 1000, seed: int = 0
) -> list[PlanPoint]:
    """Simulate a load at several arrival rates."""
    return [expected(costs, replace(load, rate=rate), count=count, seed=seed) for rate in rates]


def needed(costs: PlanCosts, load: Workload, target: PlanTarget, *, count: int = 1000, seed: int = 0) -> PlanPoint:
    """Return the expectation with as few machines as keep the target: what is busiest gets one more until they do.

    Members that share a device keep it. Raises ConfigError for a load without a rate, and when no number is enough.
    """
    if load.rate is None:
        raise ConfigError("how many machines are needed depends on how often requests arrive", "give --rate")
    while True:
        point = expected(costs, load, count=count, seed=seed)
        busy = {name: sum(shares) / len(shares) for name, shares in point.seen.busy.items()}
        slow = target.first is not None and quantiles(point.seen.first)[1] > target.first
        if point.keeps_up and not slow and max(*busy.values(), point.seen.router) <= target.busy:
            return point
        free = [name for name, member in costs.members.items() if member.device is None]
        busiest = max(free, key=lambda name: busy[name], default=None)
        if point.seen.router > max([busy[name] for name in free], default=0.0):
            router = costs.router.model_copy(update={"processes": costs.router.processes + 1})
            costs = costs.model_copy(update={"router": router})
        elif busiest is None or costs.members[busiest].replicas >= _MOST:
            raise ConfigError(
                "no number of machines keeps this target",
                "the wait may be for a turn (--at-once), or one completion alone may take longer: try a low --rate",
            )
        else:
            costs = costs.with_replicas({busiest: costs.members[busiest].replicas + 1})
