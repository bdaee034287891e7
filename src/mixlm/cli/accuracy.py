"""The part of `mixlm fit` that asks questions: accuracy on a task, and the search of a grid of weights for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

import numpy as np
from typer import Option

from mixlm.cli.options import Shared
from mixlm.cli.tables import print_lines, print_table
from mixlm.errors import ConfigError, UsageError
from mixlm.terminal import progress_bars

if TYPE_CHECKING:
    from mixlm.core.options import Options
    from mixlm.ensemble import Ensemble
    from mixlm.evaluation.accuracy import Measured, Setup, Way
    from mixlm.fitting.study import Study
    from mixlm.routing import Router

_PANEL = "Accuracy"


def accuracy_option(name: str, metavar: str, text: str) -> Any:
    """Return an option of the panel on accuracy."""
    return Option(name, metavar=metavar, help=text, rich_help_panel=_PANEL, show_default=False)


@dataclass(frozen=True)
class AccuracyOptions:
    """What was given of the options on accuracy."""

    task: str | None
    limit: int | None
    seeds: int | None
    data: Path | None
    out: Path | None

    def check(self) -> None:
        """Raise UsageError for options without a task, ConfigError for numbers that make no sense."""
        for name in ("limit", "seeds", "data", "out"):
            if self.task is None and getattr(self, name) is not None:
                raise UsageError(f"--{name} is given without --accuracy", "name a task: --accuracy TASK")
        for name in ("limit", "seeds"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"--{name} is {value}; it must be 1 or more")

    def load(self, shared: Shared) -> Setup | None:
        """Return the task with its questions, None where none is named. Raises before any model is loaded."""
        if self.task is None:
            return None
        from mixlm.evaluation.accuracy import Setup
        from mixlm.evaluation.catalog import load_tasks

        loaded = load_tasks([self.task], data=self.data)
        if len(loaded) != 1:
            raise ConfigError(f"{self.task} is {len(loaded)} tasks: {', '.join(list(loaded)[:5])}", "name one of them")
        (name, task) = next(iter(loaded.items()))
        options: dict[str, Any] = {**shared.options()}
        seed = options.pop("seed", 0)
        out = self.out or Path("fit-results") / quote(name, safe="")
        seeds = range(seed, seed + (self.seeds or 1))
        method = shared.method or "mixture"
        setup = Setup(name, task, out, self.limit, seeds, method, cast("Options", options))
        if setup.reads:
            given = [one for one in options if one != "system"] + (["seeds"] if self.seeds is not None else [])
            if given:
                named = ", ".join(f"--{one.replace('_', '-')}" for one in given)
                raise UsageError(f"{name} compares given texts and has no use for {named}", "leave it out")
        return setup

    def measure(
        self,
        setup: Setup,
        ensemble: Ensemble,
        found: Study,
        shared: Shared,
        *,
        step: float | None,
        holdout: float,
    ) -> AccuracyReport:
        """Measure members, weights and routers of a study, and the points of a grid where a step is given."""
        from dataclasses import replace

        from mixlm.evaluation.accuracy import measure

        with progress_bars(single=True) as progress:
            measured = measure(ensemble, _ways(found), replace(setup, progress=progress), step=step)
        engines = len({id(one.engine) for one in ensemble.members})
        report = AccuracyReport(setup.name, measured, found, engines, holdout if step is not None else 0.0)
        path = setup.out / "accuracy.json"
        path.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
        return report


def _ways(found: Study) -> dict[str, Router]:
    """Return every way to weigh that a study has, by its name in the report."""
    from mixlm.routing import FixedRouter

    ways: dict[str, Router] = {row.name: FixedRouter(row.weights) for row in found.rows if row.weights is not None}
    if "grid" in ways:
        ways["grid over likelihood"] = ways.pop("grid")
    if found.by_prompt is not None:
        ways[f"by prompt, sharpness {found.by_prompt[1]:g}"] = found.by_prompt[0]
    if found.router is not None:
        ways["router"] = found.router
    return ways


class AccuracyReport:
    """What accuracy was measured, beside what EM found.

    The grid's best point is chosen by some questions, and all ways are compared on the others too: the best of many
    points looks better than it is on the questions that chose it.
    """

    def __init__(self, task: str, measured: Measured, found: Study, engines: int, holdout: float) -> None:
        from mixlm.evaluation.accuracy import best, held_out

        self.task = task
        self.measured = measured
        self.found = found
        self.readings = found.readings(engines)[0]
        self.others = held_out(measured.questions, holdout)
        self.chosen = ~self.others
        self.ways: list[tuple[str, Way]] = [(one.name, one) for one in measured.ways]
        if measured.grid:
            self.ways.append(("grid over accuracy", best(measured.grid, self.chosen)))
        self.em = next(one for one in measured.ways if one.name == "EM")

    @property
    def em_seconds(self) -> float:
        """What EM took in all: the members' reading of the training part, whenever it was, and the rounds."""
        return self.found.seconds + self.found.em.seconds

    @property
    def grid_seconds(self) -> float:
        """What the grid took in all: reading once or writing at every point."""
        return self.measured.read_seconds + sum(one.seconds for one in self.measured.grid)

    def as_dict(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        grid = self.measured.grid
        return {
            "task": self.task,
            "metric": self.em.metric,
            "questions": self.measured.questions,
            "questions_that_chose": int(self.chosen.sum()),
            "rows": [self._plain(name, one) for name, one in self.ways],
            "grid": [self._plain(one.name, one) for one in grid],
            "cost": {
                "em_seconds": self.em_seconds,
                "em_readings": self.readings,
                "grid_points": len(grid),
                "grid_seconds": self.grid_seconds if grid else 0.0,
                "grid_tokens": sum(one.tokens for one in grid),
                "task_readings": self.measured.read,
                "task_reading_seconds": self.measured.read_seconds,
            },
        }

    def _plain(self, name: str, way: Way) -> dict[str, Any]:
        difference, _, p_value = self._against_em(way)
        return {
            "name": name,
            "weights": None if way.weights is None else [round(float(one), 6) for one in way.weights],
            "right": way.right(self.chosen | self.others),
            "right_that_chose": way.right(self.chosen),
            "right_others": way.right(self.others),
            "minus_em": difference,
            "p_value": p_value,
            "tokens": way.tokens,
            "seconds": way.seconds,
        }

    def _against_em(self, way: Way) -> tuple[float, Any, float]:
        """Compare a way with EM, on the questions that did not choose it where there are such."""
        from mixlm.evaluation.statistics import sign_flip_p, t_interval

        fair = self.others if self.others.any() else self.chosen
        differences = (way.values.mean(axis=0) - self.em.values.mean(axis=0))[fair]
        return float(differences.mean()), t_interval(differences), sign_flip_p(differences)

    def show(self) -> None:
        """Print it."""
        parts = [("right", self.chosen)]
        if self.others.any():
            parts = [("right, chose the grid's", self.chosen), ("right, others", self.others)]
        heads = [self.task, "weights", *(name for name, _ in parts), "minus EM", "95 % interval", "p-value"]
        rows = []
        for name, way in self.ways:
            shown = "by the text" if way.weights is None else ", ".join(f"{one:.3g}" for one in way.weights)
            counts = [f"{way.right(mask):g} of {mask.sum()} ({way.right(mask) / mask.sum():.1%})" for _, mask in parts]
            difference, interval, p_value = self._against_em(way)
            span = "" if interval is None else "{:+.1%} to {:+.1%}".format(*interval)
            versus = ["", "", ""] if way is self.em else [f"{difference:+.1%}", span, f"{p_value:.3g}"]
            rows.append((name, shown, *counts, *versus))
        print_table(heads, rows, right=frozenset(heads[2:]))
        if self.others.any():
            print_lines("The grid's point was chosen by the first group of questions; differences are of the others.")
        print_lines(self._costs())

    def _costs(self) -> str:
        grid, read = self.measured.grid, self.measured.read
        em = f"EM took {self.found.seconds:.1f} s of reading and {self.found.em.seconds:.3f} s of its own"
        if not grid:
            return f"{em}; these questions took {self._spent()}."
        ratio = self.grid_seconds / self.em_seconds if self.em_seconds else np.inf
        if read:
            judging = sum(one.seconds for one in grid)
            anew = self.measured.read_seconds * len(grid)
            return (
                f"{em}. The task's {read} texts were read once, in {self.measured.read_seconds:.1f} s, and the grid's "
                f"{len(grid)} points judged from that in {judging:.1f} s. A search that reads anew at every point "
                f"needs {read * len(grid)} readings, at this speed {anew:.0f} s."
            )
        tokens = sum(one.tokens for one in grid)
        return (
            f"{em}. The grid's {len(grid)} points wrote {tokens} tokens in {self.grid_seconds:.0f} s, {ratio:.0f} "
            "times as long."
        )

    def _spent(self) -> str:
        if self.measured.read:
            return f"{self.measured.read_seconds:.1f} s for {self.measured.read} readings of a text"
        seconds, tokens = (sum(getattr(one, name) for one in self.measured.ways) for name in ("seconds", "tokens"))
        return f"{seconds:.0f} s for {tokens} tokens"
