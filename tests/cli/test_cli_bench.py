"""`mixlm bench`: what is shown, what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from programs import TOYS, Run

SHORT = ("--tokens", "6", "--repeats", "1")


def test_named_methods_are_shown_with_their_drafts(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    wanted = ("--methods", "speculative, mixture,single", "--draft", "toy:1", "--block", "2")
    done = run("bench", *TOYS, *SHORT, *wanted, "--output", str(file))
    assert done.code == 0
    assert "speculative/mixture" in done.out
    assert f"written to {file}" in done.err
    report = json.loads(file.read_text())
    assert [method["draft"] for method in report["runs"]] == ["toy:1", None, None, None]


def test_all_methods_can_be_asked_for(run: Run) -> None:
    report = json.loads(run("bench", *TOYS, *SHORT, "--methods", "all", "--output", "-").out)
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "mixtur"), "no method 'mixtur'"),
        (("--methods", ","), "no method is named"),
        (("--methods", "speculative", "--draft", "toy:7"), "draft is 'toy:7'"),
        (("--draft", "toy:1"), "draft is 'toy:1', and no method that is measured drafts"),
        (("--methods", "mixture,greedy", "--block", "4"), "block is 4, and no method that is measured drafts"),
        (("--tokens", "2"), "tokens is 2"),
    ],
)
def test_what_cannot_be_is_refused(run: Run, arguments: tuple[str, ...], message: str) -> None:
    done = run("bench", *TOYS, *arguments)
    assert (done.code, message in done.err) == (2, True), done.err
    assert not done.out


@pytest.mark.parametrize(
    "moved",
    [("--sweep", "batch"), ("--at", "1,4"), ("--agreement", "0.8"), ("--plot", "a.png"), ("--each",), ("--rivals",)],
)
def test_what_has_moved_says_where(run: Run, moved: tuple[str, ...]) -> None:
    done = run("bench", *TOYS, *moved)
    assert (done.code, done.out) == (2, "")
    assert "python -m research.benchmark" in done.err
