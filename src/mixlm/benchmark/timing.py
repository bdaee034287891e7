"""One timed run: a number of tokens after a prompt that every member has prefilled.

A run generates the first token (time to first token), then lets every member prefill, so that what follows is decoding
alone. The sessions know the time inside forwards; the rest is the overhead of mixlm.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from mixlm.benchmark.report import memory_in_use
from mixlm.choices import METHODS
from mixlm.core.options import GenerationOptions, without_rule
from mixlm.core.rng import Noise
from mixlm.decoding.drafts import LookupDraft, default_draft
from mixlm.engines.base import Session
from mixlm.engines.requests import Forward
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, did_you_mean
from mixlm.generation.prompt import EncodedPrompt
from mixlm.routing.base import observed_by

DEFAULT = ("single", "conventional", "mixture")
# "drafted" is greedy decoding with a draft.
KINDS: tuple[str, ...] = (*DEFAULT, *(method for method in METHODS if method not in DEFAULT), "drafted")
_DRAFTING = ("speculative", "drafted")


@dataclass(frozen=True, slots=True)
class TimedRun:
    """One timed run: tokens and bytes generated in `seconds`, without the first token.

    first: seconds to the first token. forwards: of decoding, by member. outside: seconds outside forwards, by token.
    drafted, accepted: drafts that were verified, and accepted. plan: what `auto` did last. memory: bytes in use at the
    end.
    """

    tokens: int
    seconds: float
    first: float
    bytes: int
    forwards: list[list[Forward]]
    outside: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    plan: str | None = None
    memory: int | None = None

    @property
    def inside(self) -> float:
        """Seconds inside forwards."""
        return sum(forward.seconds for member in self.forwards for forward in member)

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class Contestant(Protocol):
    """Something whose speed is measured. label: unique in a benchmark. draft: what drafts, None for nothing."""

    label: str
    method: str
    members: tuple[str, ...]
    draft: str | None

    def measure(self, sequence: int, tokens: int) -> TimedRun:
        """Generate `tokens` tokens after the first one. Equal sequence numbers give equal texts."""
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
        self.draft = self.settings.draft

    def measure(self, sequence: int, tokens: int) -> TimedRun:
        """Generate with new sessions, which find nothing in a prefix cache."""
        for member in self.ensemble.members:
            member.engine.drop_prefixes()
        settings = replace(self.settings, sequence=sequence)
        sessions = [member.engine.session() for member in self.ensemble.members]
        return time_run(self.ensemble, settings, self.ensemble.encode_prompt(self._prompt, settings), sessions, tokens)


def contestants(
    ensemble: Ensemble, kinds: Sequence[str], prompt: str, options: Mapping[str, Any]
) -> list[EnsembleContestant]:
    """Return a contestant for each kind, for `single` one of each member. Raises ConfigError."""
    if tuple(kinds) == DEFAULT:
        rule = method_settings(ensemble, "conventional", options).rule
        kinds = DEFAULT if rule is None else ("single", "conventional", "layered")
        kinds = [method for method in kinds if method in ensemble.unit.traits.methods]
    for option, drafting in (("draft", _DRAFTING), ("block", (*_DRAFTING, "auto", "layered"))):
        if option in options and not {*kinds} & {*drafting}:
            raise ConfigError(
                f"{option} is {options[option]!r}, and no method that is measured drafts",
                f"leave it out, or measure {' or '.join(drafting)} too",
            )
    singles = [single_member(ensemble, i) for i in range(len(ensemble.members))]
    return [
        EnsembleContestant(measured, kind, prompt, options)
        for kind in dict.fromkeys(checked_kinds(kinds))
        for measured in (singles if kind == "single" else [ensemble])
    ]


def checked_kinds(kinds: Sequence[str]) -> Sequence[str]:
    """Return the kinds. Raises ConfigError for an empty list or an unknown kind."""
    if not kinds:
        raise ConfigError("no method is named", f"there are {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            hint = did_you_mean(kind, KINDS) or f"there are {', '.join(KINDS)}"
            raise ConfigError(f"there is no method {kind!r} to measure", hint)
    return kinds


def single_member(ensemble: Ensemble, member: int) -> Ensemble:
    """Return an ensemble of one member."""
    return Ensemble([ensemble.members[member]], defaults=ensemble.defaults)


def method_settings(ensemble: Ensemble, kind: str, options: Mapping[str, Any]) -> GenerationOptions:
    """Return the settings of a kind; a draft applies to those that draft, a rule to several members.

    End-of-text is masked.
    """
    draft = None
    if kind in _DRAFTING:
        draft = default_draft_name(ensemble) if options.get("draft") is None else options["draft"]
    applicable = without_rule(options) if kind == "single" else options
    method = "greedy" if kind == "drafted" else kind
    return ensemble.settings(**{"seed": 0, **applicable, "draft": draft, "method": method, "ignore_end": True})


def default_draft_name(ensemble: Ensemble) -> str:
    """Return what drafts unless a draft is named: a member's name, or "lookup"."""
    observed = observed_by(ensemble.router)
    sizes = [member.engine.weights_bytes for member in ensemble.members]
    member = default_draft(sizes, ensemble.weights) if observed is None else observed.member
    return LookupDraft.name if member is None else ensemble.names[member]


def time_run(
    ensemble: Ensemble, settings: GenerationOptions, prompts: EncodedPrompt, sessions: Sequence[Session], tokens: int
) -> TimedRun:
    """Generate one token, let every member prefill, then generate `tokens` more and time those."""
    context = ensemble.context(settings, sessions)
    start = time.perf_counter()
    sequence = context.begin_sequence(prompts)
    [choice] = context.decode_step(sequence, Noise(settings.seed, settings.sequence, 0))
    first = time.perf_counter() - start
    for i, session in enumerate(sessions):
        session.logits(sequence.state.ids(i))
    sequence.state.append(choice.symbol)
    before = [len(session.stats.forwards) for session in sessions]
    drafted, accepted = context.speculation.drafted, context.speculation.accepted
    size = 0
    outside: list[float] = []
    start_decoding = step_start = time.perf_counter()
    while len(outside) < tokens:
        seen = [len(session.stats.forwards) for session in sessions]
        noise = Noise(settings.seed, settings.sequence, len(outside) + 1)
        choices = context.decode_step(sequence, noise, tokens - len(outside))
        for choice in choices:
            sequence.state.append(choice.symbol)
            size += len(ensemble.unit.symbol_bytes(choice.symbol))
        now = time.perf_counter()
        inside = sum(
            forward.seconds for session, n in zip(sessions, seen, strict=True) for forward in session.stats.forwards[n:]
        )
        outside += [(now - step_start - inside) / len(choices)] * len(choices)
        step_start = now
    return TimedRun(
        tokens=tokens,
        seconds=step_start - start_decoding,
        first=first,
        bytes=size,
        forwards=[session.stats.forwards[n:] for session, n in zip(sessions, before, strict=True)],
        outside=outside,
        drafted=context.speculation.drafted - drafted,
        accepted=context.speculation.accepted - accepted,
        plan=context.speculation.plan,
        memory=memory_in_use(),
    )
