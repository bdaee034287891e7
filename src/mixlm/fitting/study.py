"""A fit and its check: weights from one part of scored texts, bits per byte on the other part.

What is fitted looks at the training part only, and the weights that are kept are those; the held-out part says what
they are worth on text they have not seen.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mixlm.fitting.gate_trainer import GateKind
from mixlm.fitting.gates import train_gate
from mixlm.fitting.likelihood import (
    WeightFit,
    bootstrap,
    equal_weights,
    expectation_maximisation,
    fit_by_prompt,
    grid_search,
)
from mixlm.routing import PromptRouter, Router
from mixlm.routing.gate_router import GateInputs, GateRouter
from mixlm.scoring.scores import Scores, concatenate, router_weights, split_holdout, with_leading_prompts
from mixlm.terminal import Progress
from mixlm.types import Floats


@dataclass(frozen=True)
class FitPlan:
    """What a study does.

    holdout: share of every text that is held out; 0 checks on the training text itself. bootstrap: refits for the
    intervals, 0 for none. step: of the grid, None for no grid. router: whether to train one. inputs, gate: what the
    router looks at, None for the text, and its kind. given: weights to compare.
    prompt: how many bytes of each passage of a bare text are its prompt, which is not scored.
    """

    holdout: float = 0.5
    bootstrap: int = 200
    step: float | None = None
    router: bool = False
    inputs: GateInputs | None = None
    gate: GateKind = "linear"
    given: Floats | None = None
    prompt: int = 0


@dataclass(frozen=True)
class FitRow:
    """One way to write, and its bits per byte on the check text. kind: "member" or "mixture".

    by_file, overall: of each file, and of all. weights: of the members, where they are the same for all text.
    """

    name: str
    kind: str
    by_file: tuple[float, ...]
    overall: float
    weights: Floats | None = None


@dataclass(frozen=True)
class FitStudy:
    """What was fitted, and how it did.

    train, check: scored parts of each file by its name; `held_out` says whether they are different text. by_prompt:
    EM's weights by prompt, and their sharpness, where texts have prompts.
    """

    train: Mapping[str, Scores]
    check: Mapping[str, Scores]
    held_out: bool
    em: WeightFit
    intervals: Floats | None
    grid: WeightFit | None
    by_prompt: tuple[PromptRouter, float] | None
    router: GateRouter | None
    router_seconds: float
    rows: tuple[FitRow, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names."""
        return next(iter(self.train.values())).names

    @property
    def best_member(self) -> FitRow:
        """The single member that does best on the check text."""
        return min((row for row in self.rows if row.kind == "member"), key=lambda row: row.overall)

    @property
    def seconds(self) -> float:
        """What the members took to read the training part, whenever they did."""
        return sum(scores.seconds for scores in self.train.values())

    def percent_below(self, row: FitRow) -> float:
        """Return how many percent of bits per byte a row lies below the best single member."""
        return 100 * (1 - row.overall / self.best_member.overall)

    def passes(self, engines: int) -> tuple[int, int | None]:
        """Return how many times a model reads a passage to fit by EM, and by a grid whose points are run anew."""
        once = engines * sum(scores.passages for scores in self.train.values())
        return once, None if self.grid is None else once * len(self.grid.trace)

    def as_dict(self, engines: int) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        once, anew = self.passes(engines)
        grid = self.grid and {
            "weights": self._named(self.grid.weights),
            "bits_per_byte": min(self.grid.trace),
            "points": len(self.grid.trace),
            "seconds": self.grid.seconds,
            "readings_anew": anew,
        }
        return {
            "members": list(self.names),
            "unit": next(iter(self.train.values())).unit,
            "files": [
                {"file": name, "train_bytes": scores.size, "check_bytes": self.check[name].size}
                for name, scores in self.train.items()
            ],
            "weights": self._named(self.em.weights),
            "intervals": None
            if self.intervals is None
            else dict(zip(self.names, self.intervals.tolist(), strict=True)),
            "em": {
                "rounds": len(self.em.trace),
                "converged": self.em.converged,
                "start_bits_per_byte": self.em.trace[0],
                "end_bits_per_byte": self.em.trace[-1],
                "seconds": self.em.seconds,
                "readings": once,
                "reading_seconds": self.seconds,
            },
            "by_prompt": self.by_prompt and {"sharpness": self.by_prompt[1]},
            "grid": grid,
            "router": self.router and {"seconds": self.router_seconds},
            "check": {
                "held_out": self.held_out,
                "best_member": self.best_member.name,
                "rows": [
                    {
                        "name": row.name,
                        "kind": row.kind,
                        "bits_per_byte": row.overall,
                        "percent_below_best_member": self.percent_below(row),
                        "files": dict(zip(self.check, row.by_file, strict=True)),
                    }
                    for row in self.rows
                ],
            },
        }

    def _named(self, weights: Floats) -> dict[str, float]:
        return dict(zip(self.names, weights.tolist(), strict=True))


