"""A benchmark counts what ran; how fast it was is not tested."""

from __future__ import annotations

import json

import pytest

from mixlm.benchmark import bench
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble, MemberSpec
from mixlm.errors import ConfigError


@pytest.fixture
def pair() -> Ensemble:
    return Ensemble([MemberSpec(ToyEngine(seed=i), f"toy-{i}") for i in (1, 2)], [3, 1])


def test_every_method_is_measured(pair: Ensemble) -> None:
    report = bench(pair, tokens=16, repeats=2)
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


def test_ratios_and_environment_are_named(pair: Ensemble) -> None:
    form = json.loads(json.dumps(bench(pair, tokens=8, repeats=1).as_dict(), allow_nan=False))
    assert set(form["ratios"]) >= {"mixture/conventional", "mixture/single", "mixture/forwards"}
    assert 0 < form["ratios"]["mixture/forwards"] <= 1
    assert form["environment"]["settings"]["weights"] == {"toy-1": 0.75, "toy-2": 0.25}
    assert set(form["environment"]) >= {"command", "processor", "versions", "peak_memory_bytes"}


def test_progress_reaches_its_end(pair: Ensemble) -> None:
    seen: list[tuple[str, int, int]] = []
    bench(pair, tokens=4, repeats=1, progress=lambda *at: seen.append(at))
    assert seen[-1][1] == seen[-1][2]


def test_too_few_tokens_are_refused(pair: Ensemble) -> None:
    with pytest.raises(ConfigError, match="tokens is 1"):
        bench(pair, tokens=1)
