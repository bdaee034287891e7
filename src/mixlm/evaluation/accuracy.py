"""Accuracy of many ways to weigh the same members on one task: the paper's search for weights, and what it costs.

Where a task compares given texts, the members' log-probabilities do not depend on the weights: each text is read once
by each member, and all ways are judged from that. Where a task has texts written, every way has to write them anew.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mixlm.config import UnitName
from mixlm.core.options import Options
from mixlm.ensemble import Ensemble
from mixlm.errors import UnsupportedError
from mixlm.evaluation.judging import build_requests, judge, to_scores
from mixlm.evaluation.lm import EnsembleLM
from mixlm.evaluation.log import AnswerLog, locked
from mixlm.evaluation.readings import Readings
from mixlm.evaluation.results import Score
from mixlm.evaluation.run import Progress, describe, describe_router, evaluate
from mixlm.fitting.em import simplex
from mixlm.routing import FixedRouter, Router
from mixlm.types import Floats


@dataclass(frozen=True)
class Setup:
    """How accuracy is measured. name, task: one of what `load_tasks` returned. out: the folder that a run continues in.

    limit: its first questions, None for all. seeds, method, options: of replies, where texts are written.
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
    def reads(self) -> bool:
        """Whether the task compares given texts, so that all weights are judged from one reading."""
        return bool(self.task.OUTPUT_TYPE == "multiple_choice")


@dataclass(frozen=True)
class Way:
    """One way to weigh, measured. weights: None where they depend on the text. values: float64 (seeds, questions).

    tokens, seconds: written and taken for this way alone, in whatever runs; 0 tokens where texts are given.
    """

    name: str
    metric: str
    weights: Floats | None
    values: Floats
    tokens: int
    seconds: float

    def right(self, questions: npt.NDArray[np.bool_]) -> float:
        """Return the sum of the metric over some questions, averaged over seeds: how many were right."""
        return float(self.values.mean(axis=0)[questions].sum())


@dataclass(frozen=True)
class Measured:
    """All ways that were measured. read: texts that were read, by members; seconds it took; 0 where none were."""

    ways: tuple[Way, ...]
    grid: tuple[Way, ...] = ()
    read: int = 0
    read_seconds: float = 0.0

    @property
    def questions(self) -> int:
        """How many questions the task has."""
        return int(self.ways[0].values.shape[1])


def measure(ensemble: Ensemble, ways: Mapping[str, Router], setup: Setup, *, step: float | None = None) -> Measured:
    """Measure the accuracy of several ways to weigh, and of every point of a grid where a step is given.

    Answers and readings are kept in `setup.out`, and what is there is not made again. Raises ConfigError for a folder
    that was begun otherwise or is in use, UnsupportedError for a task whose metric is no mean over questions.
    """
    grid = list(simplex(len(ensemble.members), step)) if step is not None else []
    points = {" ".join(f"{one:g}" for one in weights): FixedRouter(weights) for weights in grid}
    with locked(setup.out, {"task": setup.name, **_unweighted(ensemble, setup)}):
        if setup.reads:
            return _by_reading(ensemble, ways, points, setup)
        every = list(ways.items()) + list(points.items())
        done = [_by_writing(ensemble, way, setup, f"{at} of {len(every)}") for at, way in enumerate(every, 1)]
    return Measured(tuple(done[: len(ways)]), tuple(done[len(ways) :]))


def held_out(questions: int, share: float) -> npt.NDArray[np.bool_]:
    """Return which questions are held out: about a share of them, evenly among the others. bool (questions,)."""
    places = np.floor(np.arange(questions + 1) * share)
    out: npt.NDArray[np.bool_] = np.diff(places) > 0
    return out


def best(grid: Sequence[Way], questions: npt.NDArray[np.bool_]) -> Way:
    """Return the point with the most right answers to some questions; of several, the one nearest to equal weights."""

    def key(way: Way) -> tuple[float, float]:
        assert way.weights is not None
        return round(way.right(questions), 9), -float((way.weights**2).sum())

    return max(grid, key=key)


