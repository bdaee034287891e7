"""What an experiment is: ensembles, tasks, methods and sizes, as frozen values. Nothing here runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, count, pairwise
from pathlib import PurePath
from typing import Any

from mixlm.config import EnsembleConfig, MemberConfig
from mixlm.core.mixing import normalized_weights
from mixlm.errors import ConfigError, UnsupportedError, did_you_mean
from research.paper import published

Weights = tuple[float, ...]
TASKS = ("mixlm_gsm8k", "mixlm_mmlu", "mixlm_bbh", "mixlm_arc_challenge")
# The paper's names of the tasks. It does not say which part of ARC it took.
COLUMNS = {
    "mixlm_gsm8k": "GSM8K",
    "mixlm_mmlu": "MMLU",
    "mixlm_bbh": "BBH",
    "mixlm_arc_challenge": "ARC",
    "mixlm_arc_easy": "ARC",
}
SEARCH_SEED = 10_000
_ELEVEN = tuple(round(step / 10, 1) for step in range(11))


@dataclass(frozen=True)
class Lineup:
    """An ensemble of an experiment. published: the paper's names of its models, where it is one of the paper's."""

    config: EnsembleConfig
    published: published.Names | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names."""
        return tuple(member.name or member.model for member in self.config.members)

    @property
    def label(self) -> str:
        """The members' names as one text."""
        return " + ".join(self.names)

    @property
    def weights(self) -> Weights:
        """The members' weights, summing to 1; equal when the ensemble has none."""
        weights = normalized_weights(self.config.weights(), len(self.config.members))
        return tuple(round(weight, 12) for weight in weights.tolist())


@dataclass(frozen=True)
class Experiment:
    """One table or figure of the paper.

    methods: of the accuracy runs, none for an experiment on speed alone. lambdas: weights of the first of two members;
    each ensemble's own weights when empty. limit: questions a task. max_tokens: of a completion, the task's when None.
    tokens, repeats: of a speed run. data: a folder of questions, None for the hub. search: for each ensemble, take the
    weights of a grid in steps of 0.1 with which ME is the most accurate, as the paper does for its tables.
    """

    name: str
    about: str
    lineups: tuple[Lineup, ...]
    methods: tuple[str, ...] = ()
    speed: bool = False
    tasks: tuple[str, ...] = TASKS
    top_k: tuple[int, ...] = (5,)
    lambdas: tuple[float, ...] = ()
    seeds: int = 5
    limit: int | None = None
    max_tokens: int | None = None
    tokens: int = 256
    repeats: int = 5
    data: str | None = None
    search: bool = False

    def __post_init__(self) -> None:
        for name in ("seeds", "tokens", "repeats", *(("limit",) if self.limit is not None else ())):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not self.top_k or any(k < 0 for k in self.top_k):
            raise ConfigError(f"top-k is {list(self.top_k)}; give whole numbers, 0 or more")
        if self.search and (self.lambdas or not self.methods):
            raise ConfigError(f"{self.name} has no weights to search", "tables 2 and 3 have")
        for lineup in self.lineups:
            if lineup.config.router.kind != "fixed":
                raise UnsupportedError(f"{lineup.label} has a router; the paper's experiments have fixed weights")
            if self.search and len(lineup.names) < 2:
                raise ConfigError(f"{lineup.label} is one member", "there are no weights to search")
            if self.lambdas and len(lineup.names) != 2:
                raise ConfigError(
                    f"{lineup.label} has {len(lineup.names)} member{'' if len(lineup.names) == 1 else 's'}",
                    f"{self.name} varies the weight of one member against another: give two",
                )

    @property
    def title(self) -> str:
        """What the paper calls it, and what it is about."""
        return f"{self.name[:-1].capitalize()} {self.name[-1]}: {self.about}"

    @property
    def reduced(self) -> str | None:
        """What is smaller than in the paper, None when nothing is."""
        whole = make(self.name)
        parts = []
        if self.methods:
            parts += [f"{self.limit} questions a task"] if self.limit is not None else []
            parts += [f"{self.seeds} seed{'' if self.seeds == 1 else 's'}"] if self.seeds < whole.seeds else []
            parts += [f"completions of at most {self.max_tokens} tokens"] if self.max_tokens is not None else []
            lacking = {COLUMNS[task] for task in whole.tasks} - {COLUMNS.get(task) for task in self.tasks}
            if lacking and self.name.startswith("table"):  # the text does not say which task the figures show
                parts.append(f"without {', '.join(sorted(map(str, lacking)))}")
            lacking_k = [str(k) for k in whole.top_k if k not in self.top_k]
            parts += [f"without top-k {' and '.join(lacking_k)}"] if lacking_k else []
        if len(self.lambdas) < len(whole.lambdas):
            parts.append(f"λ in {len(self.lambdas)} steps")
        if self.speed and (self.tokens < whole.tokens or self.repeats < whole.repeats):
            parts.append(f"{self.repeats} speed run{'' if self.repeats == 1 else 's'} of {self.tokens} tokens")
        return f"reduced: {', '.join(parts)}" if parts else None

    def settings(self) -> dict[str, Any]:
        """Return what it runs with, for reports."""
        settings: dict[str, Any] = {
            "ensembles": {
                lineup.label: {
                    "models": [member.model for member in lineup.config.members],
                    "weights": "searched" if self.search else [list(weights) for weights in self.weights(lineup)],
                }
                for lineup in self.lineups
            },
            "top_k": list(self.top_k),
            "temperature": 1.0,
        }
        if self.methods:
            settings |= {"tasks": list(self.tasks), "seeds": self.seeds, "limit": self.limit}
            settings |= {"max_tokens": self.max_tokens, "data": self.data}
        if self.speed:
            settings |= {"tokens": self.tokens, "repeats": self.repeats}
        return settings

    def weights(self, lineup: Lineup) -> tuple[Weights, ...]:
        """Return the weights an ensemble is run with."""
        if self.lambdas:
            return tuple((weight, round(1 - weight, 12)) for weight in self.lambdas)
        return (lineup.weights,)


