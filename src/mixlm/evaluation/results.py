"""What an evaluation found: scores with intervals, and differences on the same questions with their p-values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy import stats

from mixlm.errors import ConfigError, did_you_mean
from mixlm.types import Floats

Interval = tuple[float, float]

LEVEL = 0.95
_FLIPS = 20_000
_BLOCK = 500
_EXACT = 14  # with so few questions that differ, all sign patterns are gone through


@dataclass(frozen=True)
class Score:
    """One metric of one method on one task.

    filter: how answers were taken from texts. seeds: of the runs; a single one where nothing is sampled by chance.
    values: the metric of each run. questions: float64 (seeds, questions), None for metrics that are no mean over
    questions. count: how many questions.
    """

    task: str
    method: str
    metric: str
    filter: str
    higher_is_better: bool
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    count: int
    questions: Floats | None = None

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.values))

    @property
    def interval(self) -> Interval | None:
        """95 % t-interval over seeds: what sampling anew changes, the questions fixed. None for a single seed."""
        return t_interval(self.values)

    @property
    def question_interval(self) -> Interval | None:
        """95 % t-interval over questions, each averaged over seeds: what other questions of this kind would change."""
        return None if self.questions is None else t_interval(self.questions.mean(axis=0))

    def as_dict(self, *, questions: bool = False) -> dict[str, Any]:
        """Return the form that `--json` prints. questions: with the value of every question in every run."""
        out: dict[str, Any] = {
            "task": self.task,
            "method": self.method,
            "metric": self.metric,
            "filter": self.filter,
            "higher_is_better": self.higher_is_better,
            "mean": self.mean,
            "interval": self.interval,
            "question_interval": self.question_interval,
            "seeds": {str(seed): value for seed, value in zip(self.seeds, self.values, strict=True)},
            "questions": self.count,
        }
        if questions and self.questions is not None:
            out["values"] = self.questions.tolist()
        return out


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """Two methods on the same questions of a task, each question averaged over its seeds.

    difference: left minus right. interval: 95 % t-interval over questions. p_value: of no difference, by flipping
    signs. better, worse: questions on which left scored higher, lower.
    """

    task: str
    metric: str
    left: str
    right: str
    difference: float
    interval: Interval | None
    p_value: float
    questions: int
    better: int
    worse: int

    def as_dict(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        return asdict(self)


@dataclass(frozen=True)
class Results:
    """All scores of an evaluation. settings: what it ran with. notes: what a reader should know."""

    scores: tuple[Score, ...]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in order."""
        return tuple(dict.fromkeys(score.task for score in self.scores))

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, in order."""
        return tuple(dict.fromkeys(score.method for score in self.scores))

    def score(self, task: str, method: str, metric: str | None = None) -> Score:
        """Return a score; the task's first metric when none is named. Raises ConfigError for what was not run."""
        for name, value, known in (("task", task, self.tasks), ("method", method, self.methods)):
            if value not in known:
                hint = did_you_mean(value, known) or f"there are {', '.join(known)}"
                raise ConfigError(f"these results have no {name} {value!r}", hint)
        scores = [score for score in self.scores if (score.task, score.method) == (task, method)]
        for score in scores:
            if metric in (None, score.metric):
                return score
        raise ConfigError(f"{task} has no metric {metric!r}", f"it has {', '.join(score.metric for score in scores)}")

    def compare(self, left: str, right: str, task: str | None = None) -> PairedComparison:
        """Compare two methods on a task, by its first metric that is a mean over questions.

        task: may be left out when there is one. Raises ConfigError when no metric has a value for each question.
        """
        if task is None:
            if len(self.tasks) != 1:
                raise ConfigError(f"there are {len(self.tasks)} tasks", f"name one of {', '.join(self.tasks)}")
            task = self.tasks[0]
        self.score(task, left), self.score(task, right)
        usable = [score for score in self.scores if score.task == task and score.questions is not None]
        for score in (score for score in usable if score.method == left):
            wanted = (right, score.metric, score.filter)
            for candidate in usable:
                if (candidate.method, candidate.metric, candidate.filter) == wanted:
                    return _paired_comparison(score, candidate)
        raise ConfigError(f"{task} has no metric that is a mean over questions, so its methods cannot be paired")

    def comparisons(self) -> tuple[PairedComparison, ...]:
        """Compare the first method with every other one, on every task that can be."""
        comparisons = []
        for task in self.tasks:
            first, *others = dict.fromkeys(score.method for score in self.scores if score.task == task)
            if self._paired(task):
                comparisons += [self.compare(first, other, task) for other in others]
        return tuple(comparisons)

    def as_dict(self, *, questions: bool = False) -> dict[str, Any]:
        """Return the form that `--json` prints. questions: with the value of every question in every run."""
        return {
            "settings": dict(self.settings),
            "scores": [score.as_dict(questions=questions) for score in self.scores],
            "comparisons": [comparison.as_dict() for comparison in self.comparisons()],
            "notes": list(self.notes),
        }

    def _paired(self, task: str) -> bool:
        return any(score.questions is not None for score in self.scores if score.task == task)


def _paired_comparison(left: Score, right: Score) -> PairedComparison:
    assert left.questions is not None
    assert right.questions is not None
    differences = left.questions.mean(axis=0) - right.questions.mean(axis=0)
    return PairedComparison(
        task=left.task,
        metric=left.metric,
        left=left.method,
        right=right.method,
        difference=float(differences.mean()),
        interval=t_interval(differences),
        p_value=sign_flip_p(differences),
        questions=differences.size,
        better=int((differences > 0).sum()),
        worse=int((differences < 0).sum()),
    )


def t_interval(values: Sequence[float] | Floats) -> Interval | None:
    """Return the 95 % interval of a mean by Student's t; None for fewer than two values."""
    array = np.asarray(values, dtype=np.float64)
    if array.size < 2:
        return None
    half = stats.t.ppf((1 + LEVEL) / 2, array.size - 1) * array.std(ddof=1) / np.sqrt(array.size)
    return float(array.mean() - half), float(array.mean() + half)


def sign_flip_p(differences: Floats, seed: int = 0) -> float:
    """Return the two-sided p-value of a mean difference of 0, from differences (n,) of paired values.

    If two methods are equally good, each question's difference could as well have had the other sign. The p-value is
    the share of sign patterns whose mean is as far from 0 as the one found; from 20,000 random patterns where there are
    too many to go through. With one yes-or-no answer a question this is McNemar's exact test.
    """
    moved = differences[differences != 0]
    if moved.size == 0:
        return 1.0
    if (abs(moved) == abs(moved[0])).all():
        return float(stats.binomtest(int((moved > 0).sum()), moved.size).pvalue)
    observed = abs(moved.sum()) * (1 - 1e-12)
    if moved.size <= _EXACT:
        patterns = np.array(list(product((-1.0, 1.0), repeat=moved.size))).reshape(-1, moved.size)
        return float((abs(patterns @ moved) >= observed).mean())
    rng = np.random.default_rng(seed)
    far = 0
    for _ in range(_FLIPS // _BLOCK):
        patterns = rng.integers(0, 2, size=(_BLOCK, moved.size)) * 2.0 - 1.0
        far += int((abs(patterns @ moved) >= observed).sum())
    return (far + 1) / (_FLIPS + 1)
