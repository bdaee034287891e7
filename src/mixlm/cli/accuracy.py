"""The accuracy part of `mixlm fit`: accuracy on a task, and a grid search of the weights for it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from mixlm.cli.display import print_lines, print_table
from mixlm.cli.options import Shared, option_flag
from mixlm.errors import ConfigError, UsageError
from mixlm.terminal import progress_bars

if TYPE_CHECKING:
    from mixlm.core.options import Options
    from mixlm.ensemble import Ensemble
    from mixlm.evaluation.accuracy import AccuracySetup, AccuracyStudy, WeightingAccuracy
    from mixlm.fitting.study import FitStudy
    from mixlm.routing import Router


def load_task(
    shared: Shared, task: str, limit: int | None, seeds: int | None, data: Path | None, out: Path | None
) -> AccuracySetup:
    """Return the task of --accuracy with its questions. Raises ConfigError, UsageError before any model is loaded."""
    from mixlm.evaluation.accuracy import AccuracySetup
    from mixlm.evaluation.catalog import load_tasks

    loaded = load_tasks([task], data=data)
    if len(loaded) != 1:
        raise ConfigError(f"{task} is {len(loaded)} tasks: {', '.join(list(loaded)[:5])}", "name one of them")
    [(name, questions)] = loaded.items()
    options: dict[str, Any] = {**shared.options()}
    seed = options.pop("seed", 0)
    setup = AccuracySetup(
        name,
        questions,
        out or Path("fit-results") / quote(name, safe=""),
        limit,
        range(seed, seed + (seeds or 1)),
        shared.method or "mixture",
        cast("Options", options),
    )
    unused = [*(option for option in options if option != "system"), *([] if seeds is None else ["seeds"])]
    if setup.scores_given_texts and unused:
        named = ", ".join(map(option_flag, unused))
        raise UsageError(f"{name} scores given texts and does not use {named}", "omit it")
    return setup


def measure(
    setup: AccuracySetup, ensemble: Ensemble, fit: FitStudy, engines: int, *, step: float | None, holdout: float
) -> AccuracyReport:
    """Measure the members, weights and routers of a study, and the points of a grid if a step is given."""
    from mixlm.evaluation.accuracy import measure_accuracy

    with progress_bars(single=True) as progress:
        measured = measure_accuracy(ensemble, _weightings(fit), replace(setup, progress=progress), step=step)
    report = AccuracyReport(setup.name, measured, fit, engines, holdout if step is not None else 0.0)
    path = setup.out / "accuracy.json"
    path.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    return report


def _weightings(fit: FitStudy) -> dict[str, Router]:
    """Return every weighting of a study, by its name in the report."""
    from mixlm.routing import FixedRouter

    weightings: dict[str, Router] = {row.name: FixedRouter(row.weights) for row in fit.rows if row.weights is not None}
    if "grid" in weightings:
        weightings["grid over likelihood"] = weightings.pop("grid")
    if fit.by_prompt is not None:
        weightings[f"by prompt, sharpness {fit.by_prompt[1]:g}"] = fit.by_prompt[0]
    if fit.router is not None:
        weightings["router"] = fit.router
    return weightings


class AccuracyReport:
    """The measured accuracy, compared with that of the weights by EM.

    The grid's best point is selected on some questions, and all weightings are also compared on the others: on the
    questions that selected it, the best of many points looks better than it is.
    """

    def __init__(self, task: str, measured: AccuracyStudy, fit: FitStudy, engines: int, holdout: float) -> None:
        from mixlm.evaluation.accuracy import best_weights, held_out_questions

        self.task, self.measured, self.fit = task, measured, fit
        self.readings = fit.passes(engines)[0]
        self.others = held_out_questions(measured.questions, holdout)
        self.chosen = ~self.others
        self.weightings = list(measured.ways)
        if measured.grid:
            self.weightings.append(replace(best_weights(measured.grid, self.chosen), name="grid over accuracy"))
        self.em = next(weighting for weighting in measured.ways if weighting.name == "EM")
        # Of EM, scoring the training part counts too, whenever that was.
        self.em_seconds = fit.seconds + fit.em.seconds
        self.grid_seconds = measured.read_seconds + sum(point.seconds for point in measured.grid)
        self.grid_tokens = sum(point.tokens for point in measured.grid)

    def as_dict(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        grid = self.measured.grid
        return {
            "task": self.task,
            "metric": self.em.metric,
            "questions": self.measured.questions,
            "questions_that_chose": int(self.chosen.sum()),
            "rows": [self._plain(weighting) for weighting in self.weightings],
            "grid": [self._plain(point) for point in grid],
            "cost": {
                "em_seconds": self.em_seconds,
                "em_readings": self.readings,
                "grid_points": len(grid),
                "grid_seconds": self.grid_seconds if grid else 0.0,
                "grid_tokens": self.grid_tokens,
                "task_readings": self.measured.read,
                "task_reading_seconds": self.measured.read_seconds,
            },
        }

    def _plain(self, weighting: WeightingAccuracy) -> dict[str, Any]:
        difference, _, p_value = self._against_em(weighting)
        return {
            "name": weighting.name,
            "weights": None if weighting.weights is None else [round(float(weight), 6) for weight in weighting.weights],
            "right": weighting.correct(self.chosen | self.others),
            "right_that_chose": weighting.correct(self.chosen),
            "right_others": weighting.correct(self.others),
            "minus_em": difference,
            "p_value": p_value,
            "tokens": weighting.tokens,
            "seconds": weighting.seconds,
        }

    def _against_em(self, weighting: WeightingAccuracy) -> tuple[float, Any, float]:
        """Compare a weighting with EM, on the questions that did not select it if there are any."""
        from mixlm.evaluation.results import sign_flip_p, t_interval

        fair = self.others if self.others.any() else self.chosen
        differences = (weighting.values.mean(axis=0) - self.em.values.mean(axis=0))[fair]
        return float(differences.mean()), t_interval(differences), sign_flip_p(differences)

    def show(self) -> None:
        """Print the report."""
        parts = [("correct", self.chosen)]
        if self.others.any():
            parts = [("correct (selection)", self.chosen), ("correct (others)", self.others)]
        heads = [self.task, "weights", *(name for name, _ in parts), "minus EM", "95 % interval", "p-value"]
        rows = []
        for weighting in self.weightings:
            weights = "by the text"
            if weighting.weights is not None:
                weights = ", ".join(f"{weight:.3g}" for weight in weighting.weights)
            counts = []
            for _, mask in parts:
                correct = weighting.correct(mask)
                counts.append(f"{correct:g} of {mask.sum()} ({correct / mask.sum():.1%})")
            difference, interval, p_value = self._against_em(weighting)
            bounds = "" if interval is None else "{:+.1%} to {:+.1%}".format(*interval)
            versus = ["", "", ""] if weighting is self.em else [f"{difference:+.1%}", bounds, f"{p_value:.3g}"]
            rows.append((weighting.name, weights, *counts, *versus))
        print_table(heads, rows, right=frozenset(heads[2:]))
        if self.others.any():
            print_lines(
                "The grid's point was selected on the first group of questions; the differences are on the others."
            )
        print_lines(self._costs())

    def _costs(self) -> str:
        grid, read = self.measured.grid, self.measured.read
        em = f"EM took {self.fit.seconds:.1f} s of scoring and {self.fit.em.seconds:.3f} s of iterations"
        if not grid:
            spent = f"{self.measured.read_seconds:.1f} s for scoring {read} texts"
            if not read:
                seconds = sum(weighting.seconds for weighting in self.measured.ways)
                spent = f"{seconds:.0f} s for {sum(weighting.tokens for weighting in self.measured.ways)} tokens"
            return f"{em}; these questions took {spent}."
        if read:
            reading = self.measured.read_seconds
            return (
                f"{em}. The task's {read} texts were scored once, in {reading:.1f} s, and the grid's {len(grid)} "
                f"points evaluated from these scores in {self.grid_seconds - reading:.1f} s. A search that scores "
                f"again at every point needs {read * len(grid)} passes, {reading * len(grid):.0f} s at this speed."
            )
        ratio = self.grid_seconds / self.em_seconds if self.em_seconds else math.inf
        return (
            f"{em}. The grid's {len(grid)} points generated {self.grid_tokens} tokens in {self.grid_seconds:.0f} s, "
            f"{ratio:.0f} times as long."
        )
