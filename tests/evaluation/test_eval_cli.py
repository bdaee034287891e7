"""`mixlm eval`."""

from __future__ import annotations

import json
from pathlib import Path

from mixlm.routing.deferral import FEATURES, DeferralGate
from mixlm.routing.gate import Gate

TOYS = ("-m", "toy:1", "-m", "toy:2")


def test_the_list_needs_no_model(run) -> None:
    code, out, err = run("eval", "--list")
    assert (code, err) == (0, "")
    assert "mixlm_gsm8k" in out
    assert "57 subjects" in out
    names = [load["name"] for load in json.loads(run("eval", "--list", "--json")[1])["tasks"]]
    assert {"mixlm_mmlu", "mixlm_bbh", "mixlm_rg_gsm_symbolic"} <= set(names)


def test_a_table_of_scores_and_one_of_differences(run, task, tmp_path: Path) -> None:
    arguments = ("eval", *TOYS, "--tasks", f"{task('generate')},{task('choice')}", "--limit", "3", "--seeds", "2")
    code, out, err = run(*arguments, "--out", str(tmp_path / "out"), "--top-k", "10", "--seed", "7")
    assert (code, err) == (0, "")
    assert "exact_match, 3 questions" in out
    assert "mixture - conventional" in out
    assert "single:toy:2" in out
    assert (tmp_path / "out" / "generate" / "mixture" / "seed-8.jsonl").exists()
    again = json.loads(run(*arguments, "--seed", "7", "--json")[1])
    assert [score["method"] for score in again["scores"][:2]] == ["mixture", "conventional"]
    assert again["settings"]["seeds"] == [7, 8]
    assert again["comparisons"][0]["p_value"] <= 1


def test_one_method_and_greedy(run, task) -> None:
    report = run("eval", *TOYS, "--tasks", task("greedy"), "--methods", "mixture", "--seeds", "2", "--limit", "2")
    assert report[0] == 0
    assert "note: greedy asks for greedy decoding" in report[2]
    report = run("eval", *TOYS, "--tasks", task("generate"), "--method", "greedy", "--temperature", "0", "--limit", "2")
    assert report[0] == 0
    assert "greedy" in report[1]


def test_a_rule_is_compared_with_members_alone(run, task, tmp_path: Path) -> None:
    DeferralGate(Gate.untrained(2, FEATURES), ["toy:1", "toy:2"]).save(tmp_path / "keep.json")
    table = 'rule = "defer"\naccept = "keep.json"\n'
    members = '[[members]]\nmodel = "toy:1"\n[[members]]\nmodel = "toy:2"\n'
    (tmp_path / "pair.toml").write_text(f"[combination]\n{table}{members}")
    for ensemble, rule in (
        (("-e", str(tmp_path / "pair.toml")), "defer"),
        ((*TOYS, "--mix-then-truncate"), "mean-then-truncate"),
    ):
        plan = ("--tasks", task("generate"), "--limit", "1", "--seeds", "1", "--json")
        code, out, err = run("eval", *ensemble, *plan, "--out", str(tmp_path / rule))
        assert code == 0, err
        report = json.loads(out)
        assert [score["method"] for score in report["scores"]] == [
            "layered", "conventional", "single:toy:1", "single:toy:2",
        ]  # fmt: skip
        described = report["settings"]["defaults"]["rule"]
        assert (described["name"] if isinstance(described, dict) else described) == rule


def test_refusals_are_one_sentence_and_a_hint(run, task) -> None:
    name = task("generate")
    for arguments, said in (
        (("--tasks", name, "--methods", "mixtur"), "did you mean 'mixture'"),
        ((), "--tasks is empty"),
        (("--tasks", name, "--seeds", "0"), "--seeds is 0"),
        (("--tasks", name, "--limit", "0"), "--limit is 0"),
        (("--tasks", "mixlm_gsm8k", "--data", "nowhere"), "there is no folder nowhere"),
        (("--tasks", name, "--temperature", "0"), "use --method greedy"),
    ):
        code, out, err = run("eval", *TOYS, *arguments)
        assert (code, out) == (2, ""), err
        assert said in err
        assert len(err.splitlines()) == 2