_BOTH = ("mixture", "conventional")
_SPECS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment("table2", "accuracy of similar models", (), ("single", *_BOTH), top_k=(5, 10)),
        Experiment("table3", "accuracy of heterogeneous models", (), ("single", *_BOTH), top_k=(5, 10)),
        Experiment("table4", "speed", (), speed=True),
        # The text does not say which task figures 2 and 4 show.
        Experiment(
            "figure2",
            "accuracy and speed against λ, models of different sizes",
            (),
            ("mixture",),
            speed=True,
            tasks=("mixlm_gsm8k",),
            lambdas=_ELEVEN,
        ),
        Experiment("figure3", "speed by device", (), speed=True),
        Experiment("figure4", "accuracy against λ", (), _BOTH, tasks=("mixlm_gsm8k",), lambdas=_ELEVEN),
    )
}
NAMES = tuple(_SPECS)


def make(name: str, lineups: Sequence[Lineup] = (), *, quick: bool = False) -> Experiment:
    """Return an experiment by name: with the paper's ensembles and sizes, or given ensembles, or reduced.

    quick: the demo pair unless ensembles are given, and sizes for a small machine. Raises ConfigError for an unknown
    name.
    """
    if name not in _SPECS:
        raise ConfigError(
            f"there is no experiment {name!r}", did_you_mean(name, NAMES) or f"there are {', '.join(NAMES)}"
        )
    experiment = _SPECS[name]
    if quick:
        experiment = replace(experiment, limit=20, seeds=2, max_tokens=48, top_k=(5,), tokens=32, repeats=3)
        experiment = replace(experiment, lambdas=(0.0, 0.25, 0.5, 0.75, 1.0) if experiment.lambdas else ())
    if not lineups:
        lineups = (_demo(name),) if quick else tuple(_of_the_paper(names) for names in published.ENSEMBLES[name])
    return replace(experiment, lineups=tuple(lineups))


def grid(members: int, steps: int = 10) -> Iterator[Weights]:
    """Give all weights in equal steps in which every member has a part."""
    for cuts in combinations(range(1, steps), members - 1):
        yield tuple((b - a) / steps for a, b in pairwise((0, *cuts, steps)))


def lineup(config: EnsembleConfig) -> Lineup:
    """Return an ensemble as part of an experiment; one of the paper's is recognised, and gets its names."""
    published_names = published.find([member.model for member in config.members])
    names: list[str] = []
    members = []
    for member in config.members:
        last = PurePath(member.model).name
        theirs = [name for name in published_names or () if published.last_part(name) == last.lower()]
        name = theirs[0] if theirs else member.name or last
        name = name if name not in names else next(new for i in count(2) if (new := f"{name}-{i}") not in names)
        names.append(name)
        members.append(member.model_copy(update={"name": name}))
    return Lineup(config.model_copy(update={"members": tuple(members)}), published_names)


def distinct(lineups: Sequence[Lineup]) -> Iterator[Lineup]:
    """Give each ensemble once. Raises ConfigError when two that differ would have the same label."""
    seen: dict[str, Lineup] = {}
    for lineup in lineups:
        if lineup.label not in seen:
            seen[lineup.label] = lineup
            yield lineup
        elif seen[lineup.label] != lineup:
            raise ConfigError(f"two ensembles are both called {lineup.label}", "give the members of one other names")


def _of_the_paper(names: published.Names) -> Lineup:
    members = tuple(MemberConfig(model=published.MODELS[name].hub, name=name) for name in names)
    return Lineup(EnsembleConfig(members=members), names)


def _demo(name: str) -> Lineup:
    from mixlm.models.catalog import GROUPS

    names = list(GROUPS["demo"])
    if name == "figure2":
        names.reverse()  # the larger one first: λ is its weight
    return lineup(EnsembleConfig(members=tuple(MemberConfig(model=name) for name in names)))
