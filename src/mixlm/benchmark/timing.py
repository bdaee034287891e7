"""One timed run: a number of tokens behind a prompt that every member has read.

A run first reads the prompt (time to first token), then lets every member read it, so that what follows is decoding
alone; of that, the time inside forwards is known from the sessions, and the rest is what mixlm itself costs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from mixlm.benchmark.report import memory_in_use
from mixlm.config import METHODS, Method, supported_methods
from mixlm.core.options import GenerationOptions
from mixlm.core.rng import Noise
from mixlm.engines.base import Forward, Session
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, did_you_mean
from mixlm.generation.generation import EncodedPrompt

DEFAULT = ("single", "conventional", "mixture")
# "drafted" is greedy decoding with a draft.
KINDS: tuple[str, ...] = (*DEFAULT, *(one for one in METHODS if one not in DEFAULT), "drafted")
_AHEAD = ("speculative", "drafted")
_CHEAPER = 0.75  # of the weights of the largest member, up to which the smallest drafts unless a draft is named


@dataclass(frozen=True, slots=True)
class TimedRun:
    """One timed run.

    tokens: that were written in `seconds`. first: seconds to the first token, which is not among them. forwards: those
    of the decoding, by member. outside: seconds outside forwards, by token. memory: bytes in use at its end.
    """

    tokens: int
    seconds: float
    first: float
    bytes: int
    forwards: list[list[Forward]]
    outside: list[float] = field(default_factory=list)
    checked: int = 0
    accepted: int = 0
    chosen: str | None = None
    memory: int | None = None

    @property
    def inside(self) -> float:
        """Seconds inside forwards."""
        return sum(one.seconds for member in self.forwards for one in member)

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


class Contestant(Protocol):
    """Something whose speed is measured. label: unique in a run. draft: who writes ahead, if anybody does."""

    label: str
    method: str
    members: tuple[str, ...]
    draft: str | None

    def measure(self, sequence: int, tokens: int) -> TimedRun:
        """Write `tokens` tokens behind the first one. Equal sequences write equal texts."""
        ...


class EnsembleContestant:
    """One method of an ensemble, or one of its members alone. kind: one of `KINDS`."""

    def __init__(self, ensemble: Ensemble, kind: str, prompt: str, options: Mapping[str, Any]) -> None:
        self.method = kind
        self.members = ensemble.names
        self.label = kind if kind != "single" else f"single {ensemble.names[0]}"
        self.ensemble = ensemble
        self._prompt = prompt
        self.settings = method_settings(ensemble, kind, options)
        self.draft = draft_name(ensemble, self.settings) if kind in _AHEAD else None

    def measure(self, sequence: int, tokens: int) -> TimedRun:
        """Write with new sessions."""
        settings = replace(self.settings, sequence=sequence)
        sessions = [one.engine.session() for one in self.ensemble.members]
        return time_run(self.ensemble, settings, self.ensemble.encode_prompt(self._prompt, settings), sessions, tokens)


def contestants(
    ensemble: Ensemble, kinds: Sequence[str], prompt: str, options: Mapping[str, Any]
) -> list[EnsembleContestant]:
    """Return what is measured for these kinds; `single` stands for each member alone. Raises ConfigError."""
    if tuple(kinds) == DEFAULT:
        kinds = [one for one in kinds if one in supported_methods(ensemble.unit.name)]
    found: list[EnsembleContestant] = []
    for kind in dict.fromkeys(checked_kinds(kinds)):
        those = [ensemble] if kind != "single" else [single_member(ensemble, i) for i in range(len(ensemble.members))]
        found += [EnsembleContestant(one, kind, prompt, options) for one in those]
    return found


def checked_kinds(kinds: Sequence[str]) -> Sequence[str]:
    """Return the kinds of a benchmark. Raises ConfigError for none, and for an unknown one."""
    if not kinds:
        raise ConfigError("no method is named", f"there are {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            hint = did_you_mean(kind, KINDS) or f"there are {', '.join(KINDS)}"
            raise ConfigError(f"there is no method {kind!r} to measure", hint)
    return kinds


def single_member(ensemble: Ensemble, member: int) -> Ensemble:
    """Return one member as an ensemble of its own."""
    return Ensemble([ensemble.members[member]], defaults=ensemble.defaults)


def method_settings(ensemble: Ensemble, kind: str, options: Mapping[str, Any]) -> GenerationOptions:
    """Return the settings of a kind: a draft is for those that write ahead. End-of-text is never drawn."""
    given = {name: value for name, value in options.items() if name != "draft" or kind in _AHEAD}
    method: Method = next((one for one in METHODS if one == kind), "greedy")
    if kind == "drafted" and given.get("draft") is None:
        given["draft"] = default_draft(ensemble)
    return ensemble.settings(**{"seed": 0, **given, "method": method, "ignore_end": True})


def draft_name(ensemble: Ensemble, settings: GenerationOptions) -> str:
    """Return what writes ahead by these settings: a member's name, or "lookup"."""
    return settings.draft if settings.draft is not None else default_draft(ensemble)


def default_draft(ensemble: Ensemble) -> str:
    """Return the smallest member where it is clearly smaller than another that has weight, else "lookup"."""
    sizes = [one.engine.weights_bytes for one in ensemble.members]
    smallest = min(range(len(sizes)), key=lambda i: sizes[i])
    others = [size for i, size in enumerate(sizes) if i != smallest and ensemble.weights[i] > 0]
    return ensemble.names[smallest] if others and sizes[smallest] <= _CHEAPER * max(others) else "lookup"


def time_run(
    ensemble: Ensemble, settings: GenerationOptions, prompts: EncodedPrompt, sessions: Sequence[Session], tokens: int
) -> TimedRun:
    """Write one token, let every member read, then write `tokens` more and time those."""
    writer = ensemble.context(settings, sessions)
    start = time.perf_counter()
    writing = writer.begin_sequence(prompts)
    [choice] = writer.decode_step(writing, Noise(settings.seed, settings.sequence, 0))
    first = time.perf_counter() - start
    for i, session in enumerate(sessions):
        session.logits(writing.state.ids(i))
    writing.append(choice)
    before = [len(one.stats.forwards) for one in sessions]
    checked, accepted = writer.speculation.drafted, writer.speculation.accepted
    size = 0
    outside: list[float] = []
    begin = step = time.perf_counter()
    while len(outside) < tokens:
        seen = [len(one.stats.forwards) for one in sessions]
        noise = Noise(settings.seed, settings.sequence, len(outside) + 1)
        choices = writer.decode_step(writing, noise, tokens - len(outside))
        for choice in choices:
            writing.append(choice)
            size += len(ensemble.unit.symbol_bytes(choice.symbol))
        now = time.perf_counter()
        inside = sum(f.seconds for one, n in zip(sessions, seen, strict=True) for f in one.stats.forwards[n:])
        outside += [(now - step - inside) / len(choices)] * len(choices)
        step = now
    return TimedRun(
        tokens=tokens,
        seconds=step - begin,
        first=first,
        bytes=size,
        forwards=[one.stats.forwards[n:] for one, n in zip(sessions, before, strict=True)],
        outside=outside,
        checked=writer.speculation.drafted - checked,
        accepted=writer.speculation.accepted - accepted,
        chosen=writer.speculation.plan,
        memory=memory_in_use(),
    )
