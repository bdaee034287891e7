"""Accuracy of many ways to weigh the same members on one task: the paper's search for weights, and what it costs.

Where a task compares given texts, the members' log-probabilities do not depend on the weights: each text is read once
by each member, and all ways are judged from that. Where a task has texts written, every way has to write them anew.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mixlm.core.options import Options
from mixlm.ensemble import Ensemble
from mixlm.errors import UnsupportedError
from mixlm.evaluation.judging import build_requests, judge, to_scores
from mixlm.evaluation.lm import EnsembleLM
from mixlm.evaluation.request_scores import RequestScores
from mixlm.evaluation.results import Score
from mixlm.evaluation.run import describe, evaluate
from mixlm.evaluation.run_folder import locked_folder, response_log
from mixlm.fitting.likelihood import simplex
from mixlm.routing import FixedRouter, Router
from mixlm.routing.base import describe_router, observed_by
from mixlm.terminal import Progress
from mixlm.types import Floats


@dataclass(frozen=True)
class AccuracySetup:
    """How accuracy is measured. name, task: one of what `load_tasks` returned. out: the folder that a run continues in.

    limit: its first questions, None for all. seeds, method, options: of completions, where texts are written.
    """

    name: str
    task: Any
    out: Path
    limit: int | None = None
    seeds: Sequence[int] = (0,)
    method: str = "mixture"
    options: Options | None = None
    progress: Progress | None = None

    @property
    def scores_given_texts(self) -> bool:
        """Whether the task compares given texts, so that all weights are judged from one reading."""
        return bool(self.task.OUTPUT_TYPE == "multiple_choice")


@dataclass(frozen=True)
class WeightingAccuracy:
    """One way to weigh, measured. weights: None where they depend on the text. values: float64 (seeds, questions).

    tokens, seconds: written and taken for this way alone, in whatever runs; 0 tokens where texts are given.
    """

    name: str
    metric: str
    weights: Floats | None
    values: Floats
    tokens: int
    seconds: float

    def correct(self, questions: npt.NDArray[np.bool_]) -> float:
        """Return the sum of the metric over some questions, averaged over seeds: how many were right."""
        return float(self.values.mean(axis=0)[questions].sum())


@dataclass(frozen=True)
class AccuracyStudy:
    """All ways that were measured. read: texts that were read, by members; seconds it took; 0 where none were."""

    ways: tuple[WeightingAccuracy, ...]
    grid: tuple[WeightingAccuracy, ...] = ()
    read: int = 0
    read_seconds: float = 0.0

    @property
    def questions(self) -> int:
        """How many questions the task has."""
        return int(self.ways[0].values.shape[1])


def measure_accuracy(
    ensemble: Ensemble, ways: Mapping[str, Router], setup: AccuracySetup, *, step: float | None = None
) -> AccuracyStudy:
    """Measure the accuracy of several ways to weigh, and of every point of a grid where a step is given.

    Answers and readings are kept in `setup.out`, and what is there is not made again. Raises ConfigError for a folder
    that was begun otherwise or is in use, UnsupportedError for a task whose metric is no mean over questions.
    """
    observing = next((router for router in ways.values() if observed_by(router) is not None), None)
    if observing is not None and setup.scores_given_texts:
        ensemble = ensemble.with_router(observing)  # so that what it observes is read too
    grid = list(simplex(len(ensemble.members), step)) if step is not None else []
    points = {" ".join(f"{weight:g}" for weight in weights): FixedRouter(weights) for weights in grid}
    with locked_folder(setup.out, {"task": setup.name, **_unweighted(ensemble, setup)}):
        if setup.scores_given_texts:
            return _from_logprobs(ensemble, ways, points, setup)
        every = list(ways.items()) + list(points.items())
        done = [_from_generation(ensemble, way, setup, f"{i} of {len(every)}") for i, way in enumerate(every, 1)]
    return AccuracyStudy(tuple(done[: len(ways)]), tuple(done[len(ways) :]))


def held_out_questions(questions: int, share: float) -> npt.NDArray[np.bool_]:
    """Return which questions are held out: about a share of them, evenly among the others. bool (questions,)."""
    places = np.floor(np.arange(questions + 1) * share)
    out: npt.NDArray[np.bool_] = np.diff(places) > 0
    return out


def best_weights(grid: Sequence[WeightingAccuracy], questions: npt.NDArray[np.bool_]) -> WeightingAccuracy:
    """Return the point with the most right answers to some questions; of several, the one nearest to equal weights."""

    def key(way: WeightingAccuracy) -> tuple[float, float]:
        assert way.weights is not None
        return round(way.correct(questions), 9), -float((way.weights**2).sum())

    return max(grid, key=key)


def _unweighted(ensemble: Ensemble, setup: AccuracySetup) -> dict[str, Any]:
    """Return all that readings and completions depend on besides weights."""
    settings = describe(ensemble, setup.options or {}, None)
    members = [{name: value for name, value in member.items() if name != "weight"} for member in settings["members"]]
    written: dict[str, Any] = {} if setup.scores_given_texts else {"method": setup.method}
    if setup.scores_given_texts and (observes := observed_by(ensemble.router)) is not None:
        written = {"observes": asdict(observes)}
    return {**{name: value for name, value in settings.items() if name != "router"}, "members": members, **written}


def _from_logprobs(
    ensemble: Ensemble, ways: Mapping[str, Router], points: Mapping[str, Router], setup: AccuracySetup
) -> AccuracyStudy:
    requests = build_requests(setup.task, setup.limit, None)
    log = response_log(setup.out / "readings.jsonl")
    options: dict[str, Any] = {**(setup.options or {}), "method": "mixture"}
    observes = observed_by(ensemble.router) is not None
    readable = ensemble if observes else ensemble.with_weights([1.0] * len(ensemble.members))  # so that all are read
    lm = EnsembleLM(readable, options=cast(Options, options), log=log, progress=setup.progress, label="reading")
    plain = lm.member_scores(requests)
    scores = RequestScores.of(plain, ensemble.names, ensemble.unit.name)

    def way(name: str, router: Router) -> WeightingAccuracy:
        start = time.perf_counter()
        answers = [(float(logprob), False) for logprob in scores.logprobs(router)]
        table = judge(setup.task, requests, answers)
        # Whether a text is the greedy one is not known from readings.
        usable = {key: values for key, values in table.items() if key[0] != "exact_match"}
        score = _mean(setup.name, to_scores(setup.name, name, setup.task, (0,), [usable]) if usable else [])
        return _weighting_accuracy(name, router, score, 0, time.perf_counter() - start)

    engines = len({id(member.engine) for member in ensemble.members})
    done = [way(name, router) for name, router in (*ways.items(), *points.items())]
    grid, seconds = tuple(done[len(ways) :]), sum(log.records[i]["seconds"] for i, record in enumerate(plain) if record)
    return AccuracyStudy(tuple(done[: len(ways)]), grid, engines * len(requests), seconds)


def _from_generation(
    ensemble: Ensemble, way: tuple[str, Router], setup: AccuracySetup, place: str
) -> WeightingAccuracy:
    name, router = way
    weights = _weights(router)
    weighted = ensemble.with_router(router) if weights is None else ensemble.with_weights(weights.tolist())
    # Ways of equal weights have one folder, whatever they are called.
    about = describe_router(router) if weights is None else " ".join(f"{weight:.6g}" for weight in weights)
    out = setup.out / "ways" / (about if weights is not None else hashlib.sha256(about.encode()).hexdigest()[:16])
    show = setup.progress
    progress = None if show is None else lambda _, done, total: show(f"weights {place}", done, total)
    results = evaluate(
        weighted,
        {setup.name: setup.task},
        methods=[setup.method],
        seeds=setup.seeds,
        limit=setup.limit,
        options=setup.options or {},
        out=out,
        progress=progress,
    )
    score = _mean(setup.name, [score for score in results.scores if score.method == setup.method])
    entries = [
        entry
        for file in sorted(out.glob("*/*/seed-*.jsonl"))
        if int(file.stem.removeprefix("seed-")) in score.seeds
        for index, entry in response_log(file).records.items()
        if index < score.count
    ]
    tokens = sum(entry.get("tokens", 0) for entry in entries)
    return _weighting_accuracy(name, router, score, tokens, sum(entry.get("seconds", 0.0) for entry in entries))


def _mean(task: str, scores: Sequence[Score]) -> Score:
    """Return the first metric that is a mean over questions, turned so that more is better."""
    for score in scores:
        if score.questions is not None:
            return score if score.higher_is_better else replace(score, questions=-score.questions)
    raise UnsupportedError(
        f"{task} has no metric that is a mean over questions, so no weights do best on it", "take another task"
    )


def _weighting_accuracy(name: str, router: Router, score: Score, tokens: int, seconds: float) -> WeightingAccuracy:
    assert score.questions is not None
    return WeightingAccuracy(name, score.metric, _weights(router), score.questions, tokens, seconds)


def _weights(router: Router) -> Floats | None:
    """Return the weights of a router that has the same for every state."""
    return router.weights if isinstance(router, FixedRouter) else None
