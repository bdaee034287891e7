"""Write questions with answers for `mixlm fit`, made by reasoning-gym: those to fit first, those to check last.

    python -m research.scripts.questions questions.jsonl    # then: mixlm fit … questions.jsonl --holdout 0.34

The first two thirds are of one seed, the last third of another, so that what is held out was made apart. None of them
is a question of a benchmark.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import reasoning_gym

TASKS = ("gsm_symbolic", "chain_sum", "letter_counting", "family_relationships", "calendar_arithmetic", "syllogism")
PARTS = ((1, 40), (2, 20))  # seed, questions of each task


def main(path: str) -> None:
    """Write the file: an object with a prompt and an answer a line."""
    lines = []
    for seed, size in PARTS:
        made = [reasoning_gym.create_dataset(name, seed=seed, size=size) for name in TASKS]
        lines += [
            {"prompt": entry["question"], "answer": entry["answer"]} for row in zip(*made, strict=True) for entry in row
        ]
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
