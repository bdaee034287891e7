"""Findings with known numbers."""

from __future__ import annotations

from collections.abc import Sequence

from mixlm.evaluation.results import PairedComparison, Score
from research.paper import published
from research.paper.findings import AccuracyFinding, DifferenceFinding, Findings, SpeedFinding

ENVIRONMENT = {"processor": "a processor", "system": "a system", "cores": 2, "versions": {"mixlm": "0"}}
OURS = "toy:1 + toy:2"
THEIRS = published.title(published.QWEN)


def accuracy(
    ensemble: str, method: str, mean: float, *, seeds: int = 3, weights: Sequence[float] = ()
) -> AccuracyFinding:
    """A score whose 95 % interval over three seeds is one point of a hundred to both sides."""
    apart = 0.01 * 3**0.5 / 4.302652729749464 if seeds > 1 else 0.0
    values = (mean - apart, mean, mean + apart)[-seeds:] if seeds > 1 else (mean,)
    score = Score("mixlm_gsm8k", method, "exact_match", "answer", True, tuple(range(seeds)), values, 20)
    return AccuracyFinding(ensemble, tuple(weights or (() if method.startswith("single") else (0.5, 0.5))), 5, score)


def difference(
    weights: tuple[float, ...], value: float, interval: tuple[float, float] | None, p_value: float
) -> DifferenceFinding:
    pair = PairedComparison("mixlm_gsm8k", "exact_match", "mixture", "conventional", value, interval, p_value, 20, 3, 2)
    return DifferenceFinding(OURS, weights, 5, pair)


def speed(ensemble: str, machine: str = "a processor", parallel: float | None = None) -> SpeedFinding:
    single = dict(zip(ensemble.split(" + "), (40.0, 60.0), strict=True))
    return SpeedFinding(ensemble, machine, (0.5, 0.5), 5, single, 20.0, parallel, 45.0, 2.2)


def findings(
    name: str,
    accuracies: tuple[AccuracyFinding, ...] = (),
    speeds: tuple[SpeedFinding, ...] = (),
    differences: tuple[DifferenceFinding, ...] = (),
    reduced: str | None = None,
) -> Findings:
    labels = dict.fromkeys(finding.ensemble for finding in (*accuracies, *speeds))
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
        SpeedFinding(
            OURS, "a processor", (step, 1 - step), 5, {"toy:1": 40.0, "toy:2": 60.0}, 20.0, None, 60 - 20 * step, 2.0
        )
        for step in steps
    )
    differences = tuple(difference((step, 1 - step), 0.01, (-0.02, 0.04), 0.5) for step in steps)
    return findings(name, scores, speeds if name == "figure2" else (), differences if name == "figure4" else ())
