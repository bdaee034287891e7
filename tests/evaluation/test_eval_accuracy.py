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

from mixlm.engines.toy import ToySession
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.evaluation import evaluate
from mixlm.evaluation.accuracy import Setup, Way, best, held_out, measure
from mixlm.evaluation.catalog import load_tasks
from mixlm.evaluation.log import AnswerLog, locked
from mixlm.fitting.em import simplex
from mixlm.routing import FixedRouter, LearnedRouter, PromptRouter
from mixlm.routing.features import FEATURES


@pytest.fixture
def setup(task: Callable[..., str], tmp_path: Path) -> Callable[..., Setup]:
    def make(kind: str, **more: object) -> Setup:
        (name, loaded), *_ = load_tasks([task(kind)]).items()
        return replace(Setup(name, loaded, tmp_path / "out"), **more)

    return make


def weighted(those: Ensemble, weights: np.ndarray) -> Ensemble:
    return Ensemble(those.members, weights, unit=those.unit.name)


@pytest.mark.parametrize("kind", ["choice", "generate"])
@pytest.mark.parametrize("piece", [False, True])
def test_every_point_is_what_an_evaluation_of_it_finds(setup: Callable[..., Setup], kind: str, piece: bool) -> None:
    those, given = toys(piece=piece), setup(kind, seeds=(3, 4), options={"top_k": 20})
    found = measure(those, {"equal": FixedRouter(np.array([0.5, 0.5]))}, given, step=0.25)
    points = list(simplex(2, 0.25))
    assert [one.weights.tolist() for one in found.grid] == [one.tolist() for one in points]
    for weights, way in zip([*points, [0.5, 0.5]], [*found.grid, *found.ways], strict=True):
        plan = {"methods": ["mixture"], "seeds": [3, 4], "options": {"top_k": 20} if kind == "generate" else {}}
        expected = evaluate(weighted(those, weights), {given.name: given.task}, **plan)
        score = expected.score(given.name, "mixture")
        assert way.metric == score.metric
        assert (way.values == score.questions).all()
    assert (found.ways[0].values == found.grid[2].values).all()
    assert found.questions == 5


def test_routers_are_judged_from_the_same_reading(setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch) -> None:
    those, given = toys(piece=True), setup("choice")
    routers = {
        "by prompt": PromptRouter(those.weights, 3.0),
        "learned": LearnedRouter(np.random.default_rng(1).normal(size=(2, FEATURES)), those.names),
    }
    found = measure(those, routers, given)
    assert (found.read, found.grid) == (2 * 5 * 3, ())
    assert found.read_seconds > 0
    for way, router in zip(found.ways, routers.values(), strict=True):
        assert way.weights is None
        routed = Ensemble(those.members, those.weights, router=router)
        score = evaluate(routed, {given.name: given.task}, methods=["mixture"]).score(given.name, "mixture")
        assert (way.values == score.questions).all()
    # A second time, nothing is read: not even for other routers.
    monkeypatch.setattr(ToySession, "_forward", lambda *_: pytest.fail("it was read"))
    again = measure(those, {"other": PromptRouter(those.weights, 9.0)}, given, step=0.5)
    assert again.read_seconds == pytest.approx(found.read_seconds)
    assert len(again.grid) == 3


def test_a_router_writes_in_a_folder_of_its_own(setup: Callable[..., Setup]) -> None:
    those, given = toys(), setup("generate")
    routers = {f"{sharpness}": PromptRouter(those.weights, sharpness) for sharpness in (0.5, 50.0)}
    found = measure(those, routers, given)
    assert len(list((given.out / "ways").iterdir())) == 2
    for way, router in zip(found.ways, routers.values(), strict=True):
        routed = Ensemble(those.members, those.weights, router=router)
        score = evaluate(routed, {given.name: given.task}, methods=["mixture"], seeds=[0]).score(given.name, "mixture")
        assert (way.values == score.questions).all()


