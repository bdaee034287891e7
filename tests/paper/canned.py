"""Findings with known numbers, and questions on disk."""

from __future__ import annotations

import json
from pathlib import Path

from mixlm.paper import published
from mixlm.paper.findings import Accuracy, Difference, Findings, Speed

ENVIRONMENT = {"processor": "a processor", "system": "a system", "cores": 2, "versions": {"mixlm": "0"}}
OURS = "toy:1 + toy:2"
THEIRS = published.title(published.QWEN)

_ROWS = {
    "gsm8k": {"question": "What is 2 and 3?", "answer": "2 + 3 = 5\n#### 5"},
    "mmlu": {"subject": "birds", "question": "Which sings?", "choices": ["a stone", "a bird"], "answer": 1},
    "bbh": {"task": "brackets", "input": "Close: [ {", "target": "} ]"},
    "arc_challenge": {
        "question": "Which falls?",
        "choices": {"text": ["a cloud", "a stone"], "label": ["1", "2"]},
        "answerKey": "2",
    },
}


def write_questions(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, row in _ROWS.items():
        rows = [{**row, key: f"{row[key]} ({n})"} for n in range(3) for key in ("question", "input") if key in row]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def accuracy(ensemble: str, method: str, mean: float, **changes: object) -> Accuracy:
    given = {
        "weights": () if method.startswith("single") else (0.5, 0.5),
        "top_k": 5,
        "task": "mixlm_gsm8k",
        "metric": "exact_match",
        "interval": (mean - 0.01, mean + 0.01),
        "values": (mean - 0.005, mean, mean + 0.005),
        "questions": 20,
    }
    return Accuracy(ensemble, method, mean=mean, **(given | changes))


def speed(ensemble: str, machine: str = "a processor", parallel: float | None = None) -> Speed:
    single = dict(zip(ensemble.split(" + "), (40.0, 60.0), strict=True))
    return Speed(ensemble, machine, (0.5, 0.5), 5, single, 20.0, parallel, 45.0, 2.2)


def findings(
    name: str,
    accuracies: tuple[Accuracy, ...] = (),
    speeds: tuple[Speed, ...] = (),
    differences: tuple[Difference, ...] = (),
    reduced: str | None = None,
) -> Findings:
    labels = dict.fromkeys(one.ensemble for one in (*accuracies, *speeds))
    settings = {"ensembles": {label: {"models": label.split(" + ")} for label in labels}, "top_k": [5]}
    return Findings(
        name,
        f"{name[:-1].capitalize()} {name[-1]}: a title",
        reduced,
        settings,
        ENVIRONMENT,
        accuracies,
        differences,
        speeds,
        ("a note",),
        {label: published.QWEN if label == THEIRS else None for label in labels},
    )


def curves(name: str, *methods: str) -> Findings:
    steps = (0.0, 0.5, 1.0)
    scores = tuple(
        accuracy(OURS, method, 0.3 + 0.2 * step, weights=(step, 1 - step)) for method in methods for step in steps
    )
    speeds = tuple(
        Speed(OURS, "a processor", (step, 1 - step), 5, {"toy:1": 40.0, "toy:2": 60.0}, 20.0, None, 60 - 20 * step, 2.0)
        for step in steps
    )
    differences = tuple(
        Difference(OURS, (step, 1 - step), 5, "mixlm_gsm8k", 0.01, (-0.02, 0.04), 0.5, 20, 3, 2) for step in steps
    )
    return findings(name, scores, speeds if name == "figure2" else (), differences if name == "figure4" else ())
