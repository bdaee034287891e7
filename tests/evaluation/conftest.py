"""Fixtures: small tasks on disk, and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from evaluating import command_line
from small_tasks import QUESTIONS, WORDS

# Without the extra `eval` there is nothing to test here.
collect_ignore_glob = [] if find_spec("lm_eval") else ["test_*.py"]


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., str]:
    """Write a task of a kind with its questions, and return the name of its file."""

    def write(kind: str, more: str = "") -> str:
        rows = [{"question": q, "answer": "the", "index": i % 3} for i, q in enumerate(QUESTIONS)]
        data = tmp_path / f"{kind}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / f"{kind}.yaml"
        path.write_text(
            f"task: {kind}\ndataset_path: json\ntest_split: test\n{WORDS[kind]}{more}"
            f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / 'cache'}}}\n"
        )
        return str(path)

    return write


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit code, stdout, stderr."""
    return command_line(capsys, monkeypatch, tmp_path)
