"""The numbers of the paper (arXiv 2605.00419) that its text contains, each with the place it is from.

Figures 2, 3 and 4 are plots only: the text has no numbers for them, and none are given here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

Names = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A model of the paper. number: its mark in the tables, 0 for none. hub: its id on the Hugging Face hub."""

    number: int
    hub: str


@dataclass(frozen=True, slots=True)
class PublishedScore:
    """A printed accuracy in percent, and the gain over the best single model as printed after it."""

    value: float
    gain: float


@dataclass(frozen=True, slots=True)
class PublishedSpeed:
    """One column of table 4: tokens per second, and the printed ratios to sequential CE in the same order."""

    single: float
    sequential: float
    parallel: float
    mixture: float
    ratios: tuple[float, float, float, float]


SOURCE = "arXiv 2605.00419"
TASKS = ("GSM8K", "MMLU", "BBH", "ARC")

# Section 4.1 and table 5 (appendix A.2), by the paper's short names. The models of figure 3 that table 5 lacks are in
# section 4.4, only by short names; their ids follow those of their families.
MODELS = {
    "Qwen-3B": PublishedModel(1, "Qwen/Qwen2.5-3B-Instruct"),
    "Qwen-Math-1.5B": PublishedModel(2, "Qwen/Qwen2.5-Math-1.5B-Instruct"),
    "Openchat": PublishedModel(3, "openchat/openchat-3.5-0106"),
    "Nous-Hermes": PublishedModel(4, "NousResearch/Nous-Hermes-2-Mistral-7B-DPO"),
    "OpenHermes": PublishedModel(5, "teknium/OpenHermes-2.5-Mistral-7B"),
    "Deepseek-7B": PublishedModel(7, "deepseek-ai/deepseek-llm-7b-chat"),
    "Mistral-7B": PublishedModel(8, "mistralai/Mistral-7B-Instruct-v0.3"),
    "Llama-3-8B": PublishedModel(0, "meta-llama/Llama-3.1-8B-Instruct"),
    "Llama-3-3B": PublishedModel(0, "meta-llama/Llama-3.2-3B-Instruct"),
    "Llama-3-1B": PublishedModel(0, "meta-llama/Llama-3.2-1B-Instruct"),
    "Qwen-1.5B": PublishedModel(0, "Qwen/Qwen2.5-1.5B-Instruct"),
    "Qwen-Coder-3B": PublishedModel(0, "Qwen/Qwen2.5-Coder-3B-Instruct"),
    "Qwen-7B": PublishedModel(0, "Qwen/Qwen2.5-7B-Instruct"),
    "Qwen-Math-7B": PublishedModel(0, "Qwen/Qwen2.5-Math-7B-Instruct"),
}

QWEN: Names = ("Qwen-3B", "Qwen-Math-1.5B")
MISTRAL_2: Names = ("Openchat", "Nous-Hermes")
MISTRAL_3: Names = ("Openchat", "Nous-Hermes", "OpenHermes")
MIXED: Names = ("Openchat", "Deepseek-7B", "Mistral-7B")

# The ensembles of each table and figure. Figures 2 and 3: sections 4.1, 4.3 and 4.4. Figure 4: its two pairs are marked
# by symbols that the text has lost; these are the two pairs of table 2. The first model of a pair of figure 2 is the
# larger one, whose weight is λ.
ENSEMBLES: dict[str, tuple[Names, ...]] = {
    "table2": (QWEN, MISTRAL_2, MISTRAL_3),
    "table3": (MIXED,),
    "table4": (QWEN, MISTRAL_2, MISTRAL_3, MIXED),
    "figure2": (("Llama-3-8B", "Llama-3-1B"), ("Llama-3-8B", "Llama-3-3B")),
    "figure3": (("Qwen-1.5B", "Qwen-Math-1.5B"), ("Qwen-3B", "Qwen-Coder-3B"), ("Qwen-7B", "Qwen-Math-7B")),
    "figure4": (QWEN, MISTRAL_2),
}

# Tables 2 and 3: single models, in the order of TASKS. The tables do not say which k these rows have.
SINGLE: dict[str, tuple[float, ...]] = {
    "Qwen-3B": (79.77, 66.75, 51.94, 81.81),
    "Qwen-Math-1.5B": (79.39, 39.54, 39.75, 46.23),
    "Openchat": (68.02, 56.47, 44.85, 73.39),
    "Nous-Hermes": (67.11, 58.37, 46.72, 73.02),
    "OpenHermes": (67.59, 59.84, 47.13, 75.25),
    "Deepseek-7B": (53.63, 46.10, 36.02, 56.41),
    "Mistral-7B": (46.90, 56.22, 41.25, 68.75),
}


def _cells(*pairs: float) -> tuple[PublishedScore, ...]:
    return tuple(PublishedScore(value, gain) for value, gain in zip(pairs[::2], pairs[1::2], strict=True))


