"""Tasks of reasoning-gym: questions made by a program, so they need no data and cannot have been trained on."""

from __future__ import annotations

import json
from typing import Any

from mixlm.errors import ConfigError
from mixlm.evaluation import answers


def load(*, name: str, size: int = 200, seed: int = 0, kind: str = "text", **_: Any) -> dict[str, Any]:
    """Return `size` questions of a reasoning-gym task as the harness wants them: {"test": datasets.Dataset}.

    kind: "number" where the answer is one, else "text". Raises ConfigError when reasoning-gym is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(f"this task needs reasoning-gym: {error}", "pip install 'mixlm[eval]'") from error
    from datasets import Dataset

    made = reasoning_gym.create_dataset(name, seed=seed, size=size)
    documents = [
        {
            "name": name,
            "kind": kind,
            "question": entry["question"].strip(),
            "answer": entry["answer"],
            # Rows of one table have equal columns, and what an entry knows of itself differs from row to row.
            "entry": json.dumps(entry, default=str),
        }
        for entry in made
    ]
    return {"test": Dataset.from_list(documents)}


def score(document: dict[str, Any], texts: list[str]) -> dict[str, float]:
    """Score one completion with the task's own scorer: 1 for exactly right, 0 for anything less."""
    import reasoning_gym

    text = texts[0]
    answer = answers.number_answer(text) if document["kind"] == "number" else answers.stated_answer(text).strip("*`. ")
    value = reasoning_gym.get_score_answer_fn(document["name"])(answer, json.loads(document["entry"]))
    return {"exact_match": float(value == 1.0)}
