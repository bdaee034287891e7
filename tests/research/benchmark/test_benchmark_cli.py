"""`python -m research.benchmark`: what is shown, what is written, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]
TOYS = ("-m", "toy:1", "-m", "toy:2")
SHORT = ("--tokens", "6", "--repeats", "1")


@pytest.mark.slow
def test_agreement_and_a_figure(run: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure, file = tmp_path / "speed.png", tmp_path / "speed.json"
    wanted = ("--methods", "speculative, mixture,single", "--draft", "toy:1", "--block", "2", "--agreement", "1")
    code, out, err = run(*TOYS, *SHORT, *wanted, "--plot", str(figure), "--output", str(file))
    assert (code, "100%" in out) == (0, True)
    assert "speculative/mixture" in out
    assert "agreement set to 100% by construction; forward costs are real" in out
    report = json.loads(file.read_text())
    assert report["notes"] == ["agreement set to 100% by construction; forward costs are real"]
    assert [method["draft"] for method in report["runs"]] == ["toy:1", None, None, None]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert f"drawn into {figure}" in err


def test_rivals_are_measured_with_all_methods(run: Command) -> None:
    report = json.loads(run(*TOYS, *SHORT, "--methods", "all", "--rivals", "--output", "-")[1])
    methods = [method["method"] for method in report["runs"]]
    assert methods == [
        "single",
        "single",
        "conventional",
        "mixture",
        "greedy",
        "speculative",
        "auto",
        "layered",
        "drafted",
    ]
    assert any("transformers toy:1 was left out" in note for note in report["notes"])


@pytest.mark.parametrize("axis", ["batch", "context", "members", "weights"])
def test_a_sweep_is_a_table_with_its_places(run: Command, axis: str) -> None:
    places = {"batch": "1,2", "context": "30,60", "members": "1,2", "weights": "0,0.5"}[axis]
    code, out, _ = run(*TOYS, *SHORT, "--sweep", axis, "--at", places)
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert {row[0] for row in rows if "mixture" in row} == set(places.split(","))


def test_devices_are_said_in_one_sentence_where_there_is_one(run: Command) -> None:
    assert "there is one device here" in run(*TOYS, *SHORT, "--sweep", "devices")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "mixtur"), "no method 'mixtur'"),
        (("--sweep", "bacth"), "no sweep 'bacth'"),
        (("--at", "1,2"), "--at is given"),
        (("--sweep", "devices", "--at", "1"), "--at is given"),
        (("--sweep", "batch", "--at", "one"), "--at is 'one'"),
        (("--sweep", "batch", "--rivals"), "--rivals and --sweep"),
        (("--agreement", "2"), "agreement is 2"),
        (("--plot", "speed.txt"), "speed.txt"),
        (("--methods", "speculative", "--draft", "toy:7"), "draft is 'toy:7'"),
        (("--tokens", "2"), "tokens is 2"),
    ],
)
def test_what_cannot_be_is_refused(run: Command, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(*TOYS, *arguments)
    assert (code, message in err) == (2, True), err
    assert not out
