"""Speed against one thing that is varied: completions at once, length of the prompt, members, weights, devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, NamedTuple, cast

from mixlm.benchmark.measure import measured_costs, predicted_speed, run_interleaved, settings_record
from mixlm.benchmark.report import environment
from mixlm.benchmark.timing import (
    DEFAULT,
    Contestant,
    EnsembleContestant,
    TimedRun,
    contestants,
    single_member,
    time_run,
)
from mixlm.binding import LoadedMember
from mixlm.choices import UnitName
from mixlm.core.options import Options
from mixlm.engines.base import Session
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, did_you_mean
from mixlm.generation.prompt import EncodedPrompt
from mixlm.terminal import Progress
from research.benchmark import batch
from research.benchmark.agreement import with_agreement
from research.benchmark.compare import ComparisonPlan, record_agreement

AXES: Mapping[str, str] = {
    "batch": "completions at once",
    "context": "tokens of the prompt",
    "members": "members",
    "weights": "λ: weight of the first member",
    "devices": "devices",
}
# What is measured where nothing is named.
METHODS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(AXES, DEFAULT),
    "members": ("conventional", "mixture"),
    "weights": ("mixture",),
}
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)
MEMBERS = (1, 2, 3, 4, 5, 6, 7, 8)
LAMBDAS = tuple(round(step / 10, 1) for step in range(11))
TOGETHER, APART = "one for all", "one for each"


@dataclass(frozen=True)
class SweepPoint:
    """One method at one place of the axis. Speeds are medians over repeats, with the slowest and the fastest.

    predicted: tokens a second by the cost model. forwards: a token, by member, those of other completions in
    the same call counted too. more: what only this axis has.
    """

    series: str
    x: float | str
    tokens_per_second: float
    slowest: float
    fastest: float
    predicted: float | None = None
    forwards: Mapping[str, float] = field(default_factory=dict)
    acceptance: float | None = None
    memory_bytes: int | None = None
    more: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """All points of a sweep, what they were measured on, and what has to be known to read them."""

    kind: str
    points: tuple[SweepPoint, ...]
    environment: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the form that `--output` writes."""
        return {
            "sweep": self.kind,
            "axis": AXES[self.kind],
            "points": [asdict(point) for point in self.points],
            "environment": dict(self.environment),
            "notes": list(self.notes),
            **self.more,
        }


class _Place(NamedTuple):
    """A contestant at its place of the axis. whole: the ensemble it belongs to."""

    x: float | str
    series: str
    contestant: Contestant
    whole: Ensemble


class _SweepResult(NamedTuple):
    points: Sequence[SweepPoint]
    notes: Sequence[str] = ()
    more: Mapping[str, Any] = {}


@dataclass(frozen=True)
class _SweepTask:
    """What every sweep is given."""

    ensemble: Ensemble
    plan: ComparisonPlan
    options: Mapping[str, Any]
    progress: Progress | None
    apart: Callable[[], Ensemble] | None


def sweep_along(
    kind: str,
    ensemble: Ensemble,
    plan: ComparisonPlan,
    *,
    options: Options | None = None,
    progress: Progress | None = None,
    apart: Callable[[], Ensemble] | None = None,
) -> Sweep:
    """Measure `plan.methods` along an axis: a name in `AXES`.

    apart: loads the ensemble with a device for each member, for the axis of devices; None where there are too few.
    Raises ConfigError for an unknown axis and for places that cannot be.
    """
    kind = checked_axis(kind)
    ensemble, notes = plan.apply_agreement(ensemble)
    chosen: dict[str, Any] = {"seed": 0, **(options or {})}
    sweep = _SWEEPS[kind](_SweepTask(ensemble, plan, chosen, progress, apart))
    settings = settings_record(ensemble, plan, chosen)
    where = record_agreement(environment([member.engine for member in ensemble.members], settings), plan)
    return Sweep(kind, tuple(sweep.points), where, (*notes, *sweep.notes), sweep.more)


def checked_axis(name: str) -> str:
    """Return the name of an axis. Raises ConfigError for an unknown one."""
    if name not in AXES:
        raise ConfigError(f"there is no sweep {name!r}", did_you_mean(name, AXES) or f"there are {', '.join(AXES)}")
    return name


