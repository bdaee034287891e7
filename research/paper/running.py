"""Running an experiment: every accuracy and speed run that is not finished yet, one ensemble in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Any, cast

from mixlm import __version__
from mixlm.benchmark.report import environment
from mixlm.config import EnsembleConfig
from mixlm.core.options import Options
from mixlm.terminal import Progress
from research.paper.experiments import SEARCH_SEED, Experiment, Lineup, Weights, grid
from research.paper.findings import (
    AccuracyFinding,
    DifferenceFinding,
    Findings,
    SpeedFinding,
    read_comparison,
    read_score,
)
from research.paper.loaded import EnsembleCache, alone, apart, key, machine, placed, single, weighted
from research.paper.store import ResultStore

Say = Callable[[str], None]


def run(
    experiment: Experiment, store: ResultStore, *, progress: Progress | None = None, say: Say | None = None
) -> Findings:
    """Run what is not finished, and return all that was found.

    progress: called within a run with a label, work done, work. say: called with one line for each run. Raises
    ConfigError before anything is loaded when tasks or questions are not there.
    """
    return _ExperimentRun(experiment, store, progress, say or (lambda line: None)).all()


class _ExperimentRun:
    def __init__(self, experiment: Experiment, store: ResultStore, progress: Progress | None, say: Say) -> None:
        self.experiment = experiment
        self.store = store
        self.progress = progress
        self.say = say
        self.loaded = EnsembleCache(say)
        self.tasks: Mapping[str, Any] = {}
        self.notes: dict[str, None] = {}
        self.accuracies: list[AccuracyFinding] = []
        self.differences: list[DifferenceFinding] = []
        self.speeds: list[SpeedFinding] = []
        self.environment: dict[str, Any] = {}
        self.place = ""

    def all(self) -> Findings:
        """Run everything."""
        experiment = self.experiment
        if experiment.methods:
            from mixlm.evaluation.catalog import load_tasks

            # Questions are read before models: what is wrong with them is said at once.
            self.tasks = load_tasks(experiment.tasks, data=experiment.data)
        work = [step for lineup in experiment.lineups for step in self._steps(lineup)]
        for i, step in enumerate(work, 1):
            self.place = f"{i}/{len(work)}"
            step()
        return Findings(
            experiment.name,
            experiment.title,
            experiment.reduced,
            experiment.settings(),
            {**environment([], {}), **self.environment, "settings": {}},
            tuple(self.accuracies),
            tuple(self.differences),
            tuple(self.speeds),
            tuple(self.notes),
            {lineup.label: lineup.published for lineup in experiment.lineups},
        )

    def _steps(self, lineup: Lineup) -> Sequence[Callable[[], None]]:
        experiment = self.experiment
        steps: list[Callable[[], None]] = []
        for top_k in experiment.top_k:
            if "single" in experiment.methods:
                steps += [partial(self._accuracy, lineup, top_k, member=i) for i in range(len(lineup.names))]
            if experiment.search:
                steps.append(partial(self._searched, lineup, top_k))
                continue
            for weights in experiment.weights(lineup):
                if experiment.methods:
                    steps.append(partial(self._accuracy, lineup, top_k, weights=weights))
                if experiment.speed:
                    steps.append(partial(self._speed, lineup, top_k, weights))
        return steps

    def _accuracy(self, lineup: Lineup, top_k: int, *, member: int | None = None, weights: Weights = ()) -> None:
        """Evaluate an ensemble, or one of its members alone."""
        results = self._evaluated(lineup, top_k, range(self.experiment.seeds), member=member, weights=weights)
        name = lineup.label if member is None else lineup.names[member]
        self.notes |= {f"{name}, k = {top_k}: {note}": None for note in results["notes"]}
        self.accuracies += [
            AccuracyFinding(lineup.label, weights, top_k, read_score(score)) for score in results["scores"]
        ]
        self.differences += [
            DifferenceFinding(lineup.label, weights, top_k, read_comparison(pair))
            for pair in results["comparisons"]
            if (pair["left"], pair["right"]) == ("mixture", "conventional")
        ]

    def _searched(self, lineup: Lineup, top_k: int) -> None:
        """Evaluate an ensemble with the weights of a grid that do best on these questions, all tasks together."""
        tried = {}
        for weights in grid(len(lineup.names)):
            # A seed of its own: the texts that chose the weights are not those that are reported.
            results = self._evaluated(lineup, top_k, [SEARCH_SEED], weights=weights, methods=["mixture"])
            tried[weights] = mean(score["mean"] for score in results["scores"])
        best = max(tried, key=lambda weights: tried[weights])
        shown = ", ".join(f"{weight:g}" for weight in best)
        self.notes[
            f"{lineup.label}, k = {top_k}: {shown} are the best of {len(tried)} weights by the accuracy of ME on the "
            "same questions, with a seed of its own; gains over single members are flattered"
        ] = None
        self._accuracy(lineup, top_k, weights=best)

    def _evaluated(
        self,
        lineup: Lineup,
        top_k: int,
        seeds: Sequence[int],
        *,
        member: int | None = None,
        weights: Weights = (),
        methods: Sequence[str] = (),
    ) -> dict[str, Any]:
        experiment = self.experiment
        config = lineup.config if member is None else alone(lineup.config, member)
        options: dict[str, Any] = {"temperature": 1.0, "top_k": top_k}
        if experiment.max_tokens is not None:
            options["max_tokens"] = experiment.max_tokens
        if member is not None:
            methods = ["single"]
        methods = list(methods) or [name for name in experiment.methods if name != "single"]
        same = {"mixlm": __version__, "ensemble": key(config), "weights": list(weights), "options": options}
        amount = {
            "tasks": list(experiment.tasks),
            "seeds": list(seeds),
            "limit": experiment.limit,
            "data": experiment.data,
        }
        name = lineup.label if member is None else lineup.names[member]
        label = f"{name}{self._shown(weights)}, k = {top_k}: accuracy"

        def work() -> dict[str, Any]:
            from mixlm.evaluation import evaluate

            ensemble = self.loaded.get(lineup.config)
            results = evaluate(
                weighted(ensemble, weights) if member is None else single(ensemble, member),
                self.tasks,
                methods=methods,
                seeds=seeds,
                limit=experiment.limit,
                data=experiment.data,
                options=cast(Options, options),
                out=self.store.responses(label, same),
                progress=self.progress,
            )
            scores = [results.score(task, method) for method in results.methods for task in results.tasks]
            where = environment([member.engine for member in ensemble.members], {})
            return {**results.as_dict(), "scores": [score.as_dict() for score in scores], "environment": where}

        return self._once(label, {**same, **amount, "methods": methods}, work)

    def _speed(self, lineup: Lineup, top_k: int, weights: Weights) -> None:
        """Measure an ensemble on one device, and conventional with a device for each member where there are enough."""
        devices, parallel = apart(lineup.config), None
        together = placed(lineup.config, [devices[0]] * len(devices)) if devices else lineup.config
        label = f"{lineup.label}{self._shown(weights)}, k = {top_k}: speed"
        results = self._bench(label, together, top_k, weights)
        if self.experiment.name != "figure2":  # which shows no CE
            if devices:
                more = self._bench(f"{label} with a device each", placed(lineup.config, devices), top_k, weights)
                parallel = _tokens_per_second(more, "conventional")
            else:
                self.notes[
                    f"{lineup.label}: CE (parallel) was not measured, for want of a device for each of its "
                    f"{len(lineup.names)} members"
                ] = None
        singles = [run for run in results["runs"] if run["method"] == "single"]
        where = results["environment"]
        self.speeds.append(
            SpeedFinding(
                lineup.label,
                str(where.get("accelerator") or f"{where['processor']}, {where['cores']} cores"),
                weights,
                top_k,
                {run["members"][0]: run["tokens_per_second"] for run in singles},
                _tokens_per_second(results, "conventional"),
                parallel,
                _tokens_per_second(results, "mixture"),
                results["ratios"]["mixture/conventional"],
            )
        )

    def _bench(self, label: str, config: EnsembleConfig, top_k: int, weights: Weights) -> dict[str, Any]:
        experiment = self.experiment
        options = {"temperature": 1.0, "top_k": top_k}
        settings = {
            "mixlm": __version__,
            "machine": machine(config),
            "ensemble": key(config),
            "weights": list(weights),
            "options": options,
            "tokens": experiment.tokens,
            "repeats": experiment.repeats,
        }

        def work() -> dict[str, Any]:
            from mixlm.benchmark import BenchPlan, bench

            ensemble = weighted(self.loaded.get(config), weights)
            plan = BenchPlan(experiment.tokens, experiment.repeats)
            return bench(ensemble, plan, options=cast(Options, options), progress=self.progress).as_dict()

        return self._once(label, settings, work)

    def _once(self, label: str, settings: Mapping[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what a run found, from the store when it is finished."""
        result = self.store.get(label, settings)
        self.say(f"[{self.place}] {label}{'' if result is None else ': finished before'}")
        if result is None:
            result = self.store.put(label, settings, work())
        self.environment = result["environment"]
        return result

    def _shown(self, weights: Weights) -> str:
        if weights and self.experiment.lambdas:
            return f", λ = {weights[0]:g}"
        return (
            f", weights {' '.join(f'{weight:g}' for weight in weights)}" if weights and self.experiment.search else ""
        )


def _tokens_per_second(results: Mapping[str, Any], method: str) -> float:
    return float(next(run["tokens_per_second"] for run in results["runs"] if run["method"] == method))