def test_a_search_that_stopped_goes_on(setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch) -> None:
    those, given = toys(), setup("generate")
    whole = measure(those, {}, replace(given, out=given.out / "whole"), step=0.5)
    add = AnswerLog.add
    written: list[int] = []

    def stopping(self: AnswerLog, at: int, *rest: Any) -> None:
        if len(written) == 8:
            written.append(-1)
            raise KeyboardInterrupt
        written.append(at)
        add(self, at, *rest)

    monkeypatch.setattr(AnswerLog, "add", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure(those, {}, given, step=0.5)
    again = measure(those, {}, given, step=0.5)
    assert len(written) - 1 == 15
    for one, two in zip(again.grid, whole.grid, strict=True):
        assert (one.values == two.values).all()
        assert (one.tokens, one.seconds > 0) == (two.tokens, True)
    # Texts that were written before count with what they took then.
    assert measure(those, {}, given, step=0.5).grid[0].seconds == again.grid[0].seconds
    assert len(written) - 1 == 15
    fewer = measure(those, {}, replace(given, limit=2), step=0.5)
    assert [one.values.shape for one in fewer.grid] == [(1, 2)] * 3
    assert all(few.tokens < all_.tokens for few, all_ in zip(fewer.grid, again.grid, strict=True))


def test_tokens_are_those_of_the_logs(setup: Callable[..., Setup]) -> None:
    given = setup("generate", seeds=(0, 1))
    found = measure(toys(), {"a": FixedRouter(np.array([0.5, 0.5]))}, given)
    logs = (given.out / "ways" / "0.5 0.5").glob("*/*/*.jsonl")
    entries = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    assert len(entries) == 10
    assert found.ways[0].tokens == sum(one["tokens"] for one in entries) > 0


def test_other_questions_or_models_are_refused(setup: Callable[..., Setup]) -> None:
    given = setup("choice")
    measure(toys(), {}, given, step=0.5)
    measure(toys(weights=[0.1, 0.9]), {}, given, step=0.5)
    with pytest.raises(ConfigError, match="was begun with members"):
        measure(toys(piece=True), {}, given, step=0.5)
    with pytest.raises(ConfigError, match="was begun with task"):
        measure(toys(), {}, replace(given, name="another"), step=0.5)


def test_a_task_without_a_mean_over_questions_is_refused(setup: Callable[..., Setup]) -> None:
    with pytest.raises(UnsupportedError, match="rolling has no metric that is a mean over questions"):
        measure(toys(), {}, setup("rolling"), step=0.5)


def way(weights: list[float], values: list[float]) -> Way:
    return Way("x", "acc", np.array(weights), np.array([values]), 0, 0.0)


def test_the_best_point_is_chosen_by_some_questions_and_near_the_middle() -> None:
    grid = [way([1.0, 0.0], [1, 1, 0, 0]), way([0.5, 0.5], [1, 1, 0, 1]), way([0.0, 1.0], [0, 0, 1, 1])]
    first = np.array([True, True, False, False])
    assert best(grid, first) is grid[1]
    assert best(grid, ~first) is grid[2]


@pytest.mark.parametrize(("questions", "share", "out"), [(10, 0.5, 5), (10, 0.0, 0), (7, 0.34, 2), (1, 0.5, 0)])
def test_questions_are_held_out_evenly(questions: int, share: float, out: int) -> None:
    found = held_out(questions, share)
    assert (found.shape, found.sum()) == ((questions,), out)
    assert not out or abs(np.flatnonzero(found).mean() - (questions - 1) / 2) < questions / 4


def _hold(folder: Path, held: multiprocessing.synchronize.Event) -> None:
    with locked(folder, {}):
        held.set()
        signal.pause()


def test_a_folder_is_of_one_run_at_a_time_and_free_once_it_is_killed(task: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold, args=(out, held))
    process.start()
    try:
        assert held.wait(60)
        with pytest.raises(ConfigError, match=r"another run is writing to .*out at this moment \(wait until") as caught:
            evaluate(toys(), [task("choice")], out=out)
        assert str(out) in caught.value.message
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    with locked(out, {}):
        pass