def _batch(task: _SweepTask) -> _SweepResult:
    plan = task.plan
    sizes = _whole(task.plan.places, 1) or batch.SIZES
    contestants = batch.batch_contestants(task.ensemble, plan.methods, sizes, plan.prompt, task.options)
    samples = run_interleaved(contestants, plan, task.progress)
    points = []
    for contestant, run in zip(contestants, samples, strict=True):
        served = [f.batch_size for sample in run for log in sample.forwards for f in log]
        more = {"replies_a_forward": len(served) / sum(1 / rows for rows in served)} if served else {}
        more["seconds_of_the_batch"] = median(contestant.whole[1:])
        points.append(_point(_Place(contestant.size, contestant.series, contestant, task.ensemble), run, None, more))
    whole = batch.compare_offline(contestants, plan.tokens)
    if whole is None:
        return _SweepResult(points)
    note = (
        f"{whole.replies} completions of {plan.tokens + 1} tokens by {whole.label}: {whole.together:.1f} s together, "
        f"{whole.one_by_one:.1f} s one by one: {whole.ratio:.2f} times"
    )
    return _SweepResult(points, [note], {"offline": {**asdict(whole), "ratio": whole.ratio}})


def _context(task: _SweepTask) -> _SweepResult:
    points: list[SweepPoint] = []
    notes: list[str] = []
    room = min(member.engine.context_length for member in task.ensemble.members) - task.plan.tokens - 2
    for length in _whole(task.plan.places, 2) or CONTEXTS:
        size = min(length, room)
        if size < length:
            notes.append(f"{size} tokens in place of {length}: a member's context holds no more")
        long = _long(task, size)
        sessions = [member.engine.session() for member in task.ensemble.members]
        for session, ids in zip(sessions, long.ids, strict=True):
            session.logits(ids)
        reading = {name: session.stats.seconds for name, session in zip(task.ensemble.names, sessions, strict=True)}
        contestants = [
            _LongContextContestant(contestant, long, sessions, task.ensemble.names)
            for contestant in _own(task, task.ensemble)
        ]
        for contestant, runs in zip(contestants, run_interleaved(contestants, task.plan, task.progress), strict=True):
            ms = 1e3 / median(sample.speed for sample in runs)
            more = {"ms_a_token": ms, **{f"seconds_to_read {name}": reading[name] for name in contestant.members}}
            points.append(_point(_Place(size, contestant.label, contestant, task.ensemble), runs, None, more))
    return _SweepResult(points, notes)


class _LongContextContestant:
    """A contestant after a prompt that its sessions have read already."""

    def __init__(
        self, contestant: EnsembleContestant, prompts: EncodedPrompt, sessions: Sequence[Session], names: Sequence[str]
    ) -> None:
        self.label, self.method, self.members, self.draft = (
            contestant.label,
            contestant.method,
            contestant.members,
            contestant.draft,
        )
        indices = [names.index(name) for name in contestant.members]
        self._own = contestant
        self._prompts = EncodedPrompt(tuple(prompts.ids[i] for i in indices), prompts.text)
        self._sessions = [sessions[i] for i in indices]

    def measure(self, sequence: int, tokens: int) -> TimedRun:
        """Write with the sessions as they are."""
        settings = self._own.settings.with_sequence_offset(sequence)
        return time_run(self._own.ensemble, settings, self._prompts, self._sessions, tokens)


