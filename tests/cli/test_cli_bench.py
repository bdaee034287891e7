"""`mixlm bench` with methods, sweeps, rivals and agreement: what is shown, what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from programs import TOYS, Run

SHORT = ("--tokens", "6", "--repeats", "1")


def test_named_methods_are_shown_with_their_guesses(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure, file = tmp_path / "speed.png", tmp_path / "speed.json"
    wanted = ("--methods", "speculative, mixture,single", "--draft", "toy:1", "--block", "2", "--agreement", "1")
    done = run("bench", *TOYS, *SHORT, *wanted, "--plot", str(figure), "--output", str(file))
    assert (done.code, "100%" in done.out) == (0, True)
    assert "speculative/mixture" in done.out
    assert "agreement set to 100% by construction; forward costs are real" in done.out
    found = json.loads(file.read_text())
    assert found["notes"] == ["agreement set to 100% by construction; forward costs are real"]
    assert [one["draft"] for one in found["runs"]] == ["toy:1", None, None, None]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert f"drawn into {figure}" in done.err


def test_all_methods_can_be_asked_for(run: Run) -> None:
    done = run("bench", *TOYS, *SHORT, "--methods", "all", "--rivals", "--output", "-")
    found = json.loads(done.out)
    methods = [one["method"] for one in found["runs"]]
    assert methods == ["single", "single", "conventional", "mixture", "greedy", "speculative", "auto", "drafted"]
    assert any("transformers toy:1 was left out" in one for one in found["notes"])


@pytest.mark.parametrize("axis", ["batch", "context", "members", "weights"])
def test_a_sweep_is_a_table_with_its_places(run: Run, axis: str) -> None:
    places = {"batch": "1,2", "context": "30,60", "members": "1,2", "weights": "0,0.5"}[axis]
    done = run("bench", *TOYS, *SHORT, "--sweep", axis, "--at", places)
    assert done.code == 0
    assert "mixture" in done.out
    rows = [line.split() for line in done.out.splitlines()]
    assert {row[0] for row in rows if "mixture" in row} == set(places.split(","))


def test_devices_are_said_in_one_sentence_where_there_is_one(run: Run) -> None:
    done = run("bench", *TOYS, *SHORT, "--sweep", "devices")
    assert "there is one device here" in done.out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--methods", "mixtur"), "no method 'mixtur'"),
        (("--methods", ","), "no method is named"),
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
def test_what_cannot_be_is_refused(run: Run, given: tuple[str, ...], message: str) -> None:
    done = run("bench", *TOYS, *given)
    assert (done.code, message in done.err) == (2, True), done.err
    assert not done.out
