"""Speed along an axis: what is measured where, and what is said of it. How fast it was is not tested."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import shapes

from mixlm.binding import LoadedMember
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from research import figures
from research.benchmark import ComparisonPlan, compare, plots, sweep_along
from research.benchmark.agreement import agreement_note
from research.benchmark.batch import BatchContestant
from research.benchmark.sweeps import AXES, METHODS, Sweep, SweepPoint

SMALL: dict[str, Any] = {"tokens": 8, "repeats": 1}


@pytest.fixture
def pair() -> Ensemble:
    return Ensemble([LoadedMember(ToyEngine(seed=i), f"toy-{i}") for i in (1, 2)], [3, 1])


def points(sweep: Sweep, series: str) -> dict[float | str, SweepPoint]:
    return {point.x: point for point in sweep.points if point.series == series}


def test_a_batch_is_measured_while_all_of_it_is_under_way(pair: Ensemble) -> None:
    sweep = sweep_along("batch", pair, ComparisonPlan(places=[1, 3], **SMALL))
    assert list(dict.fromkeys(point.series for point in sweep.points)) == [
        "single toy-1",
        "single toy-2",
        "conventional",
        "mixture",
    ]
    for point in sweep.points:
        assert point.tokens_per_second > 0
        assert point.more["seconds_of_the_batch"] > 0
    assert sweep.more["offline"]["replies"] == 3
    assert sweep.more["offline"]["label"] == "mixture"
    assert "3 completions of 9 tokens by mixture" in sweep.notes[0]


def test_the_window_leaves_out_first_tokens_and_what_follows_the_first_end(pair: Ensemble) -> None:
    for size in (1, 4):
        sample = BatchContestant(pair, "single", size, "the river", {"seed": 1}).measure(0, 10)
        # All completions of one member go on in step: 10 tokens each behind the first one.
        assert sample.tokens == 10 * size
        assert len(sample.forwards[0]) == 10 * size
    mixture = BatchContestant(pair, "mixture", 4, "the river", {"seed": 1}).measure(0, 10)
    assert 10 <= mixture.tokens <= 40
    assert sum(len(log) for log in mixture.forwards) == mixture.tokens


@pytest.mark.slow
def test_completions_of_a_batch_share_forwards_of_real_models() -> None:
    sweep = sweep_along(
        "batch", shapes(), ComparisonPlan(places=[4], methods=("conventional", "mixture"), tokens=12, repeats=1)
    )
    assert points(sweep, "conventional")[4].more["replies_a_forward"] == 4
    assert 1 < points(sweep, "mixture")[4].more["replies_a_forward"] < 4


@pytest.mark.slow
def test_a_context_is_as_long_as_it_says(pair: Ensemble) -> None:
    sweep = sweep_along("context", pair, ComparisonPlan(places=[40, 80, 5000], **SMALL))
    assert list(points(sweep, "mixture")) == [40, 80, 4086]
    assert "4086 tokens in place of 5000" in sweep.notes[0]
    for point in sweep.points:
        assert point.more["ms_a_token"] == pytest.approx(1000 / point.tokens_per_second)
    assert set(points(sweep, "single toy-1")[40].more) == {"ms_a_token", "seconds_to_read toy-1"}
    assert set(points(sweep, "mixture")[40].more) >= {"seconds_to_read toy-1", "seconds_to_read toy-2"}
    # The prompt was read before: what is run is what is written.
    assert sum(points(sweep, "conventional")[80].forwards.values()) == 2


@pytest.mark.slow
def test_members_are_copies_that_are_run_for_themselves() -> None:
    sweep = sweep_along("members", shapes(), ComparisonPlan(places=[1, 3], methods=METHODS["members"], **SMALL))
    assert set(points(sweep, "conventional")[3].forwards) == {"small-1", "small-2", "small-3"}
    assert sum(points(sweep, "conventional")[3].forwards.values()) == 3
    assert sum(points(sweep, "mixture")[3].forwards.values()) == 1
    assert list(points(sweep, "single")) == [1]
    assert "copies of small" in sweep.notes[0]


def test_weights_are_those_of_the_first_member_and_the_cost_model_stands_beside(pair: Ensemble) -> None:
    sweep = sweep_along(
        "weights", pair, ComparisonPlan(places=[0, 0.5, 1], methods=("mixture", "speculative"), **SMALL)
    )
    mixture = points(sweep, "mixture")
    assert mixture[0].forwards == {"toy-1": 0, "toy-2": 1}
    assert mixture[1].forwards == {"toy-1": 1, "toy-2": 0}
    assert all(point.predicted is not None and point.predicted > 0 for point in mixture.values())
    assert [point.series for point in sweep.points if point.x == "alone"] == ["single toy-1", "single toy-2"]


def test_one_device_is_said_to_be_one(pair: Ensemble) -> None:
    sweep = sweep_along("devices", pair, ComparisonPlan(**SMALL))
    assert {point.x for point in sweep.points} == {"one for all"}
    assert sweep.notes == ("there is one device here, so the 2 members were measured on it alone",)


def test_members_on_devices_of_their_own_stand_beside_those_on_one(pair: Ensemble) -> None:
    sweep = sweep_along("devices", pair, ComparisonPlan(agreement=0.5, **SMALL), apart=lambda: pair)
    assert set(points(sweep, "conventional")) == {"one for all", "one for each"}
    assert set(points(sweep, "single toy-1")) == {"one for all"}
    assert sweep.notes == (agreement_note(0.5),)


@pytest.mark.parametrize(
    ("axis", "places", "message"),
    [
        ("batches", [], "there is no sweep 'batches'"),
        ("batch", [1.5], r"1\.5 is no place"),
        ("batch", [0], "0 is no place"),
        ("weights", [1.5], r"λ is 1\.5; it must be from 0 to 1"),
    ],
)
def test_places_that_cannot_be_are_refused(pair: Ensemble, axis: str, places: Sequence[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep_along(axis, pair, ComparisonPlan(places=places, **SMALL))
    with pytest.raises(ConfigError, match="nothing is varied"):
        compare(pair, ComparisonPlan(places=[1]))


def test_a_weight_of_one_among_three_has_no_axis() -> None:
    three = Ensemble([LoadedMember(ToyEngine(seed=i), f"toy-{i}") for i in range(3)])
    with pytest.raises(ConfigError, match="there are 3 members"):
        sweep_along("weights", three, ComparisonPlan(**SMALL))


@pytest.mark.slow
@pytest.mark.parametrize("axis", [None, *AXES])
def test_every_report_can_be_written_as_json_and_drawn(pair: Ensemble, axis: str | None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    places = {"batch": [1, 2], "context": [20, 40], "members": [1, 2], "weights": [0, 1]}.get(axis or "", [])
    if axis is None:
        form = compare(pair, ComparisonPlan(methods=["single", "mixture", "auto"], **SMALL)).as_dict()
    else:
        form = sweep_along(axis, pair, ComparisonPlan(places=places, methods=METHODS[axis], **SMALL)).as_dict()
        assert set(form) >= {"sweep", "axis", "points", "environment", "notes"}
    form = json.loads(json.dumps(form, allow_nan=False))
    figure = plots.draw(form)
    axes = figure.axes
    assert all(axe.get_xlabel() for axe in axes)
    assert plots.machine(form["environment"]) in figure.get_suptitle()
    if axis not in (None, "devices"):
        assert {"mixture"} <= {text.get_text() for text in axes[0].get_legend().get_texts()}
        assert [axe.get_ylabel() for axe in axes][:1] == ["tokens/s"]
    for form_name in ("speed.png", "speed.svg"):
        plots.save(form, tmp_path / form_name)
        assert (tmp_path / form_name).stat().st_size > 1000


def test_a_figure_needs_the_name_of_one() -> None:
    with pytest.raises(ConfigError, match=r"speed\.txt"):
        figures.require(Path("speed.txt"))
