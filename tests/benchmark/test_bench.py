"""A benchmark counts what ran; how fast it was is not tested."""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any

import pytest

from mixlm.benchmark import BenchPlan, bench
from mixlm.benchmark.measure import rival_ratios, speed_ratios
from mixlm.benchmark.timing import TimedRun, contestants, default_draft_name
from mixlm.binding import LoadedMember
from mixlm.engines.requests import Forward
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from mixlm.fitting.gates import untrained
from mixlm.routing.gate_router import GateInputs


@pytest.fixture
def pair() -> Ensemble:
    return Ensemble([LoadedMember(ToyEngine(seed=i), f"toy-{i}") for i in (1, 2)], [3, 1])


def test_every_method_is_measured(pair: Ensemble) -> None:
    report = bench(pair, BenchPlan(tokens=16, repeats=2))
    by_method = {(run.method, run.members): run for run in report.runs}
    assert list(by_method) == [
        ("single", ("toy-1",)),
        ("single", ("toy-2",)),
        ("conventional", ("toy-1", "toy-2")),
        ("mixture", ("toy-1", "toy-2")),
    ]
    assert by_method["single", ("toy-1",)].forwards == {"toy-1": 16}
    assert by_method["conventional", ("toy-1", "toy-2")].forwards == {"toy-1": 16, "toy-2": 16}
    assert sum(by_method["mixture", ("toy-1", "toy-2")].forwards.values()) == 16
    assert all(run.tokens_per_second > 0 and run.bytes_per_second > 0 for run in report.runs)