def _long(task: _SweepTask, length: int) -> EncodedPrompt:
    """Return a prompt of so many tokens for every member: the usual one over and over, cut at the front."""
    text = f"{task.plan.prompt} " * (length // 2)
    return EncodedPrompt(
        tuple(member.engine.prompts.raw(text)[-length:] for member in task.ensemble.members), text.encode()
    )


def _members(task: _SweepTask) -> _SweepResult:
    first = task.ensemble.members[0]
    places: list[_Place] = []
    for count in _whole(task.plan.places, 1) or MEMBERS:
        copies = [LoadedMember(first.engine.replica(), f"{first.name}-{i + 1}", first.sampling) for i in range(count)]
        copied = Ensemble(copies, unit=_unit(task.ensemble), defaults=task.ensemble.defaults)
        places += [
            _Place(count, contestant.label, contestant, copied)
            for contestant in _own(task, copied)
            if contestant.method != "single"
        ]
    places.append(
        _Place(1, "single", _own(task, single_member(task.ensemble, 0), ["single"])[0], single_member(task.ensemble, 0))
    )
    note = f"members are copies of {first.name}: each is run for itself, and all share one copy of the weights"
    return _SweepResult(_measured(task, places), [note])


def _weights(task: _SweepTask) -> _SweepResult:
    if len(task.ensemble.members) != 2:
        raise ConfigError(
            f"there are {len(task.ensemble.members)} members", "λ is one member's weight against another's"
        )
    places: list[_Place] = []
    for place in task.plan.places or LAMBDAS:
        if not 0 <= place <= 1:
            raise ConfigError(f"λ is {place:g}; it must be from 0 to 1")
        ensemble = weighted(task.ensemble, (place, 1 - place))
        places += [
            _Place(place, contestant.label, contestant, ensemble)
            for contestant in _own(task, ensemble)
            if contestant.method != "single"
        ]
    singles = [
        _Place("alone", contestant.label, contestant, task.ensemble)
        for contestant in _own(task, task.ensemble, ["single"])
    ]
    return _SweepResult(_measured(task, [*places, *singles]))


def _devices(task: _SweepTask) -> _SweepResult:
    places = [_Place(TOGETHER, contestant.label, contestant, task.ensemble) for contestant in _own(task, task.ensemble)]
    if task.apart is None:
        note = f"there is one device here, so the {len(task.ensemble.members)} members were measured on it alone"
        return _SweepResult(_measured(task, places), [note])
    ensemble = task.apart()
    if task.plan.agreement is not None:
        ensemble = with_agreement(ensemble, task.plan.agreement)
    places += [
        _Place(APART, contestant.label, contestant, ensemble)
        for contestant in _own(task, ensemble)
        if contestant.method != "single"
    ]
    return _SweepResult(_measured(task, places))


_SWEEPS: Mapping[str, Callable[[_SweepTask], _SweepResult]] = {
    "batch": _batch,
    "context": _context,
    "members": _members,
    "weights": _weights,
    "devices": _devices,
}


def weighted(ensemble: Ensemble, weights: Sequence[float]) -> Ensemble:
    """Return the same members with other weights."""
    return Ensemble(ensemble.members, weights, unit=_unit(ensemble), defaults=ensemble.defaults)


def _unit(ensemble: Ensemble) -> UnitName:
    return cast(UnitName, ensemble.unit.name)


def _own(task: _SweepTask, ensemble: Ensemble, kinds: Sequence[str] = ()) -> list[EnsembleContestant]:
    return contestants(ensemble, kinds or task.plan.methods, task.plan.prompt, task.options)


def _measured(task: _SweepTask, places: Sequence[_Place]) -> list[SweepPoint]:
    """Measure all places in turns, and set the cost model's figure beside each."""
    samples = run_interleaved([place.contestant for place in places], task.plan, task.progress)
    known = [(place, run) for place, run in zip(places, samples, strict=True)]
    points = []
    for place, runs in known:
        alike = [
            (other.contestant, theirs)
            for other, theirs in known
            if set(other.contestant.members) <= set(place.whole.names)
        ]
        fit = measured_costs(place.whole, [other for other, _ in alike], [theirs for _, theirs in alike])
        points.append(_point(place, runs, predicted_speed(place.whole, place.contestant, runs, fit), {}))
    return points


def _point(place: _Place, runs: Sequence[TimedRun], expected: float | None, more: Mapping[str, float]) -> SweepPoint:
    tokens = sum(sample.tokens for sample in runs)
    drafted = sum(sample.drafted for sample in runs)
    return SweepPoint(
        series=place.series,
        x=place.x,
        tokens_per_second=median(sample.speed for sample in runs),
        slowest=min(sample.speed for sample in runs),
        fastest=max(sample.speed for sample in runs),
        predicted=expected,
        forwards={
            name: sum(len(sample.forwards[i]) for sample in runs) / tokens
            for i, name in enumerate(place.contestant.members)
        },
        acceptance=sum(sample.accepted for sample in runs) / drafted if drafted else None,
        memory_bytes=max((sample.memory for sample in runs if sample.memory is not None), default=None),
        more=more,
    )


def _whole(places: Sequence[float], least: int) -> tuple[int, ...]:
    """Return places as whole numbers. Raises ConfigError for others."""
    for place in places:
        if place != int(place) or place < least:
            raise ConfigError(f"{place:g} is no place of this sweep", f"give whole numbers, {least} or more")
    return tuple(int(place) for place in places)
