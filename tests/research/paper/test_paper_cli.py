"""`mixlm paper`, from end to end, on toys."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from research.paper import NAMES, Experiment, make
from research.paper.experiments import TASKS, grid

SMALL = ("--quick", "--limit", "2")


def load(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reduced sizes are smaller still."""

    def shorter(name: str, *, quick: bool) -> Experiment:
        experiment = make(name, quick=quick)
        lambdas = (0.0, 1.0) if experiment.lambdas else ()
        return replace(experiment, tokens=4, repeats=1, max_tokens=3, lambdas=lambdas) if quick else experiment

    monkeypatch.setattr("research.paper.make", shorter)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table2", "table3"])
def test_tables_of_accuracy(run, toys, questions, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    code, text, err = run(name, "-e", toys, *SMALL, "--top-k", "5,10", "--data", questions, "--out", str(out))
    assert code == 0, err
    findings = load(out, name)
    assert text == (out / f"{name}.md").read_text()
    assert findings["reduced"] == "reduced: 2 questions a task, 2 seeds, completions of at most 3 tokens"
    assert len(findings["accuracies"]) == 2 * 4 * (2 + 2)
    assert {accuracy["method"] for accuracy in findings["accuracies"]} == {
        "mixture",
        "conventional",
        "single:toy:1",
        "single:toy:2",
    }
    assert {difference["top_k"] for difference in findings["differences"]} == {5, 10}
    assert len(findings["differences"]) == 2 * 4
    assert findings["settings"]["ensembles"]["toy:1 + toy:2"]["weights"] == [[0.75, 0.25]]
    assert findings["environment"]["versions"]["mixlm"]
    assert "**Reduced: 2 questions a task, 2 seeds" in text
    assert "ARC (challenge)" in text
    assert "written to" in err


@pytest.mark.slow
def test_weights_are_searched(run, toys, questions, tmp_path: Path) -> None:
    arguments = ("-e", toys, "--quick", "--limit", "1", "--seeds", "1", "--tasks", "mixlm_mmlu", "--data", questions)
    code, text, err = run("table3", *arguments, "--search", "--out", "out")
    assert code == 0, err
    findings = load(tmp_path / "out", "table3")
    (weights,) = {tuple(accuracy["weights"]) for accuracy in findings["accuracies"] if accuracy["weights"]}
    assert sum(weights) == pytest.approx(1)
    assert findings["settings"]["ensembles"]["toy:1 + toy:2"]["weights"] == "searched"
    assert "are the best of 9 weights" in text
    assert findings["accuracies"][-1]["seeds"]
    assert err.count("weights 0.1 0.9") >= 1


def test_the_grid_of_weights() -> None:
    assert list(grid(2))[:2] == [(0.1, 0.9), (0.2, 0.8)]
    three = list(grid(3))
    assert len(three) == len(set(three)) == 36
    assert all(abs(sum(weights) - 1) < 1e-12 and min(weights) > 0 for weights in three)


@pytest.mark.slow
def test_a_table_of_speed(run, toys, tmp_path: Path) -> None:
    code, text, err = run("table4", "-e", toys, "--quick")
    assert code == 0, err
    findings = load(tmp_path / "paper-results" / "table4", "table4")
    (speed,) = findings["speeds"]
    assert speed["mixture"] > 0
    assert speed["parallel"] is None
    assert list(speed["single"]) == ["toy:1", "toy:2"]
    assert "CE (parallel) was not measured" in text
    assert findings["reduced"] == "reduced: 1 speed run of 4 tokens"


@pytest.mark.slow
def test_members_on_devices_of_their_own(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixlm import loading

    whole, seen = loading.load_engine, []

    def placed(spec):
        engine = whole(spec)
        engine.device = spec.device
        seen.append(spec.device)
        return engine

    monkeypatch.setitem(loading.load_config.__kwdefaults__, "load_engine", placed)
    path = tmp_path / "apart.toml"
    path.write_text('[[members]]\nmodel = "toy:1"\ndevice = "a"\n[[members]]\nmodel = "toy:2"\ndevice = "b"\n')
    code, text, err = run("table4", "-e", str(path), "--quick")
    assert code == 0, err
    assert seen == ["a", "a", "a", "b"]
    assert load(tmp_path / "paper-results" / "table4", "table4")["speeds"][0]["parallel"] > 0
    assert "not measured" not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["figure2", "figure4"])
def test_figures_against_lambda(run, toys, questions, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    code, text, err = run(name, "-e", toys, *SMALL, "--data", questions, "--out", str(out))
    assert code == 0, err
    findings = load(out, name)
    methods = 1 if name == "figure2" else 2
    assert [method["weights"] for method in findings["accuracies"][::methods]] == [[0.0, 1.0], [1.0, 0.0]]
    assert len(findings["speeds"]) == (2 if name == "figure2" else 0)
    assert len(findings["differences"]) == (0 if name == "figure2" else 2)
    assert "λ in 2 steps" in text
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / f"{name}.svg").read_text()


@pytest.mark.slow
def test_a_figure_by_device_takes_results_of_other_machines(run, toys, tmp_path: Path) -> None:
    assert run("figure3", "-e", toys, "--quick", "--out", "here")[0] == 0
    other = load(tmp_path / "here", "figure3")
    other["speeds"][0]["machine"] = "another machine"
    (tmp_path / "other.json").write_text(json.dumps(other))
    code, text, err = run("figure3", "-e", toys, "--quick", "--out", "here", "--add", "other.json")
    assert code == 0, err
    assert len(load(tmp_path / "here", "figure3")["speeds"]) == 2
    assert "On another machine" in text
    assert "another machine: reduced: 1 speed run" in text


@pytest.mark.slow
def test_finished_runs_are_not_run_again(run, toys, questions, monkeypatch: pytest.MonkeyPatch) -> None:
    from research.paper import running

    first = run("table2", "-e", toys, *SMALL, "--data", questions)
    speed = run("table4", "-e", toys, "--quick")
    assert (first[0], speed[0]) == (0, 0)
    assert "finished before" not in first[2] + speed[2]

    def refuse(self, config):
        raise AssertionError("a model was loaded")

    with monkeypatch.context() as patched:
        patched.setattr(running.EnsembleCache, "get", refuse)
        again = run("table2", "-e", toys, *SMALL, "--data", questions)
        assert again[:2] == first[:2]
        assert again[2].count("finished before") == 3
        assert run("table4", "-e", toys, "--quick")[1] == speed[1]
    more = run("table2", "-e", toys, *SMALL, "--data", questions, "--seeds", "3")
    assert more[0] == 0
    assert "finished before" not in more[2]


@pytest.mark.slow
def test_a_run_that_is_not_whole_is_run_again(run, toys, tmp_path: Path) -> None:
    assert run("table4", "-e", toys, "--quick")[0] == 0
    path = tmp_path / "paper-results" / "table4" / "runs.jsonl"
    path.write_text(path.read_text()[:-40])
    code, _, err = run("table4", "-e", toys, "--quick")
    assert code == 0
    assert "finished before" not in err
    json.loads(path.read_text())


@pytest.mark.slow
def test_json_in_place_of_markdown(run, toys) -> None:
    assert json.loads(run("table4", "-e", toys, "--quick", "--json")[1])["experiment"] == "table4"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tabel2",), "did you mean 'table2'"),
        (("nothing",), "there are table2, table3"),
        (("table2", "--top-k", "x"), "--top-k is 'x'"),
        (("table2", "--seeds", "0"), "seeds is 0"),
        (("table2", "--limit", "0"), "limit is 0"),
        (("table2", "--tasks", ","), "--tasks names nothing"),
        (("table2", "-e", "{toys}", "--tasks", "mixlm_gsm8"), "did you mean 'mixlm_gsm8k'"),
        (("table2", "-e", "{toys}", "--data", "nowhere"), "there is no folder nowhere"),
        (("table4", "--seeds", "3"), "measures speed alone"),
        (("table4", "--add", "x.json"), "only figure3"),
        (("table4", "--search"), "no weights to search"),
        (("table2", "-e", "{one}", "--search"), "is one member"),
        (("figure3", "--add", "x.json"), "x.json cannot be read"),
        (("figure4", "-e", "{one}"), "give two"),
        (("table4", "-e", "{toys}", "-e", "{other}"), "both called toy:1 + toy:2"),
        (("table4", "-e", "toy.toml"), "did you mean 'toys.toml'"),
    ],
)
def test_refusals_are_one_sentence_and_a_hint(run, toys, tmp_path: Path, arguments, said) -> None:
    first, other = tmp_path / "one.toml", tmp_path / "other.toml"
    first.write_text('[[members]]\nmodel = "toy:1"\n')
    other.write_text('[[members]]\nmodel = "toy:1"\n[[members]]\nmodel = "toy:2"\n')
    names = {"toys": toys, "one": str(first), "other": str(other)}
    code, out, err = run(*(argument.format(**names) for argument in arguments))
    assert (code, out) == (2, ""), err
    assert said in err
    assert len(err.splitlines()) <= 3