def study(files: Mapping[str, Scores], plan: FitPlan, *, progress: Progress | None = None) -> FitStudy:
    """Fit weights, and a router where one is asked for, and check them.

    files: scored texts by name, of the same members. progress: called with what is done, how much of it, of how much.
    """
    if plan.prompt:
        files = {name: with_leading_prompts(scores, plan.prompt) for name, scores in files.items()}
    train, check = dict(files), dict(files)
    if plan.holdout:
        parts = {name: split_holdout(scores, plan.holdout) for name, scores in files.items()}
        train, check = ({name: part[side] for name, part in parts.items()} for side in (0, 1))
    whole = concatenate(list(train.values()))
    em = expectation_maximisation(whole)
    intervals = bootstrap(whole, rounds=plan.bootstrap) if plan.bootstrap else None
    grid = grid_search(whole, plan.step)[0] if plan.step is not None else None
    by_prompt = fit_by_prompt(whole, em.weights) if whole.prompt_bits.any() else None
    router, start = None, time.perf_counter()
    if plan.router:
        report = None if progress is None else partial(progress, "training the router")
        router = train_gate(list(train.values()), plan.inputs or GateInputs(("text",)), plan.gate, progress=report)
    seconds = time.perf_counter() - start
    rows = _members(check)
    rows.append(_fixed("equal weights", check, equal_weights(whole)))
    if plan.given is not None:
        rows.append(_fixed("weights as given", check, plan.given))
    rows.append(_fixed("EM", check, em.weights))
    if grid is not None:
        rows.append(_fixed("grid", check, grid.weights))
    if len(files) > 1:
        oracle = [check[name].mixture(expectation_maximisation(scores).weights) for name, scores in train.items()]
        rows.append(_row("EM, each file by itself", check, oracle))
    if by_prompt is not None:
        rows.append(_routed(f"by prompt, sharpness {by_prompt[1]:g}", check, by_prompt[0]))
    if router is not None:
        rows.append(_routed("router", check, router))
    return FitStudy(train, check, plan.holdout > 0, em, intervals, grid, by_prompt, router, seconds, tuple(rows))


def _members(check: Mapping[str, Scores]) -> list[FitRow]:
    names = next(iter(check.values())).names
    weights = np.eye(len(names))
    return [
        _row(name, check, [scores.logprobs[:, i] for scores in check.values()], kind="member", weights=weights[i])
        for i, name in enumerate(names)
    ]


def _fixed(name: str, check: Mapping[str, Scores], weights: Floats) -> FitRow:
    return _row(name, check, [scores.mixture(weights) for scores in check.values()], weights=weights)


def _routed(name: str, check: Mapping[str, Scores], router: Router) -> FitRow:
    return _row(name, check, [scores.mixture(router_weights(scores, router)) for scores in check.values()])


def _row(
    name: str,
    check: Mapping[str, Scores],
    logprobs: Sequence[Floats],
    *,
    kind: str = "mixture",
    weights: Floats | None = None,
) -> FitRow:
    by_file = tuple(scores.bits_per_byte(lp) for scores, lp in zip(check.values(), logprobs, strict=True))
    sizes = [scores.size for scores in check.values()]
    return FitRow(name, kind, by_file, float(np.average(by_file, weights=sizes)), weights)
