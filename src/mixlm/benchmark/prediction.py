"""The speed that the cost model predicts for a run, from the times of its forwards.

Each member's costs are fitted to all forwards of a benchmark; the acceptance rate of drafts is counted. Time outside
forwards is not included.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixlm.benchmark.timing import Contestant, EnsembleContestant, TimedRun
from mixlm.decoding.cost_model import (
    DraftPlan,
    ForwardCosts,
    conventional_seconds,
    drafted_greedy_seconds,
    fit_forward_costs,
    mixture_seconds,
    speculative_seconds,
)
from mixlm.engines.requests import Forward
from mixlm.ensemble import Ensemble


def measured_costs(
    ensemble: Ensemble, contestants: Sequence[Contestant], runs: Sequence[Sequence[TimedRun]]
) -> ForwardCosts:
    """Fit the costs of the ensemble's members to all forwards of mixlm's own runs."""
    logs: dict[str, list[Forward]] = {name: [] for name in ensemble.names}
    for contestant, repeats in zip(contestants, runs, strict=True):
        for run in repeats if isinstance(contestant, EnsembleContestant) else ():
            for name, log in zip(contestant.members, run.forwards, strict=True):
                logs[name] += log
    return fit_forward_costs([logs[name] for name in ensemble.names])


def predicted_speed(
    ensemble: Ensemble, contestant: Contestant, runs: Sequence[TimedRun], costs: ForwardCosts
) -> float | None:
    """Return the tokens per second that the cost model predicts; None where it has no formula.

    `speculative` and `drafted` have one for the acceptance rate that was measured, if a member drafts. There is none
    for prompt lookup, where the number of drafts depends on the text, nor for `auto` and `greedy`.
    """
    if not isinstance(contestant, EnsembleContestant) or np.isnan(costs.seconds[ensemble.weights > 0]).any():
        return None
    plan = None
    if contestant.draft in ensemble.names and (drafted := sum(run.drafted for run in runs)):
        draft = ensemble.names.index(contestant.draft)
        plan = DraftPlan(draft, contestant.settings.block, sum(run.accepted for run in runs) / drafted)
    match contestant.method:
        case "single":
            seconds = costs(ensemble.names.index(contestant.members[0]))
        case "conventional":
            seconds = conventional_seconds(ensemble.weights, costs)
        case "mixture":
            seconds = mixture_seconds(ensemble.weights, costs)
        case "speculative" if plan is not None:
            seconds = speculative_seconds(ensemble.weights, costs, plan)
        case "drafted" if plan is not None:
            seconds = drafted_greedy_seconds(ensemble.weights, costs, plan)
        case _:
            return None
    return 1 / seconds if seconds else None
