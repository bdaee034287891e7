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
            "intervals": None if self.intervals is None else self._named(self.intervals),
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

    def _named(self, values: Floats) -> dict[str, Any]:
        return dict(zip(self.names, values.tolist(), strict=True))


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
    grid = grid_search(whole, plan.step) if plan.step is not None else None
    by_prompt = fit_by_prompt(whole, em.weights) if whole.prompt_bits.any() else None
    router, start = None, time.perf_counter()
    if plan.router:
        report = None if progress is None else partial(progress, "training the router")
        router = train_gate(list(train.values()), plan.inputs or GateInputs(("text",)), plan.gate, progress=report)
    seconds = time.perf_counter() - start
    fixed = [("equal weights", equal_weights(whole))]
    if plan.given is not None:
        fixed.append(("weights as given", plan.given))
    fixed.append(("EM", em.weights))
    if grid is not None:
        fixed.append(("grid", grid.weights))
    alone = zip(whole.names, np.eye(len(whole.names)), strict=True)
    rows = [_row(name, check, [weights] * len(check), kind="member", weights=weights) for name, weights in alone]
    rows += [_row(name, check, [weights] * len(check), weights=weights) for name, weights in fixed]
    if len(files) > 1:
        own = [expectation_maximisation(scores).weights for scores in train.values()]
        rows.append(_row("EM, each file by itself", check, own))
    routers: dict[str, Router] = {} if router is None else {"router": router}
    if by_prompt is not None:
        routers = {f"by prompt, sharpness {by_prompt[1]:g}": by_prompt[0], **routers}
    for name, routed in routers.items():
        rows.append(_row(name, check, [router_weights(scores, routed) for scores in check.values()]))
    return FitStudy(train, check, plan.holdout > 0, em, intervals, grid, by_prompt, router, seconds, tuple(rows))


def _row(
    name: str,
    check: Mapping[str, Scores],
    by_file: Sequence[Floats],
    *,
    kind: str = "mixture",
    weights: Floats | None = None,
) -> FitRow:
    """Return the row of the weights of each file. weights: where they are the same for all text."""
    pairs = list(zip(check.values(), by_file, strict=True))
    bits = tuple(scores.bits_per_byte(scores.mixture(own)) for scores, own in pairs)
    return FitRow(name, kind, bits, float(np.average(bits, weights=[scores.size for scores, _ in pairs])), weights)