def test_there_is_no_peak_memory_on_windows(pair: Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    report = bench(pair, BenchPlan(tokens=4, repeats=1)).as_dict()
    assert "peak_memory_bytes" not in report["environment"]


def test_ratios_and_environment_are_named(pair: Ensemble) -> None:
    form = json.loads(json.dumps(bench(pair, BenchPlan(tokens=8, repeats=1)).as_dict(), allow_nan=False))
    assert set(form["ratios"]) >= {"mixture/conventional", "mixture/single", "mixture/forwards"}
    assert 0 < form["ratios"]["mixture/forwards"] <= 1
    assert form["environment"]["settings"]["weights"] == {"toy-1": 0.75, "toy-2": 0.25}
    assert set(form["environment"]) >= {"command", "processor", "versions", "peak_memory_bytes"}


def test_progress_reaches_its_end(pair: Ensemble) -> None:
    seen: list[tuple[str, int, int]] = []
    bench(pair, BenchPlan(tokens=4, repeats=1), progress=lambda *values: seen.append(values))
    assert seen[-1][1] == seen[-1][2]


def test_methods_are_measured_in_the_order_they_are_named(pair: Ensemble) -> None:
    report = bench(pair, BenchPlan(12, 2, methods=["mixture", "auto", "single", "drafted", "greedy", "speculative"]))
    labels = ["mixture", "auto", "single toy-1", "single toy-2", "drafted", "greedy", "speculative"]
    assert [run.label for run in report.runs] == labels
    by_label = {run.label: run for run in report.runs}
    assert by_label["auto"].plan
    for name in ("drafted", "speculative"):
        run = by_label[name]
        assert run.draft == "toy-1"
        assert run.acceptance is None or 0 <= run.acceptance <= 1
        assert run.accepted <= run.drafted
    assert by_label["mixture"].acceptance is by_label["mixture"].draft is None
    wanted = {"speculative/mixture", "speculative/single toy-2", "drafted/greedy", "mixture/single toy-1"}
    assert set(report.ratios) >= wanted
    assert "conventional" not in "".join(report.ratios)


def test_a_named_draft_writes_ahead_where_something_does(pair: Ensemble) -> None:
    options: Any = {"draft": "toy-2", "block": 2}
    report = bench(pair, BenchPlan(12, 2, methods=["drafted", "speculative", "mixture"]), options=options)
    assert [run.draft for run in report.runs] == ["toy-2", "toy-2", None]
    drafted, speculative, mixture = report.runs
    # The draft runs for every guess and for the token behind them; the other member once a block.
    assert drafted.forwards["toy-2"] > drafted.forwards["toy-1"]
    assert speculative.drafted > 0
    assert sum(mixture.forwards.values()) == 12
    assert report.environment["settings"]["block"] == 2


def test_every_method_writes_as_many_tokens_and_the_same_ones_by_the_same_noise(pair: Ensemble) -> None:
    prompts = {}
    for contestant in contestants(pair, ["mixture", "speculative", "auto"], "the river", {"seed": 3}):
        sample = contestant.measure(1, 20)
        assert (sample.tokens, len(sample.outside)) == (20, 20)
        prompts[contestant.label] = sample.bytes
    assert len(set(prompts.values())) == 1  # equal texts have equal lengths


def test_a_rule_is_measured_beside_members_alone(pair: Ensemble) -> None:
    report = bench(pair, BenchPlan(tokens=4, repeats=1), options={"rule": "max", "top_k": 3})
    assert [run.method for run in report.runs] == ["single", "single", "conventional", "layered"]


def test_the_drafts_of_the_report_are_those_of_the_strategies() -> None:
    for sizes, expected in (((1000, 10), "toy-2"), ((10, 1000), "toy-1"), ((10, 11), "lookup"), ((0, 0), "toy-1")):
        engines = [ToyEngine(seed=i) for i in (1, 2)]
        for engine, size in zip(engines, sizes, strict=True):
            engine.weights_bytes = size
        ensemble = Ensemble([LoadedMember(engine, f"toy-{i + 1}") for i, engine in enumerate(engines)])
        assert default_draft_name(ensemble) == expected
        settings = ensemble.settings(method="speculative", seed=0)
        writer = ensemble.context(settings)
        draft = inspect.getclosurevars(writer.strategy).nonlocals["draft"]
        assert draft.name == expected


def test_the_member_that_a_router_observes_drafts(pair: Ensemble) -> None:
    observing = pair.with_router(untrained(pair.names, GateInputs(("top_k",), "toy-2", 20)))
    assert [default_draft_name(ensemble) for ensemble in (pair, observing)] == ["toy-1", "toy-2"]


def test_an_empty_draft_is_refused(pair: Ensemble) -> None:
    with pytest.raises(ConfigError, match="draft"):
        bench(pair, BenchPlan(4, 1, methods=["speculative"]), options={"draft": ""})


def test_unknown_methods_and_members_are_refused(pair: Ensemble) -> None:
    with pytest.raises(ConfigError, match="no method 'mixtur' to measure") as caught:
        bench(pair, BenchPlan(methods=["mixtur"]))
    assert "mixture" in str(caught.value)
    with pytest.raises(ConfigError, match="no method is named"):
        bench(pair, BenchPlan(methods=[]))
    with pytest.raises(ConfigError, match="draft is 'toy-3'"):
        bench(pair, BenchPlan(methods=["speculative"]), options={"draft": "toy-3"})


def test_ratios_are_medians_of_the_ratios_of_a_repeat(pair: Ensemble) -> None:
    def samples(*seconds: float) -> list[TimedRun]:
        return [TimedRun(10, second, 0.1, 20, [[Forward(1, 5, second / 2)]]) for second in seconds]

    measured = {
        "single toy-1": samples(1, 1, 1),
        "single toy-2": samples(2, 2, 4),
        "conventional": samples(3, 3, 9),
        "mixture": samples(1.5, 1, 3),
        "speculative": samples(0.5, 0.25, 3),
    }
    ratios = speed_ratios(pair, measured)
    assert ratios["mixture/conventional"] == 3  # 2, 3, 3
    assert ratios["speculative/mixture"] == 3  # 3, 4, 1
    assert ratios["speculative/single toy-2"] == 4
    assert ratios["mixture/single"] == pytest.approx(1.25 / 1.5)  # of 1.25/1.5, 1.25/1, 1.75/3
    assert ratios["mixture/forwards"] == 0.5
    rivals = rival_ratios({**measured, "transformers toy-1": samples(2, 2, 2)}, ["transformers toy-1"])
    assert rivals["single toy-1/transformers toy-1"] == 2
    assert "single toy-2/transformers toy-1" not in rivals


def test_too_few_tokens_are_refused(pair: Ensemble) -> None:
    with pytest.raises(ConfigError, match="tokens is 1"):
        bench(pair, BenchPlan(tokens=1))