def test_the_papers_settings_are_the_default() -> None:
    for name in NAMES:
        experiment = make(name)
        assert experiment.reduced is None
        assert all(lineup.published for lineup in experiment.lineups)
        assert "reduced: " in str(make(name, quick=True).reduced)
    table = make("table2")
    assert (table.tasks, table.top_k, table.seeds, table.limit) == (TASKS, (5, 10), 5, None)
    assert table.lineups[0].config.members[0].model == "Qwen/Qwen2.5-3B-Instruct"
    assert [len(lineup.names) for lineup in make("table4").lineups] == [2, 2, 3, 3]
    assert make("figure2").weights(make("figure2").lineups[0])[1] == (0.1, 0.9)
    assert make("figure2", quick=True).lineups[0].names == ("gemma-3-270m", "smollm2-135m")


def test_the_papers_models_get_its_names() -> None:
    from mixlm.config import EnsembleConfig, MemberConfig
    from research.paper import lineup

    models = ("models/Nous-Hermes-2-Mistral-7B-DPO", "openchat/openchat-3.5-0106")
    result = lineup(EnsembleConfig(members=tuple(MemberConfig(model=model) for model in models)))
    assert result.names == ("Nous-Hermes", "Openchat")
    assert result.published == ("Openchat", "Nous-Hermes")
    twice = lineup(EnsembleConfig(members=(MemberConfig(model="toy:1"), MemberConfig(model="toy:1"))))
    assert twice.names == ("toy:1", "toy:1-2")
    assert twice.published is None