def _unweighted(ensemble: Ensemble, setup: Setup) -> dict[str, Any]:
    """Return all that readings and replies depend on besides weights."""
    found = describe(ensemble, setup.options or {}, None)
    members = [{name: value for name, value in one.items() if name != "weight"} for one in found["members"]]
    written = {} if setup.reads else {"method": setup.method}
    return {**{name: value for name, value in found.items() if name != "router"}, "members": members, **written}


def _by_reading(ensemble: Ensemble, ways: Mapping[str, Router], points: Mapping[str, Router], setup: Setup) -> Measured:
    requests = build_requests(setup.task, setup.limit, None)
    log = AnswerLog(setup.out / "readings.jsonl")
    options: dict[str, Any] = {**(setup.options or {}), "method": "mixture"}
    readable = Ensemble(ensemble.members, unit=cast(UnitName, ensemble.unit.name), defaults=ensemble.defaults)
    lm = EnsembleLM(readable, options=cast(Options, options), log=log, progress=setup.progress, label="reading")
    plain = lm.readings(requests)
    found = Readings.of(plain, ensemble.names, ensemble.unit.name)

    def way(name: str, router: Router) -> Way:
        start = time.perf_counter()
        answers = [(float(one), False) for one in found.logprobs(router)]
        table = judge(setup.task, requests, answers)
        # Whether a text is the greedy one is not known from readings.
        usable = {key: values for key, values in table.items() if key[0] != "exact_match"}
        score = _mean(setup.name, to_scores(setup.name, name, setup.task, (0,), [usable]) if usable else [])
        return _way(name, router, score, 0, time.perf_counter() - start)

    engines = len({id(one.engine) for one in ensemble.members})
    done = [way(name, router) for name, router in (*ways.items(), *points.items())]
    grid, seconds = tuple(done[len(ways) :]), sum(one["seconds"] for one in plain if one)
    return Measured(tuple(done[: len(ways)]), grid, engines * len(requests), seconds)


def _by_writing(ensemble: Ensemble, way: tuple[str, Router], setup: Setup, place: str) -> Way:
    name, router = way
    weights = _weights(router)
    weighted = Ensemble(
        ensemble.members,
        (ensemble.weights if weights is None else weights).tolist(),
        unit=cast(UnitName, ensemble.unit.name),
        router=None if weights is not None else router,
        defaults=ensemble.defaults,
    )
    # Ways of equal weights have one folder, whatever they are called.
    about = describe_router(router) if weights is None else " ".join(f"{one:.6g}" for one in weights)
    out = setup.out / "ways" / (about if weights is not None else hashlib.sha256(about.encode()).hexdigest()[:16])
    progress = None if setup.progress is None else partial(_shown, setup.progress, place)
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
    score = _mean(setup.name, [one for one in results.scores if one.method == setup.method])
    entries = [
        entry
        for file in sorted(out.glob("*/*/seed-*.jsonl"))
        if int(file.stem.removeprefix("seed-")) in score.seeds
        for at, entry in AnswerLog(file).entries.items()
        if at < score.count
    ]
    tokens = sum(entry.get("tokens", 0) for entry in entries)
    return _way(name, router, score, tokens, sum(entry.get("seconds", 0.0) for entry in entries))


def _shown(progress: Progress, place: str, label: str, done: int, total: int) -> None:
    progress(f"weights {place}", done, total)


def _mean(task: str, scores: Sequence[Score]) -> Score:
    """Return the first metric that is a mean over questions, turned so that more is better."""
    for one in scores:
        if one.questions is not None:
            return one if one.higher_is_better else replace(one, questions=-one.questions)
    raise UnsupportedError(
        f"{task} has no metric that is a mean over questions, so no weights do best on it", "take another task"
    )


def _way(name: str, router: Router, score: Score, tokens: int, seconds: float) -> Way:
    assert score.questions is not None
    return Way(name, score.metric, _weights(router), score.questions, tokens, seconds)


def _weights(router: Router) -> Floats | None:
    """Return the weights of a router that has the same for every state."""
    return router.weights if isinstance(router, FixedRouter) else None
