"""What an experiment found, as plain values: what is kept in JSON, and what tables and figures are made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mixlm.errors import ConfigError
from mixlm.evaluation.results import PairedComparison, Score

_PLAIN = ("experiment", "title", "reduced", "settings", "environment", "notes", "ensembles")


@dataclass(frozen=True, slots=True)
class AccuracyFinding:
    """One method of one ensemble on one task. weights: none for a single member."""

    ensemble: str
    weights: tuple[float, ...]
    top_k: int
    score: Score

    def as_dict(self) -> dict[str, Any]:
        """Return the form that is kept as JSON."""
        return {**_about(self), **self.score.as_dict()}


@dataclass(frozen=True, slots=True)
class DifferenceFinding:
    """ME minus CE on the same questions of a task, each averaged over its seeds."""

    ensemble: str
    weights: tuple[float, ...]
    top_k: int
    pair: PairedComparison

    def as_dict(self) -> dict[str, Any]:
        """Return the form that is kept as JSON."""
        return {**_about(self), **self.pair.as_dict()}


def _about(finding: AccuracyFinding | DifferenceFinding) -> dict[str, Any]:
    return {"ensemble": finding.ensemble, "weights": list(finding.weights), "top_k": finding.top_k}


@dataclass(frozen=True, slots=True)
class SpeedFinding:
    """Tokens per second of one ensemble on one machine.

    single: each member alone. parallel: CE with a device for each member, None when there were too few. paired: mixture
    over conventional, the median of the ratios within a repeat.
    """

    ensemble: str
    machine: str
    weights: tuple[float, ...]
    top_k: int
    single: Mapping[str, float]
    sequential: float
    parallel: float | None
    mixture: float
    paired: float

    @property
    def alone(self) -> float:
        """Speed of the members alone, each for its share of the tokens: the most that ME could reach."""
        return 1 / sum(w / speed for w, speed in zip(self.weights, self.single.values(), strict=True) if w)

    def ratio(self, value: float) -> float:
        """Return a speed as a multiple of sequential CE's."""
        return value / self.sequential


@dataclass(frozen=True)
class Findings:
    """All that an experiment found. reduced: what is smaller than in the paper, None when nothing is."""

    experiment: str
    title: str
    reduced: str | None
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    accuracies: tuple[AccuracyFinding, ...] = ()
    differences: tuple[DifferenceFinding, ...] = ()
    speeds: tuple[SpeedFinding, ...] = ()
    notes: tuple[str, ...] = ()
    ensembles: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    """Labels of the ensembles, each with the paper's names of its models where it is one of the paper's."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in order."""
        return tuple(dict.fromkeys(accuracy.score.task for accuracy in self.accuracies))

    def accuracy(self, ensemble: str, method: str, top_k: int, task: str) -> AccuracyFinding | None:
        """Return the first score that fits."""
        for accuracy in self.accuracies:
            if (accuracy.ensemble, accuracy.score.method, accuracy.top_k, accuracy.score.task) == (
                ensemble,
                method,
                top_k,
                task,
            ):
                return accuracy
        return None

    def as_dict(self) -> dict[str, Any]:
        """Return the form that is kept as JSON."""
        from research.paper import published

        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "accuracies": [accuracy.as_dict() for accuracy in self.accuracies],
            "differences": [difference.as_dict() for difference in self.differences],
            "speeds": [{**asdict(speed), "alone": speed.alone} for speed in self.speeds],
            "published": published.numbers(self.experiment),
        }


def read(path: str | Path) -> Findings:
    """Read findings that were kept as JSON. Raises ConfigError for a file that is none."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        return _findings(raw)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} holds no results of research.paper: {type(error).__name__}: {error}",
            "give the JSON file that python -m research.paper wrote",
        ) from error


def read_score(raw: Mapping[str, Any]) -> Score:
    """Return what `Score.as_dict` was made of, as far as it holds it. Raises KeyError, TypeError or ValueError."""
    about = {name: raw[name] for name in ("task", "method", "metric", "filter", "higher_is_better")}
    seeds = tuple(int(seed) for seed in raw["seeds"])
    values = tuple(float(value) for value in raw["seeds"].values())
    questions = np.array(raw["values"], dtype=np.float64) if "values" in raw else None
    return Score(**about, seeds=seeds, values=values, count=int(raw["questions"]), questions=questions)


def read_comparison(raw: Mapping[str, Any]) -> PairedComparison:
    """Return what `PairedComparison.as_dict` was made of. Raises KeyError or TypeError."""
    values = {name: raw[name] for name in PairedComparison.__slots__}
    return PairedComparison(**values | {"interval": None if raw["interval"] is None else tuple(raw["interval"])})


def _findings(raw: Mapping[str, Any]) -> Findings:
    return Findings(
        raw["experiment"],
        raw["title"],
        raw["reduced"],
        raw["settings"],
        raw["environment"],
        tuple(
            AccuracyFinding(finding["ensemble"], tuple(finding["weights"]), finding["top_k"], read_score(finding))
            for finding in raw["accuracies"]
        ),
        tuple(
            DifferenceFinding(
                finding["ensemble"], tuple(finding["weights"]), finding["top_k"], read_comparison(finding)
            )
            for finding in raw["differences"]
        ),
        tuple(
            SpeedFinding(
                **{key: value for key, value in finding.items() if key != "alone"}
                | {"weights": tuple(finding["weights"])}
            )
            for finding in raw["speeds"]
        ),
        tuple(raw["notes"]),
        {label: None if names is None else tuple(names) for label, names in raw["ensembles"].items()},
    )
