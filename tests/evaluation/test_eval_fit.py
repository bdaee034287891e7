"""`mixlm fit --accuracy`: weights by likelihood beside the grid search over accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mixlm.engines.toy import ToySession

TOYS = ("-m", "toy:1", "-m", "toy:2", "--bootstrap", "0")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A text, in the folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text(" the river sings and one bird falls under two stones of light" * 12)
    return "words.txt"


@pytest.mark.slow
def test_choices_are_read_once_for_all_weights(run: Run, task: Callable[..., str], text: str) -> None:
    arguments = ("fit", text, *TOYS, "--accuracy", task("choice"), "--prompt-bytes", "60", "--router", "r.json")
    code, out, err = run(*arguments, "--grid", "--json")
    assert (code, err) == (0, "router written to r.json\n")
    accuracy = json.loads(out)["accuracy"]
    assert (accuracy["task"], accuracy["metric"], accuracy["questions"], accuracy["questions_that_chose"]) == (
        "choice",
        "acc",
        5,
        3,
    )
    rows = {row["name"]: row for row in accuracy["rows"]}
    assert list(rows)[:4] == ["toy:1", "toy:2", "equal weights", "EM"]
    assert {"grid over likelihood", "router", "grid over accuracy"} <= set(rows)
    assert any(name.startswith("by prompt, sharpness") for name in rows)
    assert len(accuracy["grid"]) == accuracy["cost"]["grid_points"] == 11
    best = max(point["right_that_chose"] for point in accuracy["grid"])
    assert rows["grid over accuracy"]["right_that_chose"] == best
    for row in accuracy["rows"]:
        assert row["right"] == row["right_that_chose"] + row["right_others"]
        assert row["minus_em"] == pytest.approx((row["right_others"] - rows["EM"]["right_others"]) / 2)
    assert rows["toy:1"]["right"] == accuracy["grid"][10]["right"]
    assert accuracy["cost"]["task_readings"] == 2 * 15
    assert json.loads(Path("fit-results/choice/accuracy.json").read_text()) == accuracy


@pytest.mark.slow
def test_the_report_says_what_chose_and_what_it_cost(run: Run, task: Callable[..., str], text: str) -> None:
    code, out, _ = run("fit", text, *TOYS, "--accuracy", task("choice"), "--step", "0.5", "--out", "here")
    assert code == 0
    for part in (
        "correct (selection)", "correct (others)", "grid over accuracy", "of 3 (", "of 2 (", "p-value",
        "was selected on the first group", "30 texts were scored once", "needs 90 passes", "EM took",
    ):  # fmt: skip
        assert part in out, part
    assert Path("here/readings.jsonl").exists()
    plain = run("fit", text, *TOYS, "--accuracy", task("choice"), "--limit", "2", "--out", "here")[1]
    assert "of 2 (" in plain
    assert "grid" not in plain
    assert "for scoring 12 texts" in plain


@pytest.mark.slow
def test_a_task_that_writes_is_written_at_every_point(
    run: Run, task: Callable[..., str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = task("generate")
    arguments = ("fit", text, *TOYS, "--accuracy", name, "--step", "0.5", "--seeds", "2", "--seed", "4", "--top-k", "9")
    accuracy = json.loads(run(*arguments, "--json")[1])["accuracy"]
    assert accuracy["cost"]["grid_tokens"] == sum(point["tokens"] for point in accuracy["grid"]) > 0
    assert accuracy["cost"]["grid_seconds"] == pytest.approx(sum(point["seconds"] for point in accuracy["grid"]))
    folder = Path("fit-results/generate/ways/0.5 0.5")
    assert sorted(path.name for path in folder.glob("*/*/*")) == ["seed-4.jsonl", "seed-5.jsonl"]
    assert json.loads((folder / "settings.json").read_text())["options"] == {"top_k": 9}
    monkeypatch.setattr(ToySession, "forward", lambda *_: pytest.fail("it was written anew"))
    again = json.loads(run(*arguments, "--json")[1])["accuracy"]
    assert (again["grid"], again["rows"]) == (accuracy["grid"], accuracy["rows"])
    assert "3 points generated" in run(*arguments)[1]


@pytest.mark.slow
def test_what_does_not_fit_is_said_before_a_model_is_loaded(
    run: Run, task: Callable[..., str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixlm.loading.load_config", lambda *_, **__: pytest.fail("it was loaded"))
    for arguments, said in (
        (("--limit", "3"), "--limit is given without --accuracy"),
        (("--out", "x"), "--out is given without --accuracy"),
        (("--accuracy", task("choice"), "--limit", "0"), "--limit is 0"),
        (("--accuracy", task("choice"), "--seeds", "2"), "scores given texts and does not use --seeds"),
        (("--accuracy", task("choice"), "--top-k", "2"), "scores given texts and does not use --top-k"),
        (("--top-k", "2"), "mixlm fit does not use --top-k"),
        (("--accuracy", "mixlm_gsm9k"), "did you mean 'mixlm_gsm8k'"),
        (("--prompt-bytes", "-1"), "--prompt-bytes is -1"),
        (("--no-ends",), "--ends and --no-ends apply to answers"),
    ):
        code, out, err = run("fit", text, *TOYS, *arguments)
        assert (code, out) == (2, ""), err
        assert said in err
        assert len(err.splitlines()) == 2
