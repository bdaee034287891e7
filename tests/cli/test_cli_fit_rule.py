"""`mixlm fit --rule`: its report, the file it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from programs import Run

from mixlm.config import read_config
from mixlm.engines.toy import ToyEngine
from mixlm.routing.deferral import DeferralGate

MEMBERS = ("-m", "toy:1", "-m", "toy:2", "--unit", "token")


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text(" the river sings and one bird falls under two" * 6)
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


@pytest.mark.slow
def test_a_gate_of_defer_is_trained_written_and_used(run: Run, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixlm.fitting.gate_trainer.PENALTIES", (5e-3,))
    defer = ("fit", words, *MEMBERS, "--rule", "defer")
    done = run(*defer, "--router", "keep.json", "--output", "pair.toml", "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    assert [row["name"] for row in rows][:3] == ["toy:1", "toy:2", "average"]
    assert 0 < rows[-1]["forwards"] < 1
    config = read_config("pair.toml")
    assert config.combination is not None
    assert config.combination.accept == str(Path.cwd() / "keep.json")
    gate = DeferralGate.load("keep.json")
    kept = [float(gate(np.array([top, *[(1 - top) / 40] * 40])).max()) for top in (0.05, 0.9)]
    assert abs(kept[0] - kept[1]) > 0.02
    written = run("generate", "-e", "pair.toml", "--raw", "a", "--max-tokens", "4", "--seed", "1")
    assert written.code == 0, written.err
    by_threshold = ("--rule", "defer", "--strength", "0.5")
    threshold = run("generate", "-e", "pair.toml", "--raw", "a", "--max-tokens", "4", *by_threshold)
    assert threshold.code == 0, threshold.err
    turned = run("generate", "-m", "toy:2", "-m", "toy:1", "-e", "pair.toml", "--raw", "a")
    assert turned.code == 2
    again = run("fit", words, "-e", "pair.toml", "--output", "threshold.toml")
    assert again.code == 2
    assert "pair.toml has a trained gate" in again.err
    assert run("fit", words, "-e", "pair.toml", "--rule", "defer", "--output", "threshold.toml").code == 0
    config = read_config("threshold.toml")
    assert config.combination is not None
    assert config.combination.accept is None
    for options, message in (
        (("--router", "keep.json", "--by", "top"), "--by is what mixlm fit --rule finds"),
        (("--router", "keep.json", "--features", "top_k"), "--features is of weights and routers"),
        (("--price", "1"), "--price is of a router"),
        (("--router", "keep.json", "-m", "toy:3"), "is for two members, and there are 3"),
    ):
        refused = run(*defer, "--force", *options)
        assert refused.code == 2
        assert message in refused.err


@pytest.mark.parametrize(
    "table",
    [{"rule": "contrastive", "alpha": 0.0, "form": "original"}, {"rule": "defer", "by": "token", "strength": 0.3}],
    ids=lambda table: table["rule"],
)
def test_the_parameters_of_a_file_that_are_not_fitted_are_written(run: Run, words: str, table: dict[str, Any]) -> None:
    form = {"unit": "token", "combination": table, "members": [{"model": "toy:1"}, {"model": "toy:2"}]}
    Path("pair.toml").write_text(tomli_w.dumps(form))
    done = run("fit", words, "-e", "pair.toml", "--output", "fitted.toml", "--json")
    assert done.code == 0, done.err
    fitted = read_config("fitted.toml").rule_options()
    assert fitted == {**table, "strength": json.loads(done.out)["strength"]}


def test_what_a_gate_cannot_be_trained_on_is_refused_before_texts_are_scored(
    run: Run, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixlm.cli.fit_rule.score_texts", None)
    done = run("fit", words, *MEMBERS[:4], "--unit", "piece", "--rule", "defer", "--router", "keep.json")
    assert done.code == 2
    assert "is trained on members with one vocabulary" in done.err
    monkeypatch.setattr(ToyEngine, "top_k_limit", 30)
    done = run("fit", words, *MEMBERS, "--rule", "defer", "--router", "keep.json")
    assert "a gate of rule defer needs every token's probability" in done.err


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ('rule = "max"\naccept = "keep.json"', [], "accept is a gate of rule defer, and the rule is 'max'"),
        ('rule = "defer"\nstrength = 0.5\naccept = "keep.json"', [], "give one of them"),
        ('rule = "defer"\naccept = "keep.json"', [], "keep.json cannot be read"),
        ('rule = "defer"\naccept = "keep.json"', ["--strength", "0.3"], "of the ensemble file has a trained gate"),
    ],
)
def test_a_gate_in_an_ensemble_file_is_checked(
    run: Run, words: str, table: str, options: list[str], message: str
) -> None:
    members = '[[members]]\nmodel = "toy:1"\n[[members]]\nmodel = "toy:2"\n'
    Path("pair.toml").write_text(f"[combination]\n{table}\n{members}")
    done = run("generate", "-e", "pair.toml", "--raw", "a", *options)
    assert done.code == 2
    assert message in done.err
