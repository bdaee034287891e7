"""The questions of mixlm's tasks: from a folder of JSONL files, or from the hub.

Each set has one form of row, the hub's, and becomes documents with the columns `group`, `question`, `options` (a
text), `target` and, where there are options, `choices` (a list). `target` is in the form that
`mixlm.evaluation.answers` gives: of options, the letter. A folder needs no network.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlm.errors import ConfigError, close_matches, did_you_mean
from mixlm.evaluation import answers

Row = Mapping[str, Any]
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class _QuestionSet:
    """hub: path, configuration (None: all of them, each a value of the column `task`) and split. form: of one row."""

    hub: tuple[str, str | None, str]
    form: str
    document: Callable[[Row], dict[str, Any]]


def load(
    *, name: str, per_group: int | None = None, choice: int = 0, mixlm_data: str | None = None, **_: Any
) -> dict[str, Any]:
    """Return a set of questions as the harness wants it: {"test": datasets.Dataset}.

    per_group: take so many of each group, by a choice that depends on `choice` and the questions alone. Groups take
    turns, so that the first n questions come from as many groups as there are. mixlm_data: a folder with NAME.jsonl.
    Raises ConfigError that says which file and line, or why the hub could not be read.
    """
    from datasets import Dataset

    question_set = _SETS[name]
    where = f"the hub's {question_set.hub[0]}" if mixlm_data is None else str(Path(mixlm_data) / f"{name}.jsonl")
    rows = _from_hub(name, question_set) if mixlm_data is None else _from_file(Path(where))
    documents = []
    for line, row in rows:
        try:
            documents.append(question_set.document(row))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise ConfigError(
                f"{where}, line {line}: {reason}", f"each line is a JSON object with {question_set.form}"
            ) from None
    if not documents:
        raise ConfigError(f"{where} has no questions", f"each line is a JSON object with {question_set.form}")
    return {"test": Dataset.from_list(choose_questions(documents, per_group, choice) if per_group else documents)}


def choose_questions(documents: Iterable[dict[str, Any]], per_group: int, choice: int) -> list[dict[str, Any]]:
    """Choose questions of each group by a hash of their text, so that neither order nor library versions matter."""

    def key(document: dict[str, Any]) -> str:
        return hashlib.sha256(f"{choice} {document['question']} {document['options']}".encode()).hexdigest()

    groups = defaultdict(list)
    for document in documents:
        groups[document["group"]].append(document)
    chosen = [sorted(members, key=key)[:per_group] for _, members in sorted(groups.items())]
    return [members[turn] for turn in range(per_group) for members in chosen if turn < len(members)]


def _from_file(path: Path) -> Iterable[tuple[int, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # some questions contain other line ends
    except FileNotFoundError:
        # With their endings, any two names look a little alike.
        there = sorted(file.stem for file in path.parent.glob("*.jsonl"))
        shown = ", ".join(f"{stem}.jsonl" for stem in there[:8]) or "no .jsonl files"
        close = [f"{match}.jsonl" for match in close_matches(path.stem, there)]
        hint = did_you_mean(path.name, close) or f"the folder has {shown}"
        raise ConfigError(f"there is no file {path}", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"{path}, line {number}: this is not valid JSON: {error}", "each line is one JSON object, a question"
            ) from error


def _from_hub(name: str, question_set: _QuestionSet) -> Iterable[tuple[int, Any]]:
    from datasets import get_dataset_config_names, load_dataset

    path, configuration, split = question_set.hub
    try:
        if configuration is not None:
            rows = list(load_dataset(path, configuration, split=split))
        else:
            tasks = sorted(get_dataset_config_names(path))
            rows = [{**row, "task": task} for task in tasks for row in load_dataset(path, task, split=split)]
    except Exception as error:  # whatever the hub's client raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"the questions of {name} could not be read from the hub ({path}): {reason}",
            f"give a folder that has {name}.jsonl: --data DIR",
        ) from error
    return enumerate(rows, 1)


def _document(question: Any, target: str, group: Any = "", choices: Sequence[str] = ()) -> dict[str, Any]:
    for name, value in (("question", question), ("the group", group)):
        if not isinstance(value, str):
            raise TypeError(f"{name} is {value!r}, not a text")
    options = "\n".join(f"{mark}. {choice}" for mark, choice in zip(_LETTERS, choices, strict=False))
    document = {"group": group, "question": question.strip(), "options": options, "target": target}
    return {**document, "choices": list(choices)} if choices else document


def _choices(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(choice, str) for choice in value):
        raise TypeError(f"choices is {value!r}, not a list of texts")
    return [choice.strip() for choice in value]


def _gsm8k(row: Row) -> dict[str, Any]:
    _, mark, result = row["answer"].rpartition("####")
    target = answers.number_answer(result)
    if not mark or not target:
        raise ValueError(f"answer ends in {row['answer'][-20:]!r}")
    return _document(row["question"], target)


def _svamp(row: Row) -> dict[str, Any]:
    question = row["question"] if "question" in row else row["question_concat"]
    answer = row["answer"] if "answer" in row else row["Answer"]
    target = answers.number_answer(str(answer))
    if not target:
        raise ValueError(f"answer is {answer!r}, not a number")
    return _document(question, target)


def _mmlu(row: Row) -> dict[str, Any]:
    choices, answer = row["choices"], row["answer"]
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"answer is {answer!r}, no index of one of {len(choices)} choices")
    return _document(row["question"], _LETTERS[answer], row["subject"], _choices(choices))


def _arc(row: Row) -> dict[str, Any]:
    # Some rows number their choices; all are shown with letters.
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    if row["answerKey"] not in labels or len(labels) != len(texts):
        raise ValueError(f"answerKey is {row['answerKey']!r}, and the labels of {len(texts)} choices are {labels}")
    return _document(row["question"], _LETTERS[labels.index(row["answerKey"])], choices=_choices(texts))


def _bbh(row: Row) -> dict[str, Any]:
    if not isinstance(row["target"], str) or not row["target"].strip():
        raise ValueError(f"target is {row['target']!r}, not a text")
    return _document(row["input"], answers.phrase_answer(row["target"]), row["task"])


_FORM_OF_CHOICES = "choices (text and label, lists of texts), answerKey (one of the labels)"
_SETS = {
    "gsm8k": _QuestionSet(
        ("openai/gsm8k", "main", "test"), "question (text) and answer (text that ends in '#### number')", _gsm8k
    ),
    "svamp": _QuestionSet(("ChilleD/SVAMP", "default", "train+test"), "question (text) and answer (number)", _svamp),
    "mmlu": _QuestionSet(
        ("cais/mmlu", "all", "test"), "subject, question (texts), choices (list of texts), answer (index)", _mmlu
    ),
    "bbh": _QuestionSet(("SaylorTwift/bbh", None, "test"), "task, input and target (texts)", _bbh),
    "arc_challenge": _QuestionSet(
        ("allenai/ai2_arc", "ARC-Challenge", "test"), f"question (text), {_FORM_OF_CHOICES}", _arc
    ),
    "arc_easy": _QuestionSet(("allenai/ai2_arc", "ARC-Easy", "test"), f"question (text), {_FORM_OF_CHOICES}", _arc),
}
