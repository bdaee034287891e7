"""The paper's numbers agree with each other as far as its printing goes."""

from __future__ import annotations

import pytest

from research.paper import published
from research.paper.published import ACCURACY, ENSEMBLES, MISPRINTS, MODELS, SINGLE, SPEED, TASKS


@pytest.mark.parametrize("names", ACCURACY, ids=published.title)
def test_gains_are_over_the_best_single_model(names: tuple[str, ...]) -> None:
    best = [max(SINGLE[name][i] for name in names) for i in range(len(TASKS))]
    assert list(ACCURACY[names]) == [(m, k) for k in (5, 10) for m in ("conventional", "mixture")]
    for (method, k), cells in ACCURACY[names].items():
        assert len(cells) == len(TASKS)
        for task, cell, alone in zip(TASKS, cells, best, strict=True):
            holds = abs(cell.value - alone - cell.gain) < 0.006
            assert holds != ((names, method, k, task) in MISPRINTS), (method, k, task, cell)


@pytest.mark.parametrize("names", SPEED, ids=published.title)
def test_speed_ups_are_ratios_to_sequential_ce(names: tuple[str, ...]) -> None:
    pace = SPEED[names]
    values = (pace.single, pace.sequential, pace.parallel, pace.mixture)
    for value, ratio in zip(values, pace.ratios, strict=True):
        assert abs(value / pace.sequential - ratio) < 0.0101  # some are cut, not rounded
    assert pace.sequential < pace.parallel < pace.mixture < pace.single


def test_every_ensemble_has_its_models_and_numbers() -> None:
    for experiment, ensembles in ENSEMBLES.items():
        for names in ensembles:
            assert set(names) <= set(MODELS)
            if experiment.startswith("table"):
                assert names in (SPEED if experiment == "table4" else ACCURACY)
    assert set(SPEED) == set(ACCURACY)
    ratios = [pace.ratios[3] for pace in SPEED.values()]
    assert (min(ratios), max(ratios)) == (1.78, 2.68)  # the abstract's range


def test_models_are_recognised_by_the_end_of_their_names() -> None:
    assert published.find(["/models/qwen2.5-math-1.5b-instruct", "Qwen/Qwen2.5-3B-Instruct"]) == published.QWEN
    assert published.find(["Qwen/Qwen2.5-3B-Instruct"]) is None
    assert published.find(["toy:1", "toy:2"]) is None


def test_what_the_text_has_not_is_not_invented() -> None:
    assert published.numbers("figure4")["numbers"] == "plot only"
    assert published.numbers("table2")["single"]["OpenHermes"] == [67.59, 59.84, 47.13, 75.25]
    assert published.numbers("table4")["ensembles"]["Openchat + Nous-Hermes"]["mixture"] == 51.33
    assert published.accuracy(published.MIXED, "mixture", 7, "ARC") is None
    assert published.single("Qwen-7B", "ARC") is None
