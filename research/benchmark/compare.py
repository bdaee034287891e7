"""`mixlm.benchmark.bench`, with agreement by construction and with transformers' own generation in the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mixlm.benchmark import BenchPlan, BenchReport, bench
from mixlm.core.options import Options
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from mixlm.terminal import Progress
from research.benchmark.agreement import agreement_note, check_share, with_agreement
from research.benchmark.rivals import available_rivals


@dataclass(frozen=True)
class ComparisonPlan(BenchPlan):
    """A plan of `mixlm.benchmark`, and what is measured beyond it.

    agreement: the share of contexts in which members agree, by construction; None for their own distributions.
    rivals: measure transformers' own generation too. places: of a sweep, in place of its usual ones.
    """

    agreement: float | None = None
    rivals: bool = False
    places: Sequence[float] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.agreement is not None:
            check_share(self.agreement)

    def apply_agreement(self, ensemble: Ensemble) -> tuple[Ensemble, tuple[str, ...]]:
        """Return the ensemble that is measured, and the notes that belong to it."""
        if self.agreement is None:
            return ensemble, ()
        return with_agreement(ensemble, self.agreement), (agreement_note(self.agreement),)


def compare(
    ensemble: Ensemble,
    plan: ComparisonPlan | None = None,
    *,
    options: Options | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure methods as `mixlm.benchmark.bench` does, with what else the plan names."""
    plan = plan or ComparisonPlan()
    if plan.places:
        raise ConfigError("places are given, and nothing is varied", "name a sweep with them")
    ensemble, notes = plan.apply_agreement(ensemble)
    rivals, left_out = (
        available_rivals(ensemble, plan.prompt, {"seed": 0, **(options or {})}) if plan.rivals else ([], [])
    )
    report = bench(ensemble, plan, options=options, progress=progress, rivals=rivals)
    return replace(report, environment=record_agreement(report.environment, plan), notes=(*notes, *left_out))


def record_agreement(environment: Mapping[str, Any], plan: ComparisonPlan) -> dict[str, Any]:
    """Return the environment of a report with the plan's agreement among its settings."""
    return {**environment, "settings": {**environment["settings"], "agreement": plan.agreement}}
