"""What tests of `mixlm eval` and `mixlm paper` share: questions on disk, and the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# A question of each set, in the hub's form.
ROWS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "What is 2 and 3?", "answer": "2 + 3 = 5\n#### 1,005"},
    "svamp": {"question": "What is 4 and 4?", "answer": "8.0"},
    "mmlu": {"subject": "birds", "question": "Which sings?", "choices": ["a stone", "a bird"], "answer": 1},
    "bbh": {"task": "brackets", "input": "Close: [ {", "target": "} ]"},
    "arc_challenge": {
        "question": "Which falls?",
        "choices": {"text": ["a cloud", "a stone"], "label": ["1", "2"]},
        "answerKey": "2",
    },
    "arc_easy": {
        "question": "Which falls?",
        "choices": {"text": ["a cloud", "a stone"], "label": ["A", "B"]},
        "answerKey": "A",
    },
}


def write_questions(folder: Path, count: int = 3) -> Path:
    """Write some questions of each set, numbered so that they differ."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, row in ROWS.items():
        rows = [{**row, key: f"{row[key]} ({n})"} for n in range(count) for key in ("question", "input") if key in row]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    main: Callable[[list[str]], int] | None = None,
) -> Callable[..., tuple[int, str, str]]:
    """Run a command line, by default `mixlm`, in this process and an empty folder: exit code, stdout, stderr."""
    from mixlm.cli import main as mixlm

    main = main or mixlm

    monkeypatch.setenv("MIXLM_CACHE", str(folder / "models"))
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        return code, *capsys.readouterr()

    return run
