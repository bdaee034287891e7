"""Accuracy of many weights on one task: equal to evaluations one by one, resumable, and honest about its choice."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_tasks import toys

from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.evaluation import evaluate
from mixlm.evaluation.accuracy import (
    AccuracySetup,
    WeightingAccuracy,
    best_weights,
    held_out_questions,
    measure_accuracy,
)
from mixlm.evaluation.catalog import load_tasks
from mixlm.evaluation.run_folder import locked_folder
from mixlm.fitting.likelihood import simplex
from mixlm.resumable_log import ResumableLog
from mixlm.routing import FixedRouter, LearnedRouter, PromptRouter
from mixlm.routing.features import FEATURES


@pytest.fixture
def setup(task: Callable[..., str], tmp_path: Path) -> Callable[..., AccuracySetup]:
    def make(kind: str, **more: object) -> AccuracySetup:
        (name, loaded), *_ = load_tasks([task(kind)]).items()
        return replace(AccuracySetup(name, loaded, tmp_path / "out"), **more)

    return make


def weighted(ensemble: Ensemble, weights: np.ndarray) -> Ensemble:
    return Ensemble(ensemble.members, weights, unit=ensemble.unit.name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["choice", "generate"])
@pytest.mark.parametrize("piece", [False, True])
def test_every_point_is_what_an_evaluation_of_it_finds(
    setup: Callable[..., AccuracySetup], kind: str, piece: bool
) -> None:
    ensemble, accuracy_setup = toys(piece=piece), setup(kind, seeds=(3, 4), options={"top_k": 20})
    study = measure_accuracy(ensemble, {"equal": FixedRouter(np.array([0.5, 0.5]))}, accuracy_setup, step=0.25)
    points = list(simplex(2, 0.25))
    assert [way.weights.tolist() for way in study.grid] == [point.tolist() for point in points]
    for weights, way in zip([*points, [0.5, 0.5]], [*study.grid, *study.ways], strict=True):
        plan = {"methods": ["mixture"], "seeds": [3, 4], "options": {"top_k": 20} if kind == "generate" else {}}
        expected = evaluate(weighted(ensemble, weights), {accuracy_setup.name: accuracy_setup.task}, **plan)
        score = expected.score(accuracy_setup.name, "mixture")
        assert way.metric == score.metric
        assert (way.values == score.questions).all()
    assert (study.ways[0].values == study.grid[2].values).all()
    assert study.questions == 5


@pytest.mark.slow
def test_routers_are_judged_from_the_same_reading(
    setup: Callable[..., AccuracySetup], monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble, plan = toys(piece=True), setup("choice")
    routers = {
        "by prompt": PromptRouter(ensemble.weights, 3.0),
        "learned": LearnedRouter(np.random.default_rng(1).normal(size=(2, FEATURES)), ensemble.names),
    }
    study = measure_accuracy(ensemble, routers, plan)
    assert (study.read, study.grid) == (2 * 5 * 3, ())
    assert study.read_seconds > 0
    for way, router in zip(study.ways, routers.values(), strict=True):
        assert way.weights is None
        routed = Ensemble(ensemble.members, ensemble.weights, router=router)
        score = evaluate(routed, {plan.name: plan.task}, methods=["mixture"]).score(plan.name, "mixture")
        assert (way.values == score.questions).all()
    # A second time, nothing is read: not even for other routers.
    monkeypatch.setattr(ToyEngine, "on_forward", staticmethod(lambda *_: pytest.fail("it was read")))
    again = measure_accuracy(ensemble, {"other": PromptRouter(ensemble.weights, 9.0)}, plan, step=0.5)
    assert again.read_seconds == pytest.approx(study.read_seconds)
    assert len(again.grid) == 3


@pytest.mark.slow
def test_a_router_writes_in_a_folder_of_its_own(setup: Callable[..., AccuracySetup]) -> None:
    ensemble, plan = toys(), setup("generate")
    routers = {f"{sharpness}": PromptRouter(ensemble.weights, sharpness) for sharpness in (0.5, 50.0)}
    study = measure_accuracy(ensemble, routers, plan)
    assert len(list((plan.out / "ways").iterdir())) == 2
    for way, router in zip(study.ways, routers.values(), strict=True):
        routed = Ensemble(ensemble.members, ensemble.weights, router=router)
        score = evaluate(routed, {plan.name: plan.task}, methods=["mixture"], seeds=[0]).score(plan.name, "mixture")
        assert (way.values == score.questions).all()


@pytest.mark.slow
def test_a_search_that_stopped_goes_on(setup: Callable[..., AccuracySetup], monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble, plan = toys(), setup("generate")
    whole = measure_accuracy(ensemble, {}, replace(plan, out=plan.out / "whole"), step=0.5)
    add = ResumableLog.add
    written: list[int] = []

    def stopping(self: ResumableLog, index: int, *rest: Any) -> None:
        if len(written) == 8:
            written.append(-1)
            raise KeyboardInterrupt
        written.append(index)
        add(self, index, *rest)

    monkeypatch.setattr(ResumableLog, "add", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure_accuracy(ensemble, {}, plan, step=0.5)
    again = measure_accuracy(ensemble, {}, plan, step=0.5)
    assert len(written) - 1 == 15
    for way, two in zip(again.grid, whole.grid, strict=True):
        assert (way.values == two.values).all()
        assert (way.tokens, way.seconds > 0) == (two.tokens, True)
    # Texts that were written before count with what they took then.
    assert measure_accuracy(ensemble, {}, plan, step=0.5).grid[0].seconds == again.grid[0].seconds
    assert len(written) - 1 == 15
    fewer = measure_accuracy(ensemble, {}, replace(plan, limit=2), step=0.5)
    assert [way.values.shape for way in fewer.grid] == [(1, 2)] * 3
    assert all(few.tokens < all_.tokens for few, all_ in zip(fewer.grid, again.grid, strict=True))


def test_tokens_are_those_of_the_logs(setup: Callable[..., AccuracySetup]) -> None:
    plan = setup("generate", seeds=(0, 1))
    study = measure_accuracy(toys(), {"a": FixedRouter(np.array([0.5, 0.5]))}, plan)
    logs = (plan.out / "ways" / "0.5 0.5").glob("*/*/*.jsonl")
    entries = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    assert len(entries) == 10
    assert study.ways[0].tokens == sum(entry["tokens"] for entry in entries) > 0


def test_other_questions_or_models_are_refused(setup: Callable[..., AccuracySetup]) -> None:
    plan = setup("choice")
    measure_accuracy(toys(), {}, plan, step=0.5)
    measure_accuracy(toys(weights=[0.1, 0.9]), {}, plan, step=0.5)
    with pytest.raises(ConfigError, match="was begun with members"):
        measure_accuracy(toys(piece=True), {}, plan, step=0.5)
    with pytest.raises(ConfigError, match="was begun with task"):
        measure_accuracy(toys(), {}, replace(plan, name="another"), step=0.5)
    path = plan.out / "settings.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "format"}))
    with pytest.raises(ConfigError, match="was begun with format = nothing"):
        measure_accuracy(toys(), {}, plan, step=0.5)


def test_a_task_without_a_mean_over_questions_is_refused(setup: Callable[..., AccuracySetup]) -> None:
    with pytest.raises(UnsupportedError, match="rolling has no metric that is a mean over questions"):
        measure_accuracy(toys(), {}, setup("rolling"), step=0.5)


def way(weights: list[float], values: list[float]) -> WeightingAccuracy:
    return WeightingAccuracy("x", "acc", np.array(weights), np.array([values]), 0, 0.0)


def test_the_best_point_is_chosen_by_some_questions_and_near_the_middle() -> None:
    grid = [way([1.0, 0.0], [1, 1, 0, 0]), way([0.5, 0.5], [1, 1, 0, 1]), way([0.0, 1.0], [0, 0, 1, 1])]
    first = np.array([True, True, False, False])
    assert best_weights(grid, first) is grid[1]
    assert best_weights(grid, ~first) is grid[2]


@pytest.mark.parametrize(("questions", "share", "out"), [(10, 0.5, 5), (10, 0.0, 0), (7, 0.34, 2), (1, 0.5, 0)])
def test_questions_are_held_out_evenly(questions: int, share: float, out: int) -> None:
    held_out = held_out_questions(questions, share)
    assert (held_out.shape, held_out.sum()) == ((questions,), out)
    assert not out or abs(np.flatnonzero(held_out).mean() - (questions - 1) / 2) < questions / 4


def _hold(folder: Path, locked: multiprocessing.synchronize.Event) -> None:
    with locked_folder(folder, {}):
        locked.set()
        signal.pause()


@pytest.mark.slow
def test_a_folder_is_of_one_run_at_a_time_and_free_once_it_is_killed(task: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    context = multiprocessing.get_context("spawn")
    locked = context.Event()
    process = context.Process(target=_hold, args=(out, locked))
    process.start()
    try:
        assert locked.wait(60)
        with pytest.raises(ConfigError, match=r"out/ is being written by another mixlm \(wait for") as caught:
            evaluate(toys(), [task("choice")], out=out)
        assert str(out) in caught.value.message
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    with locked_folder(out, {}):
        pass
