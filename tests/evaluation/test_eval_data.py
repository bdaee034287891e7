"""Questions from a folder: every task loads, choices are stable, and what is malformed is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluating import ROWS

from mixlm.errors import ConfigError, UnsupportedError
from mixlm.evaluation.catalog import load_tasks, own_tasks
from mixlm.evaluation.data import choose_questions, load
from mixlm.evaluation.judging import build_requests, judge

TARGETS = {"gsm8k": "1005", "svamp": "8", "mmlu": "B", "bbh": "}]", "arc_challenge": "B", "arc_easy": "A"}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of questions needs no network."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    return tmp_path


@pytest.mark.slow
def test_every_task_of_ours_loads_from_a_folder(folder: Path) -> None:
    names = list(own_tasks())
    assert {f"mixlm_{name}" for name in ROWS} < set(names)
    tasks = load_tasks(names, data=folder)
    assert list(tasks) == names
    for name, target in TARGETS.items():
        task = tasks[f"mixlm_{name}"]
        document = task.test_docs()[0]
        assert task.doc_to_target(document) == target
        assert "Answer: <" in task.doc_to_text(document)
        assert task.doc_to_text(document).startswith(
            next(ROWS[name][k] for k in ("question", "input") if k in ROWS[name])
        )
    assert "A. a stone\nB. a bird" in tasks["mixlm_mmlu"].doc_to_text(tasks["mixlm_mmlu"].test_docs()[0])


def test_choices_are_scored_as_they_stand(folder: Path) -> None:
    for name in ("mmlu", "arc_challenge", "arc_easy"):
        (task,) = load_tasks([f"mixlm_{name}_choices"], data=folder).values()
        requests = build_requests(task, 1, None)
        question = f"Question: {ROWS[name]['question']}\nAnswer:"
        choices = [" a stone", " a bird"] if name == "mmlu" else [" a cloud", " a stone"]
        assert [request.args for request in requests] == [(question, choice) for choice in choices]
        right = "AB".index(TARGETS[name])
        for likely in (0, 1):
            table = judge(task, requests, [(-1.0 if choice == likely else -2.0, False) for choice in (0, 1)])
            assert table["acc", "none"] == [float(likely == right)]


@pytest.mark.slow
def test_reasoning_tasks_count_exact_answers_only(tmp_path: Path) -> None:
    names = [name for name in own_tasks() if name.startswith("mixlm_rg_")]
    assert len(names) >= 3
    for task in load_tasks(names).values():
        for document in task.test_docs().select(range(20)):
            right = document["answer"]
            assert task.process_results(document, [f"So it is.\nAnswer: {right}"]) == {"exact_match": 1.0}
            wrong = "Answer: 99999999999" if document["kind"] == "number" else "Answer: perhaps"
            assert task.process_results(document, [wrong]) == {"exact_match": 0.0}


def test_a_choice_takes_turns_and_depends_on_the_questions_alone() -> None:
    rows = [{"group": g, "question": f"{g}{i}", "options": ""} for g in "abc" for i in range(10)]
    chosen = choose_questions(rows, 4, 0)
    assert [run["group"] for run in chosen[:6]] == list("abcabc")
    assert len(chosen) == 12
    assert choose_questions(rows[::-1], 4, 0) == chosen
    assert choose_questions(rows, 4, 1) != chosen
    assert len(choose_questions(rows, 50, 0)) == 30


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("gsm8k", '{"question": "x"}', "there is no 'answer'"),
        ("gsm8k", '{"question": "x", "answer": "just 5"}', "answer ends in 'just 5'"),
        ("gsm8k", '{"question": 5, "answer": "#### 5"}', "question is 5, not a text"),
        ("gsm8k", "[1, 2]", "each line is a JSON object with question"),
        ("gsm8k", '{"question"', "this is not valid JSON"),
        ("svamp", '{"question": "x", "answer": "many"}', "answer is 'many', not a number"),
        ("mmlu", '{"subject": "s", "question": "x", "choices": ["a"], "answer": 3}', "answer is 3, no index"),
        ("mmlu", '{"subject": "s", "question": "x", "choices": "ab", "answer": 0}', "choices is 'ab', not a list"),
        ("bbh", '{"task": "t", "input": "x", "target": ""}', "target is '', not a text"),
        ("arc_easy", '{"question": "x", "choices": {"text": ["a"], "label": [1]}, "answerKey": "B"}', "answerKey is"),
    ],
)  # fmt: skip
def test_a_malformed_line_is_named(folder: Path, name: str, line: str, said: str) -> None:
    path = folder / f"{name}.jsonl"
    path.write_text(json.dumps(ROWS[name]) + "\n" + line + "\n")
    with pytest.raises(ConfigError) as error:
        load_tasks([f"mixlm_{name}"], data=folder)
    assert f"{path}, line 2: " in error.value.message
    assert said in str(error.value)
    assert "each line is" in str(error.value.hint)


def test_a_missing_file_is_named_with_what_is_there(folder: Path) -> None:
    (folder / "gsm8k.jsonl").rename(folder / "gsm8.jsonl")
    with pytest.raises(ConfigError, match=r"there is no file .*gsm8k\.jsonl .*'gsm8\.jsonl'"):
        load_tasks(["mixlm_gsm8k"], data=folder)
    with pytest.raises(ConfigError, match="there is no folder"):
        load_tasks(["mixlm_gsm8k"], data=folder / "nowhere")
    (folder / "svamp.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="has no questions"):
        load_tasks(["mixlm_svamp"], data=folder)


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("the hub cannot be reached\nmany more lines")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ConfigError, match="could not be read from the hub") as error:
        load(name="gsm8k")
    assert error.value.message.endswith("the hub cannot be reached")
    assert error.value.hint == "give a folder that has gsm8k.jsonl: --data DIR"


def test_rows_of_the_hub_become_the_same_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    def hub(path: str, name: str, split: str) -> list[dict[str, object]]:
        row = dict(ROWS["svamp" if "SVAMP" in path else "bbh"])
        row.pop("task", None)
        return [row]

    monkeypatch.setattr("datasets.load_dataset", hub)
    monkeypatch.setattr("datasets.get_dataset_config_names", lambda _: ["b", "a"])
    assert load(name="svamp")["test"][0]["target"] == "8"
    assert load(name="bbh", per_group=5)["test"]["group"][:] == ["a", "b"]


def test_an_unknown_task_of_ours_is_named_with_near_ones_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    plain = TaskManager.__init__

    def ours_only(self: TaskManager, *, include_defaults: bool, **options: object) -> None:
        assert not include_defaults  # the harness's own tasks take ten seconds to read
        plain(self, include_defaults=False, **options)

    monkeypatch.setattr(TaskManager, "__init__", ours_only)
    with pytest.raises(ConfigError, match=r"there is no task 'mixlm_gsm8' \(did you mean 'mixlm_gsm8k'"):
        load_tasks(["mixlm_gsm8"])
    with pytest.raises(ConfigError, match="no task is named"):
        load_tasks([])


def test_a_task_that_runs_code_is_refused(task) -> None:
    with pytest.raises(UnsupportedError, match="runs code"):
        load_tasks([task("generate", "unsafe_code: true\n")])


def test_a_task_that_cannot_be_loaded_is_one_sentence(task) -> None:
    with pytest.raises(ConfigError, match=r"the task .*generate\.yaml could not be loaded: "):
        load_tasks([task("generate", "test_split: other\n")])
