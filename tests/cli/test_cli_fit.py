"""`mixlm fit`: the report, the files it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programs import TOYS, Run

from mixlm.config import read_config
from mixlm.engines.toy import ToySession
from mixlm.fitting.likelihood import expectation_maximisation
from mixlm.loading import load
from mixlm.routing.gate_router import load_router
from mixlm.scoring.score import score, score_answers
from mixlm.scoring.scores import split_holdout

WORDS = " the river sings and one bird falls under two stone light of the tree turns to cloud over"
FAST = ("--bootstrap", "10")


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A text of words, and one of questions and answers; the folder they lie in is the current one."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    words = WORDS.split(" ")[1:]
    (tmp_path / "words.txt").write_text("".join(f" {word}" for word in rng.choice(words, 120)))
    lines = [{"prompt": f"What is {i}?", "answer": f" {rng.choice(words)} {i}"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return ["words.txt", "pairs.jsonl"]


def test_json_says_what_was_found(run: Run, texts: list[str]) -> None:
    done = run("fit", *texts, *TOYS, *FAST, "--json", "--grid", "--router", "router.json", "-w", "0.2,0.8")
    assert (done.code, done.err) == (0, "router written to router.json\n")
    report = json.loads(done.out)
    assert set(report) == {
        "members", "unit", "files", "weights", "intervals", "em", "by_prompt", "grid", "router", "check",
        "pays", "engines",
    }  # fmt: skip
    assert report["members"] == ["toy:1", "toy:2"]
    assert report["unit"] == "token"
    assert [entry["file"] for entry in report["files"]] == texts
    assert sum(report["weights"].values()) == pytest.approx(1)
    for name, (low, high) in report["intervals"].items():
        assert 0 <= low <= report["weights"][name] <= high <= 1
    assert report["em"]["end_bits_per_byte"] <= report["em"]["start_bits_per_byte"]
    assert report["em"]["end_bits_per_byte"] <= report["grid"]["bits_per_byte"] + 1e-9
    assert report["grid"]["points"] == 11
    assert report["grid"]["readings_anew"] == 11 * report["em"]["readings"]
    rows = {row["name"]: row for row in report["check"]["rows"]}
    assert list(rows) == [
        "toy:1", "toy:2", "equal weights", "weights as given", "EM", "grid", "EM, each file by itself",
        f"by prompt, sharpness {report['by_prompt']['sharpness']:g}", "router",
    ]  # fmt: skip
    best = rows[report["check"]["best_member"]]
    assert report["pays"] == (rows["EM"]["bits_per_byte"] < best["bits_per_byte"])
    assert report["engines"] == {"toy:1": "toy", "toy:2": "toy"}
    assert best["percent_below_best_member"] == 0
    for row in rows.values():
        assert set(row["files"]) == set(texts)
        assert row["percent_below_best_member"] == pytest.approx(
            100 * (1 - row["bits_per_byte"] / best["bits_per_byte"])
        )


def test_a_mixture_that_does_not_pay_says_so(run: Run, texts: list[str]) -> None:
    """Two members that are one model cannot be better together."""
    alike = ("-m", "toy:1", "-m", "toy:1")
    done = run("fit", "words.txt", *alike, *FAST)
    assert done.code == 0
    assert "The fitted mixture is not better than toy:1 alone on text that it was not fitted to" in done.out
    assert json.loads(run("fit", "words.txt", *alike, *FAST, "--json").out)["pays"] is False
    assert "better than every member here" in run("fit", "words.txt", *TOYS, *FAST).out
    assert "Nothing was held out" in run("fit", "words.txt", *TOYS, *FAST, "--holdout", "0").out


def test_files_are_overwritten_with_force_alone(run: Run, texts: list[str]) -> None:
    for option in ("--output", "--router"):
        file = Path(f"kept{option}.toml")
        file.write_text("mine")
        assert f"{option} {file} exists" in run("fit", "words.txt", *TOYS, *FAST, option, str(file)).error
        assert file.read_text() == "mine"
        assert run("fit", "words.txt", *TOYS, *FAST, option, str(file), "--force").code == 0
        assert file.read_text() != "mine"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--output", "both", "--router", "both"), "--output and --router both write both"),
        (("--output", "words.txt", "--force"), "--output words.txt is a text to fit to"),
        (("--router", "./words.txt"), "--router words.txt is a text to fit to"),
        (("--output", "-"), "--output - cannot be written: standard output is for the report"),
        (("--force",), "--force is given, and no file is written"),
    ],
)
def test_files_that_would_be_lost_are_refused(
    run: Run, texts: list[str], options: tuple[str, ...], reason: str
) -> None:
    before = Path(texts[0]).read_bytes()
    assert reason in run("fit", "words.txt", *TOYS, *FAST, *options).error
    assert Path(texts[0]).read_bytes() == before


@pytest.mark.parametrize(
    "options", [("--features", "top_k"), ("--gate", "mlp"), ("--rule", "defer")], ids=lambda options: options[1]
)
def test_numbers_of_a_gate_do_not_replace_a_file_that_was_not_named(
    run: Run, texts: list[str], options: tuple[str, ...]
) -> None:
    weights = Path("model.safetensors")
    weights.write_text("of a model")
    said = run("fit", "words.txt", *TOYS, "--router", "model.json", *options).error
    assert "--router's numbers model.safetensors exists" in said
    assert weights.read_text() == "of a model"


def test_the_weights_are_those_of_the_training_part(run: Run, texts: list[str]) -> None:
    report = json.loads(run("fit", "words.txt", *TOYS, *FAST, "--json", "--holdout", "0.25").out)
    scores = score(load("toy:1", "toy:2"), Path("words.txt").read_text())
    train, check = split_holdout(scores, 0.25)
    weights = expectation_maximisation(train).weights
    assert list(report["weights"].values()) == pytest.approx(weights)
    row = next(item for item in report["check"]["rows"] if item["name"] == "EM")
    assert row["bits_per_byte"] == pytest.approx(check.bits_per_byte(check.mixture(weights)))
    whole = json.loads(run("fit", "words.txt", *TOYS, *FAST, "--json", "--holdout", "0").out)
    assert whole["check"]["held_out"] is False
    assert list(whole["weights"].values()) == pytest.approx(expectation_maximisation(scores).weights)


@pytest.mark.slow
def test_answers_are_fitted_behind_their_prompts(run: Run, texts: list[str]) -> None:
    pairs = [json.loads(line) for line in Path("pairs.jsonl").read_text().split("\n") if line]
    ensemble = load("toy:1", "toy:2")
    for system in (None, "Be brief."):
        settings = ensemble.settings(system=system)
        scores = score_answers(ensemble, [(pair["prompt"], pair["answer"]) for pair in pairs], settings=settings)
        more = () if system is None else ("--system", system)
        report = json.loads(run("fit", "pairs.jsonl", *TOYS, *FAST, "--json", "--holdout", "0", *more).out)
        assert report["files"][0]["train_bytes"] == sum(len(pair["answer"]) for pair in pairs)
        assert list(report["weights"].values()) == pytest.approx(expectation_maximisation(scores).weights)


def test_the_end_of_an_answer_is_fitted_too_where_members_end_themselves(run: Run, texts: list[str]) -> None:
    pairs = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines() if line]
    pairs = [(pair["prompt"], pair["answer"]) for pair in pairs]
    arguments = ("fit", "pairs.jsonl", *TOYS, *FAST, "--json", "--holdout", "0")
    for option, ends in ((), True), (("--ends",), True), (("--no-ends",), False):
        expected = expectation_maximisation(score_answers(load("toy:1", "toy:2"), pairs, ends=ends)).weights
        assert list(json.loads(run(*arguments, *option).out)["weights"].values()) == pytest.approx(expected)


def test_weights_by_prompt_are_compared_where_there_are_prompts(run: Run, texts: list[str]) -> None:
    report = json.loads(run("fit", *texts, *TOYS, *FAST, "--json", "--prompt-bytes", "100").out)
    assert report["by_prompt"]["sharpness"] >= 0
    (name,) = (row["name"] for row in report["check"]["rows"] if row["name"].startswith("by prompt"))
    assert name == f"by prompt, sharpness {report['by_prompt']['sharpness']:g}"
    plain = json.loads(run("fit", "words.txt", *TOYS, *FAST, "--json").out)
    assert plain["by_prompt"] is None
    assert not any(row["name"].startswith("by prompt") for row in plain["check"]["rows"])
    sizes = [sum(item["files"][0][key] for key in ("train_bytes", "check_bytes")) for item in (plain, report)]
    assert 80 <= sizes[0] - sizes[1] <= 100


def test_the_report_says_all_that_matters(run: Run, texts: list[str]) -> None:
    done = run("fit", *texts, *TOYS, *FAST, "--grid")
    assert done.code == 0
    for part in (
        "95 % interval", "Fitted by EM in", "bits per byte", "below best member", "words.txt", "pairs.jsonl",
        "equal weights", "held-out", "fitted to the other part", "The best single member is toy:",
        "its 11 points took", "evaluates every point with the models needs",
    ):  # fmt: skip
        assert part in done.out, part
    alone = run("fit", "words.txt", *TOYS, "--bootstrap", "0", "--holdout", "0").out
    assert "interval" not in alone
    assert "of the training text" in alone
    assert "grid" not in alone


def test_a_step_asks_for_a_grid(run: Run, texts: list[str]) -> None:
    report = json.loads(run("fit", "words.txt", *TOYS, *FAST, "--step", "0.25", "--json").out)
    assert report["grid"]["points"] == 5
    assert json.loads(run("fit", "words.txt", *TOYS, *FAST, "--json").out)["grid"] is None


def test_the_ensemble_file_has_the_weights(run: Run, texts: list[str]) -> None:
    done = run("fit", "words.txt", *TOYS, *FAST, "--json", "--output", "pair.toml")
    assert "ensemble written to pair.toml: use it with -e pair.toml" in done.err
    config = read_config("pair.toml")
    weights = list(json.loads(done.out)["weights"].values())
    assert [member.model for member in config.members] == ["toy:1", "toy:2"]
    assert config.weights() == pytest.approx(weights, abs=1e-6)
    assert config.router.kind == "fixed"
    assert run("generate", "hello", "-e", "pair.toml", "--seed", "1").code == 0


def test_the_ensemble_file_finds_the_router_from_another_folder(
    run: Run, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("out", "gates"):
        (tmp_path / name).mkdir()
    done = run("fit", *texts, *TOYS, *FAST, "--output", "out/pair.toml", "--router", "gates/r.json", "--json")
    assert done.code == 0
    assert 'file = "../gates/r.json"' in Path("out/pair.toml").read_text()
    monkeypatch.chdir("/")
    config = read_config(tmp_path / "out" / "pair.toml")
    assert load_router(str(config.router.file)).names == ("toy:1", "toy:2")
    assert run("generate", "hello", "-e", str(tmp_path / "out" / "pair.toml"), "--seed", "1").code == 0


def test_what_an_ensemble_file_says_is_kept(run: Run, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    Path("pair.toml").write_text(
        'unit = "piece"\nsystem = "Be kind."\n[sampling]\ntop_k = 7\n[router]\nkind = "prompt"\n'
        '[[members]]\nmodel = "toy:1"\nname = "first"\nweight = 1\ntemplate_file = "chat.jinja"\n'
        '[[members]]\nmodel = "toy:2"\nweight = 3\nsampling.temperature = 0.5\n'
    )
    done = run("fit", "words.txt", "-e", "pair.toml", *FAST, "--output", "fitted.toml", "--json")
    assert done.code == 0
    rows = [row["name"] for row in json.loads(done.out)["check"]["rows"]]
    assert "weights as given" in rows
    config = read_config("fitted.toml")
    assert (config.unit, config.system, config.sampling.top_k) == ("piece", "Be kind.", 7)
    assert config.members[0].name == "first"
    assert config.members[0].template == "{{ messages[0].content }}"
    assert config.members[1].sampling.temperature == 0.5
    # The weights that were fitted are those of every state, so no router of before stands beside them.
    assert config.router.kind == "fixed"


def test_a_second_fit_reads_nothing(run: Run, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = json.loads(run("fit", *texts, *TOYS, *FAST, "--json").out)

    def fail(*_: Any) -> None:
        raise RuntimeError("it was read")

    monkeypatch.setattr(ToySession, "forward", fail)
    again = json.loads(run("fit", *texts, *TOYS, *FAST, "--json").out)
    assert again["weights"] == first["weights"]
    assert again["check"] == first["check"]
    assert "it was read" in run("fit", *texts, *TOYS, *FAST, "--no-cache").err


@pytest.mark.parametrize("options", [(), ("--unit", "token", "--rule", "defer", "--router", "gate.json")], ids=len)
def test_models_are_identified_once_they_are_loaded(
    run: Run, texts: list[str], monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.setattr("mixlm.scoring.score.identity", lambda *_: pytest.fail("their files were read"))
    monkeypatch.setattr("mixlm.loading.load_config", lambda *_, **__: pytest.fail("they were loaded"))
    with pytest.raises(pytest.fail.Exception, match="they were loaded"):
        run("fit", texts[0], *TOYS, *options)


def test_an_ensemble_of_scores_and_fit_agree(run: Run, texts: list[str]) -> None:
    fitted = json.loads(run("fit", "words.txt", *TOYS, *FAST, "--holdout", "0", "--output", "pair.toml", "--json").out)
    scored = json.loads(run("score", "words.txt", "-e", "pair.toml", "--json").out)
    assert scored["bits_per_byte"]["mixture"] == pytest.approx(fitted["em"]["end_bits_per_byte"], abs=1e-6)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"prompt": "x"}', '"answer" is missing or not a string'),
        ('{"answer": "x"}', '"prompt" is missing or not a string'),
        ('{"prompt": 3, "answer": "x"}', '"prompt" is missing or not a string'),
        ('{"prompt": "x", "answer": " "}', '"answer" is empty'),
    ],
)
def test_a_line_of_the_wrong_form_is_named(run: Run, tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n\n' + line + "\n")
    done = run("fit", str(path), *TOYS)
    assert done.code == 2
    assert f"{path}, line 3: {reason}" in done.error
    assert 'each line must be an object {"prompt": "…", "answer": "…"}' in done.error


def test_ends_of_lines_inside_a_string_are_no_ends_of_lines(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a\u2028b", "answer": "c\x85d the river"}\r\n', encoding="utf-8")
    assert run("fit", str(path), *TOYS, *FAST).code == 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("missing argument 'FILE'", "mixlm fit --help")),
        (("word.txt",), ("there is no file word.txt", "did you mean 'words.txt'?")),
        (("words.txt", "words.txt"), ("given twice",)),
        (("words.txt", "--holdout", "1"), ("--holdout is 1", "less than 1")),
        (("words.txt", "--holdout", "-0.5"), ("--holdout is -0.5",)),
        (("words.txt", "--holdout", "nan"), ("--holdout is nan",)),
        (("words.txt", "--bootstrap", "-1"), ("--bootstrap is -1", "0 or more")),
        (("words.txt", "--step", "0.3"), ("the grid's step is 0.3", "0.1 or 0.05")),
        (("words.txt", "--step", "0"), ("the grid's step is 0",)),
        (("words.txt", "--output", "no/pair.toml"), ("--output no/pair.toml cannot be written", "no folder")),
        (("words.txt", "--router", "."), ("--router . cannot be written: it is a folder",)),
        (("words.txt", "--temperature", "0.5"), ("mixlm fit does not use --temperature",)),
        (("words.txt", "--system", "x"), ("--system applies to prompts", ".jsonl")),
    ],
)
def test_what_cannot_be_fitted(
    run: Run,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:
    monkeypatch.setattr("mixlm.loading.load_config", lambda *_, **__: pytest.fail("it was loaded"))
    done = run("fit", *arguments, *TOYS)
    assert done.code == 2
    for part in parts:
        assert part in done.error


def test_one_member_is_nothing_to_fit(run: Run, texts: list[str]) -> None:
    assert "nothing to fit" in run("fit", "words.txt", "-m", "toy:1").error


def test_a_text_that_cannot_be_read_is_named(run: Run, texts: list[str]) -> None:
    Path("long.jsonl").write_text(json.dumps({"prompt": "x" * 5000, "answer": "y"}) + "\n")
    done = run("fit", "words.txt", "long.jsonl", *TOYS)
    assert done.code == 2
    assert "long.jsonl: the prompt has" in done.error


def test_a_text_of_one_segment_cannot_be_halved(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    done = run("fit", str(tmp_path / "a.txt"), *TOYS)
    assert "single segment" in done.error


def test_help(run: Run) -> None:
    done = run("fit", "--help")
    assert done.code == 0
    for option in ("--output", "--router", "--grid", "--step", "--holdout", "--bootstrap", "--json", "--no-cache"):
        assert option in done.out


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["linear", "mlp"])
def test_a_router_that_observes_a_member_is_trained_written_and_used(
    run: Run, texts: list[str], gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixlm.fitting.gate_trainer._ITERATIONS", 3)
    options = ("--router", "gate.json", "--features", "all", "--gate", gate, "--observe", "toy:2")
    done = run("fit", *texts, *TOYS, *FAST, *options, "--output", "pair.toml", "--json")
    assert done.code == 0, done.err
    assert "router written to gate.json, its numbers to gate.safetensors; it needs the engine hf for toy:2" in done.err
    rows = [row["name"] for row in json.loads(done.out)["check"]["rows"]]
    assert rows[-1] == "router"
    assert json.loads(Path("gate.json").read_text())["observes"]["member"] == "toy:2"
    written = [run("generate", "hello", "-e", "pair.toml", "--seed", "1", "--method", method, "--max-tokens", "8")
               for method in ("mixture", "speculative")]  # fmt: skip
    assert written[0].code == 0, written[0].err
    assert written[0].out == written[1].out
    scored = run("score", "words.txt", "-e", "pair.toml", "--json")
    assert scored.code == 0, scored.err
    assert json.loads(scored.out)["bits_per_byte"]["mixture"] > 0
    seen = run("inspect", "-e", "pair.toml", "--no-measure")
    assert "the router looks at text, top_k and hidden" in seen.out.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--features", "all"), "--features is of a router, and none is trained"),
        (("--router", "r.json", "--gate", "deep"), "--gate"),
        (("--router", "r.json", "--features", "colour"), "--features"),
        (("--router", "r.json", "--observe", "toy:1"), "--observe names a member, and the features are of the text"),
        (("--router", "r.json", "--features", "top_k", "--observe", "toy:9"), "'toy:9' is not a member"),
        (("--router", "r.safetensors", "--features", "top_k"), "--router is a .safetensors file"),
    ],
)
def test_options_of_a_router_that_mean_nothing_are_refused(
    run: Run, texts: list[str], options: tuple[str, ...], message: str
) -> None:
    done = run("fit", *texts, *TOYS, *FAST, *options)
    assert done.code == 2
    assert message in done.err
