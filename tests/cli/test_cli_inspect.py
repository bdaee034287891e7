"""`mixlm inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from programs import TOYS, Run

from mixlm.fitting.gates import untrained
from mixlm.routing.gate_router import GateInputs


def test_a_report_on_toys(run: Run) -> None:
    done = run("inspect", *TOYS, "-w", "3,1")
    assert (done.code, done.err) == (0, "")
    for part in (
        "toy:1",
        "0.75",
        "276 rows, 274 pieces",
        "<end>",
        "token",
        "rule mean-then-truncate",
        "100.0%",
        "16 tokens",
    ):
        assert part in done.out
    assert "<begin>user: Why is the sky blue?" in done.out
    assert "predicted" in done.out


def test_json_has_the_same_content(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "sample.txt"
    text.write_text("the bird sings under the tree")
    report = json.loads(run("inspect", "Who?", *TOYS, "--text", str(text), "--json").out)
    assert [member["name"] for member in report["members"]] == ["toy:1", "toy:2"]
    assert report["members"][0]["prompt"] == "<begin>user: Who?\n"
    assert report["text_bytes"] == 29
    assert report["pairs"][0]["places"] > 5
    assert set(report["costs"][0]["seconds"]) == {"1", "2", "4", "8", "16"}
    assert [speed["method"] for speed in report["speeds"]] == ["single", "single", "conventional", "mixture"]


def test_a_quick_look_runs_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a model was run")

    monkeypatch.setattr("mixlm.engines.toy.ToySession.forward", fail)
    done = run("inspect", *TOYS, "--no-measure")
    assert done.code == 0
    assert "predicted" not in done.out
    assert "no model was run" in done.err


def test_one_member_has_no_pairs(run: Run) -> None:
    done = run("inspect", "-m", "toy:1", "--no-measure")
    assert done.code == 0
    assert "also in" not in done.out


def test_why_a_method_is_not_possible(run: Run) -> None:
    done = run("inspect", *TOYS, "--no-measure", "--temperature", "0")
    assert "no: temperature is 0, and mixture samples" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "no-such-file"), "there is no file no-such-file"),
        (("--text", "x", "--no-measure"), "--text and --no-measure are both given"),
        (("--gain", "x", "--rule", "max"), "--gain is of the average"),
        (("--gain", "x", "--top-k", "3"), "does not use --top-k"),
        ((" ",), "the question is empty"),
        (("--unit", "words"), "--unit is 'words'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(run: Run, arguments: tuple[str, ...], message: str) -> None:
    done = run("inspect", *TOYS, *arguments)
    assert done.code == 2
    assert message in done.error


def test_a_text_that_is_empty_is_refused(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "empty.txt"
    text.write_text("\n")
    assert "is empty" in run("inspect", *TOYS, "--text", str(text)).error


def test_members_are_shown_in_their_colours_at_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[38;5;32mtoy:1" in run("inspect", *TOYS, "--no-measure").out


def test_the_gain_of_an_ensemble_on_a_text(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" the river sings and one bird falls under two stone" * 8)
    report = json.loads(run("inspect", "-m", "toy:1", "-m", "toy:2", "-m", "toy:3", "--gain", str(text), "--json").out)
    assert report["oracle"] <= report["fixed"]
    assert report["cost"] > 0
    assert [member["name"] for member in report["members"]] == ["toy:1", "toy:2", "toy:3"]
    shown = run("inspect", "-m", "toy:1", "-m", "toy:2", "-m", "toy:3", "--gain", str(text))
    assert shown.code == 0
    words = " ".join(shown.out.split())
    assert "oracle: the best member of each segment" in words
    assert "Gain: " in words
    assert "Cost: a token by mixture takes" in words
    assert "worth dropping" in words or "The least useful member is" in words
    assert "no ensemble" in run("inspect", "-m", "toy:1", "--gain", str(text)).err
    assert "a report of its own" in run("inspect", *TOYS, "--gain", str(text), "--no-measure").err


def test_what_a_router_observes_is_not_scored_where_weights_alone_count(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = GateInputs(("top_k",), "toy:1", 20)
    untrained(["toy:1", "toy:2"], inputs).save(tmp_path / "gate.json")
    pair, text = tmp_path / "pair.toml", tmp_path / "text.txt"
    pair.write_text(
        'members = [{model = "toy:1"}, {model = "toy:2"}]\n[router]\nkind = "learned"\nfile = "gate.json"\n'
    )
    text.write_text(" the river sings")

    def observe(*_: object, **__: object) -> None:
        raise AssertionError("observed")

    monkeypatch.setattr("mixlm.scoring.score.observed_states", observe)
    shown = run("inspect", "-e", str(pair), "--gain", str(text))
    assert "So short a text decides nothing" in shown.out
    assert run("fit", str(text), "-e", str(pair), "--bootstrap", "0").code == 0
