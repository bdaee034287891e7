"""`mixlm fit --rule`: its report, the file it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from programs import Run

from mixlm.config import read_config

MEMBERS = ("-m", "toy:1", "-m", "toy:2", "--unit", "token")


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text(" the river sings and one bird falls under two" * 3)
    return "words.txt"


def test_the_fitted_rule_is_written_and_used(run: Run, words: str) -> None:
    done = run("fit", words, *MEMBERS, "--rule", "geometric", "--output", "pair.toml", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["bits_per_byte"]["train"] == min(point["bits_per_byte"] for point in report["strengths"])
    config = read_config("pair.toml")
    assert config.combination is not None
    assert config.combination.strength == report["strength"]
    assert config.weights() == pytest.approx(report["weights"])
    shown = run("fit", words, *MEMBERS, "--rule", "geometric", "-w", "1,1")
    assert "Rule geometric: the training text is the most likely at --strength" in shown.out
    assert "with the weights toy:1 0.50, toy:2 0.50" in shown.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rule", "max"), "rule max has no strength to fit"),
        (("--rule", "power", "--strength", "3"), "--strength is what mixlm fit --rule finds"),
        (("--rule", "power", "--grid"), "--grid is of weights and routers"),
        (("--rule", "power", "--router", "r.json"), "--router is of weights and routers"),
        (("--rule", "contrastive", "--alpha", "1"), "use --alpha 0"),
        (("--rule", "power", "--system", "x"), "--system applies to prompts"),
    ],
)
def test_what_does_not_go_with_a_rule_is_refused(run: Run, words: str, options: tuple[str, ...], message: str) -> None:
    done = run("fit", words, *MEMBERS, *options)
    assert done.code == 2
    assert message in done.err