# Tables 2 (QWEN, MISTRAL_2, MISTRAL_3) and 3 (MIXED): by method and k, in the order of TASKS.
ACCURACY: dict[Names, dict[tuple[str, int], tuple[PublishedScore, ...]]] = {
    QWEN: {
        ("conventional", 5): _cells(83.14, 3.37, 66.05, -0.70, 52.74, 0.80, 81.14, -0.67),
        ("mixture", 5): _cells(82.97, 3.20, 65.61, -1.14, 53.04, 1.10, 81.12, -0.69),
        ("conventional", 10): _cells(82.62, 2.85, 66.67, -0.08, 52.25, 0.31, 81.57, -0.24),
        ("mixture", 10): _cells(82.83, 3.06, 67.90, 1.15, 52.51, 0.57, 81.10, -0.71),
    },
    MISTRAL_2: {
        ("conventional", 5): _cells(69.34, 1.32, 60.60, 2.23, 48.12, 1.40, 78.84, 5.45),
        ("mixture", 5): _cells(69.11, 1.09, 60.95, 2.58, 47.33, 1.22, 78.78, 5.39),
        ("conventional", 10): _cells(68.19, 0.17, 60.28, 1.91, 47.82, 1.10, 78.70, 5.31),
        ("mixture", 10): _cells(68.74, 0.72, 60.63, 2.26, 47.25, 0.53, 80.06, 6.67),
    },
    MISTRAL_3: {
        ("conventional", 5): _cells(69.05, 1.03, 60.60, 0.76, 47.82, 0.69, 78.38, 3.13),
        ("mixture", 5): _cells(69.42, 1.40, 59.97, 0.13, 48.04, 0.91, 78.42, 3.17),
        ("conventional", 10): _cells(68.47, 0.45, 61.19, 1.35, 46.87, -0.26, 77.34, 2.09),
        ("mixture", 10): _cells(67.93, -0.09, 60.80, 0.96, 47.40, 0.27, 76.29, 1.04),
    },
    MIXED: {
        ("conventional", 5): _cells(69.20, 1.18, 57.98, 1.51, 45.61, 0.76, 75.00, 1.61),
        ("mixture", 5): _cells(69.86, 1.84, 57.79, 1.32, 45.76, 0.91, 74.19, 0.80),
        ("conventional", 10): _cells(68.23, 0.21, 58.50, 2.03, 44.96, 0.11, 78.69, 5.30),
        ("mixture", 10): _cells(67.81, -0.21, 58.46, 1.99, 45.38, 0.53, 78.58, 5.19),
    },
}

# Cells of ACCURACY (ensemble, method, k, task) whose printed gain does not follow from the printed accuracies.
MISPRINTS = frozenset({(MISTRAL_2, "mixture", 5, "BBH")})

# Table 4: one H100 unless for parallel CE.
SPEED: dict[Names, PublishedSpeed] = {
    QWEN: PublishedSpeed(63.68, 32.71, 34.58, 58.25, (1.95, 1.00, 1.05, 1.78)),
    MISTRAL_2: PublishedSpeed(54.83, 27.16, 34.24, 51.33, (2.01, 1.00, 1.26, 1.89)),
    MISTRAL_3: PublishedSpeed(54.71, 17.43, 31.74, 46.22, (3.13, 1.00, 1.82, 2.65)),
    MIXED: PublishedSpeed(54.42, 17.21, 31.55, 46.17, (3.16, 1.00, 1.83, 2.68)),
}


def title(names: Names) -> str:
    """Return an ensemble of the paper as one label."""
    return " + ".join(names)


def find(models: Sequence[str]) -> Names | None:
    """Return the ensemble of the paper that has these models (hub ids, or folders that end in the same name)."""
    wanted = sorted(PurePath(model).name.lower() for model in models)
    for names in dict.fromkeys(members for group in ENSEMBLES.values() for members in group):
        if sorted(map(last_part, names)) == wanted:
            return names
    return None


def last_part(name: str) -> str:
    """Return the last part of a model's hub id in lower case: what a folder with it is usually called."""
    return PurePath(MODELS[name].hub).name.lower()


def accuracy(names: Names, method: str, top_k: int, task: str) -> PublishedScore | None:
    """Return a cell of table 2 or 3."""
    row = ACCURACY.get(names, {}).get((method, top_k))
    return None if row is None or task not in TASKS else row[TASKS.index(task)]


def single(name: str, task: str) -> float | None:
    """Return the accuracy of a single model."""
    return None if name not in SINGLE or task not in TASKS else SINGLE[name][TASKS.index(task)]


def numbers(experiment: str) -> dict[str, Any]:
    """Return what the text has of a table or figure, for reports."""
    ensembles = ENSEMBLES[experiment]
    if experiment == "table4":
        rows = {
            title(ensemble): {k: getattr(SPEED[ensemble], k) for k in PublishedSpeed.__slots__}
            for ensemble in ensembles
        }
        return {"source": f"{SOURCE}, table 4", "unit": "tokens/s", "ensembles": rows}
    if experiment.startswith("figure"):
        return {"source": f"{SOURCE}, figure {experiment[-1]}", "numbers": "plot only"}
    members = dict.fromkeys(name for ensemble in ensembles for name in ensemble)
    return {
        "source": f"{SOURCE}, table {experiment[-1]}",
        "unit": "percent",
        "tasks": list(TASKS),
        "single": {name: list(SINGLE[name]) for name in members},
        "ensembles": {
            title(ensemble): {
                f"{method}, k = {k}": [cell.value for cell in cells]
                for (method, k), cells in ACCURACY[ensemble].items()
            }
            for ensemble in ensembles
        },
    }
