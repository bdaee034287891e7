"""Whole evaluations: the three kinds of task, seeds, and runs that stop and go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_tasks import QUESTIONS, toys

from mixlm.core.combinations import COMBINATIONS, Combination, combination
from mixlm.core.combinations.defer import Defer
from mixlm.core.combinations.log_linear import Geometric
from mixlm.core.options import GenerationOptions
from mixlm.core.rule_options import rule_name
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.evaluation import evaluate
from mixlm.evaluation.run import describe
from mixlm.evaluation.run_folder import response_log
from mixlm.resumable_log import ResumableLog
from mixlm.routing import PromptRouter
from mixlm.types import Tool

METHODS = ("mixture", "conventional", "single")


@pytest.mark.slow
@pytest.mark.parametrize("piece", [False, True])
def test_text_is_written_by_every_method_and_seed(task, piece: bool) -> None:
    seen: list[tuple[str, int, int]] = []
    results = evaluate(
        toys(piece=piece),
        [task("generate")],
        methods=METHODS,
        seeds=[0, 1, 2],
        progress=lambda *event: seen.append(event),
    )
    assert results.methods == ("mixture", "conventional", "single:toy0", "single:toy1")
    score = results.score("generate", "mixture")
    assert (score.metric, score.seeds, score.count, score.higher_is_better) == ("exact_match", (0, 1, 2), 5, True)
    assert score.questions is not None
    assert score.questions.shape == (3, 5)
    assert ("generate mixture seed 2", 5, 5) in seen
    assert [comparison.right for comparison in results.comparisons()] == ["conventional", "single:toy0", "single:toy1"]
    json.dumps(results.as_dict(questions=True))


def texts(folder: Path, method: str = "mixture", seed: int = 0) -> list[str]:
    lines = (folder / "generate" / method / f"seed-{seed}.jsonl").read_text().splitlines()
    return [line["response"] for line in sorted(map(json.loads, lines), key=lambda line: line["index"])]


@pytest.mark.slow
def test_seeds_differ_and_are_reproducible(task, tmp_path: Path) -> None:
    name = task("generate")
    for out in ("a", "b"):
        evaluate(toys(), [name], methods=["mixture"], seeds=[0, 1], out=tmp_path / out)
    assert texts(tmp_path / "a") == texts(tmp_path / "b")
    assert texts(tmp_path / "a", seed=1) == texts(tmp_path / "b", seed=1)
    assert texts(tmp_path / "a") != texts(tmp_path / "a", seed=1)
    evaluate(toys(), [name], methods=["mixture"], seeds=[1], limit=2, out=tmp_path / "c")
    assert texts(tmp_path / "c", seed=1) == texts(tmp_path / "a", seed=1)[:2]


def test_choices_and_given_text_run_once_for_all_that_share_a_distribution(task, tmp_path: Path) -> None:
    ensemble = toys()
    results = evaluate(ensemble, [task("choice"), task("rolling")], methods=METHODS, seeds=[3, 4], out=tmp_path)
    for name in ("choice", "rolling"):
        assert results.score(name, "mixture").values == results.score(name, "conventional").values
        assert results.score(name, "mixture").seeds == (3,)
        assert {path.name for path in (tmp_path / name).iterdir()} == {"mixture", "single%3Atoy0", "single%3Atoy1"}
    assert results.score("choice", "mixture").metric == "acc"
    from mixlm.scoring.score import score

    bits = sum(-score(ensemble, question).mixture(ensemble.weights).sum() for question in QUESTIONS) / np.log(2)
    assert results.score("rolling", "mixture").mean == pytest.approx(
        bits / sum(len(question) for question in QUESTIONS)
    )
    assert [comparison.task for comparison in results.comparisons()] == ["choice"] * 3


def test_greedy_tasks_run_once_unless_a_temperature_is_given(task) -> None:
    name = task("greedy")
    results = evaluate(toys(), [name], methods=["mixture", "conventional", "single:toy0"], seeds=[0, 1])
    assert results.score("greedy", "mixture").seeds == (0,)
    assert [note.split(",")[0] for note in results.notes] == ["greedy asks for greedy decoding"] * 2
    sampled = evaluate(toys(), [name], methods=["mixture"], seeds=[0, 1], options={"temperature": 1.0})
    assert sampled.score("greedy", "mixture").seeds == (0, 1)
    assert sampled.notes == ()


def test_questions_are_put_in_templates_or_as_they_are(task, tmp_path: Path) -> None:
    def prompts(folder: Path) -> list[object]:
        lines = next(folder.glob("*/mixture/*.jsonl")).read_text().splitlines()
        return [json.loads(line)["prompt"] for line in lines]

    evaluate(toys(), [task("generate")], methods=["mixture"], seeds=[0], limit=1, out=tmp_path / "a")
    assert prompts(tmp_path / "a") == [[{"role": "user", "content": QUESTIONS[0]}]]
    plan = {"methods": ["mixture"], "seeds": [0], "limit": 1}
    raw = evaluate(toys(), [task("generate")], **plan, chat=False, out=tmp_path / "b", options={"system": "be brief"})
    assert prompts(tmp_path / "b") == [QUESTIONS[0]]
    assert raw.notes == ("generate puts its questions as plain text, without the system text",)
    evaluate(toys(), [task("choice")], **plan, chat=True, out=tmp_path / "c")
    assert prompts(tmp_path / "c")[0] == [{"role": "user", "content": QUESTIONS[0]}]


class StopError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("torn", [False, True])
def test_a_run_that_stopped_goes_on(task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool) -> None:
    name = task("generate")
    plan = {"methods": ["mixture", "conventional"], "seeds": [0, 1]}
    whole = evaluate(toys(), [name], **plan, out=tmp_path / "whole")
    written: list[tuple[str, int]] = []
    add = ResumableLog.add

    def counting(self: ResumableLog, index: int, key: str, fields: dict[str, Any]) -> None:
        if len(written) == 8 and not stopped:
            stopped.append(True)
            raise StopError
        written.append((str(self._path), index))
        add(self, index, key, fields)

    stopped: list[bool] = []
    monkeypatch.setattr(ResumableLog, "add", counting)
    out = tmp_path / "out"
    with pytest.raises(StopError):
        evaluate(toys(), [name], **plan, out=out)
    if torn:
        path = out / "generate" / "mixture" / "seed-1.jsonl"
        with path.open("a") as file:
            file.write('{"index": 4, "resp')
    again = evaluate(toys(), [name], **plan, out=out)
    assert len(written) == len(set(written)) == 20
    assert again.as_dict(questions=True) == whole.as_dict(questions=True)
    for method in plan["methods"]:
        for seed in plan["seeds"]:
            assert texts(out, method, seed) == texts(tmp_path / "whole", method, seed)
    evaluate(toys(), [name], **plan, out=out)
    assert len(written) == 20
    more = evaluate(toys(), [name], methods=["mixture"], seeds=[0, 2], out=out)
    assert len(written) == 25
    assert more.score("generate", "mixture").values[0] == whole.score("generate", "mixture").values[0]
    assert json.loads((out / "results.json").read_text())["scores"][0]["values"]


@pytest.mark.slow
def test_other_settings_are_refused_by_name(task, tmp_path: Path) -> None:
    name = task("generate")
    plan = {"methods": ["mixture"], "seeds": [0], "out": tmp_path}
    evaluate(toys(), [name], **plan, options={"top_k": 5})
    with pytest.raises(ConfigError, match=r"was begun with options\.top_k = 5, and this run has 10"):
        evaluate(toys(), [name], **plan, options={"top_k": 10})
    with pytest.raises(ConfigError, match=r"members\.0\.weight = 0\.7, and this run has 0\.5"):
        evaluate(toys(weights=[1, 1]), [name], **plan, options={"top_k": 5})
    with pytest.raises(ConfigError, match=r"options\.max_tokens = nothing, and this run has 3"):
        evaluate(toys(), [name], **plan, options={"top_k": 5, "max_tokens": 3})
    with pytest.raises(
        ConfigError, match=r"was begun with router = \"FixedRouter .*, and this run has \"PromptRouter "
    ):
        evaluate(toys(router=PromptRouter(np.array([0.7, 0.3]))), [name], **plan, options={"top_k": 5})
    with pytest.raises(ConfigError, match=r"options\.system = nothing, and this run has null"):
        evaluate(toys(), [name], **plan, options={"top_k": 5, "system": None})
    path = tmp_path / "generate.yaml"
    path.write_text(path.read_text().replace("max_gen_toks: 6", "max_gen_toks: 7"))
    with pytest.raises(ConfigError, match=r"seed-0\.jsonl: index 0 is of another request"):
        evaluate(toys(), [name], **plan, options={"top_k": 5})


def test_a_line_that_is_no_answer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    log = response_log(path)
    log.add(0, "a", {"response": "b"})
    path.write_text(path.read_text() + '{"index": 1}\n')
    with pytest.raises(ConfigError, match=r"x\.jsonl, line 2: expected a JSON object with index"):
        response_log(path)


def test_a_folder_that_cannot_be_used_is_named(task, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="answers cannot be kept in"):
        evaluate(toys(), [task("generate")], out=tmp_path / "file")


def test_what_does_not_fit_is_said_before_anything_runs(task) -> None:
    name = task("generate")
    with pytest.raises(ConfigError, match=r"no method 'mixtur' \(did you mean 'mixture'"):
        evaluate(toys(), [name], methods=["mixtur"])
    with pytest.raises(ConfigError, match=r"no method 'single:toy9' \(did you mean"):
        evaluate(toys(), [name], methods=["single:toy9"])
    with pytest.raises(ConfigError, match="limit is 0"):
        evaluate(toys(), [name], limit=0)
    with pytest.raises(ConfigError, match="each once"):
        evaluate(toys(), [name], seeds=[1, 1])
    with pytest.raises(ConfigError, match="seed is no option"):
        evaluate(toys(), [name], options={"seed": 1})
    with pytest.raises(ConfigError, match="top_k is -1"):
        evaluate(toys(), [name], options={"top_k": -1})
    with pytest.raises(UnsupportedError, match="temperature is 0"):
        evaluate(toys(), [name], options={"temperature": 0.0})
    with pytest.raises(UnsupportedError, match="the rule is mean-then-truncate"):
        evaluate(toys(), [name], methods=["mixture"], options={"mix_then_truncate": True})
    begun: list[object] = []
    plan = {"methods": ["layered"], "options": {"rule": "gac"}, "progress": lambda *event: begun.append(event)}
    with pytest.raises(UnsupportedError, match="rule gac combines tokens as they are spelled"):
        evaluate(toys(piece=True), [name, task("choice")], **plan)
    greedy = Path(task("greedy"))
    greedy.write_text(greedy.read_text().replace("max_gen_toks", "beams: 3, max_gen_toks"))
    with pytest.raises(ConfigError, match="the task has the generation option 'beams'"):
        evaluate(toys(), [name, str(greedy)], **plan)
    assert begun == []


@pytest.mark.parametrize("options", [{"rule": "max"}, {"mix_then_truncate": True, "top_k": 3}])
def test_a_rule_of_the_options_has_its_default_methods_and_members_alone_have_none(task, options) -> None:
    plan = {"seeds": [0], "limit": 1}
    results = evaluate(toys(), [task("generate")], options=options, **plan)
    assert results.methods == ("layered", "conventional", "single:toy0", "single:toy1")
    rest = {name: value for name, value in options.items() if name == "top_k"}
    plain = evaluate(toys(), [task("generate")], methods=["single"], options=rest, **plan)
    assert results.score("generate", "single:toy0").values == plain.score("generate", "single:toy0").values
    ruled = toys(defaults=GenerationOptions(method="layered", rule="max"))
    average = evaluate(ruled, [task("generate")], options={"rule": "average"}, **plan)
    assert average.methods[0] == "mixture"


def mean_of(probs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights @ probs


OWN = (Geometric(2.0), mean_of, Combination.of(mean_of, name="mine"), Defer(accept=max))


@pytest.mark.parametrize("rule", [*map(combination, COMBINATIONS), *OWN], ids=rule_name)
def test_every_rule_is_described_in_settings(rule) -> None:
    ensemble = toys(defaults=GenerationOptions(method="layered", rule=rule, tools=(Tool("f"),)))
    settings = describe(ensemble, {"rule": rule, "tools": [Tool("f")], "stop": {"a"}, "top_k": np.int64(3)}, None)
    assert settings == json.loads(json.dumps(settings))
    assert settings["options"]["rule"]["name"] == rule_name(rule)
    assert settings["defaults"]["rule"] == settings["options"]["rule"]
    assert settings["options"]["top_k"] == 3


@pytest.mark.models
def test_the_demo_pair_answers_questions(demo_pair: Ensemble, tmp_path: Path, task) -> None:
    results = evaluate(
        demo_pair.with_weights([0.7, 0.3]),
        ["mixlm_rg_chain_sum", task("choice")],
        methods=["mixture", "single:smollm2-135m"],
        seeds=[0],
        limit=2,
        options={"max_tokens": 6, "top_k": 10},
        out=tmp_path / "out",
    )
    assert results.score("mixlm_rg_chain_sum", "mixture").count == 2
    assert results.score("choice", "mixture").metric == "acc"
    path = tmp_path / "out" / "mixlm_rg_chain_sum" / "mixture" / "seed-0.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(sum(entry["written_by"].values()) == entry["tokens"] for entry in entries)
