"""Inspect an ensemble without running a model: its members, and the units and methods that are possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from mixlm.choices import METHODS, RULES, UNITS, UnitName
from mixlm.core.combinations.base import Combination
from mixlm.core.rule_options import rule_as_dict
from mixlm.decoding.layered import has_envelope
from mixlm.ensemble import Ensemble
from mixlm.errors import MixlmError
from mixlm.generation.target import assign_roles
from mixlm.routing.base import observed_by
from mixlm.routing.gate_router import GateInputs


@dataclass(frozen=True, slots=True)
class MemberReport:
    """One member, as far as it is known without running it.

    Attributes:
        rows: Size of the output layer, including padding.
        pieces: Number of distinct byte strings among its tokens.
        control: Number of control tokens.
        ends: The ids that end a completion, by name.
        reading, details: What the engine reports about its tokenizer, and about itself.
        prompt: The prompt for the question, with its control tokens spelled out.
        shares: The first member that shares its weights, if any.
    """

    name: str
    weight: float
    rows: int
    pieces: int
    control: int
    ends: Mapping[str, int]
    reading: Mapping[str, str]
    details: Mapping[str, str]
    prompt: str
    prompt_tokens: int
    stops: tuple[str, ...]
    context_length: int
    weights_bytes: int
    shares: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Feasibility:
    """Whether a unit or a method is possible for the ensemble, and if not, the reason."""

    kind: str
    name: str
    possible: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class PairReport:
    """How far two members agree. What is measured on a sample text is None if no model was run.

    Attributes:
        common: Number of byte strings that are tokens of both.
        share: `common` as a fraction of each member's pieces.
        mass: Each member's probability of pieces that the other has too, including end of text; mean over positions.
        distance: Total variation between the two next-token distributions over shared symbols; mean over `places`.
        places: Number of positions in the text where both members have a token boundary.
    """

    members: tuple[str, str]
    common: int
    share: tuple[float, float]
    mass: tuple[float, float] | None = None
    distance: float | None = None
    places: int = 0


@dataclass(frozen=True, slots=True)
class RuleReport:
    """What a combination rule needs, and what it costs on a sample.

    Attributes:
        parameters: Those that are given.
        roles: The member of each role.
        needs: What it asks of the members.
        bounds: How a position is decided before all members have run.
        tokens: Length of the sample in tokens; 0 if no model was run.
        stopped: The share of the other members' forwards that was not needed, without drafts.
        forwards: Forwards of members for each token by `layered`, with its drafts.
        drafted, accepted: Drafts that were verified, and accepted.
        tokens_per_second: Of `layered`.
    """

    name: str
    parameters: Mapping[str, Any]
    roles: Mapping[str, str]
    needs: tuple[str, ...]
    bounds: str
    tokens: int = 0
    stopped: float = 0.0
    forwards: float = 0.0
    drafted: int = 0
    accepted: int = 0
    tokens_per_second: float = 0.0
    conventional_tokens_per_second: float = 0.0


def describe_members(ensemble: Ensemble, question: str, options: Mapping[str, Any]) -> tuple[MemberReport, ...]:
    """Describe each member. Raises what `Ensemble.encode_prompt` raises for the question."""
    prompts = ensemble.encode_prompt(question, ensemble.settings(**options)).ids
    reports = []
    for i, (member, ids) in enumerate(zip(ensemble.members, prompts, strict=True)):
        engine, vocabulary = member.engine, member.engine.vocabulary
        pieces = [vocabulary.tokens[token] or vocabulary.name(token).encode() for token in ids.tolist()]
        earlier = [
            other.name
            for other in ensemble.members[:i]
            if other.engine.weight_parts.keys() & engine.weight_parts.keys()
        ]
        reports.append(
            MemberReport(
                name=member.name,
                weight=float(ensemble.weights[i]),
                rows=vocabulary.size,
                pieces=len(set(vocabulary.tokens) - {b""}),
                control=len(vocabulary.special_ids),
                ends={vocabulary.name(end): end for end in sorted(vocabulary.end_ids)},
                reading=dict(engine.tokenizer_info),
                details=dict(engine.details),
                prompt=b"".join(pieces).decode(errors="replace"),
                prompt_tokens=len(ids),
                stops=tuple(engine.stops),
                context_length=engine.context_length,
                weights_bytes=engine.weights_bytes,
                shares=earlier[0] if earlier else None,
                notes=tuple(engine.notes),
            )
        )
    return tuple(reports)


def describe_router_inputs(ensemble: Ensemble) -> str | None:
    """Return what the router looks at, and which engines can run it; None for weights or the text alone."""
    inputs = getattr(ensemble.router, "inputs", None)
    if isinstance(inputs, GateInputs):
        *first, last = inputs.groups
        return f"{', '.join(first)} and {last}" * bool(first) + last * (not first) + f"; it needs {inputs.needs}"
    observes = observed_by(ensemble.router)
    if observes is None:
        return None
    name = ensemble.names[observes.member]
    seen = [f"its {observes.top_k} most likely tokens"] if observes.top_k else []
    seen += ["its hidden state"] if observes.hidden else []
    engines = f"the engine hf for {name}" if observes.hidden else "any engine that reports so many tokens"
    return f"{name}, {' and '.join(seen)}; it needs {engines}"


def check_feasibility(ensemble: Ensemble, options: Mapping[str, Any]) -> tuple[Feasibility, ...]:
    """Find out which units and methods are possible, by trying each. The error message is the reason if one is not."""
    results = []
    for unit in UNITS:
        if unit != "auto":
            reason = _refusal(partial(_set_up_unit, ensemble, unit, options))
            results.append(Feasibility("unit", unit, reason is None, reason))
    changes: dict[str, dict[str, Any]] = {method: {"method": method} for method in METHODS}
    rules = (rule for rule in RULES if rule not in ("average", "unite"))
    changes |= {f"rule {rule}": {"method": "layered", "rule": rule} for rule in rules}
    for name, changed in changes.items():
        reason = _refusal(partial(_set_up, ensemble, {**options, **changed}))
        results.append(Feasibility("method", name, reason is None, reason))
    return tuple(results)


def _set_up_unit(ensemble: Ensemble, unit: UnitName, options: Mapping[str, Any]) -> None:
    """Build the ensemble in another unit, with the rule of the options, if any."""
    router = None if observed_by(ensemble.router) is None else ensemble.router
    weights, defaults = ensemble.weights.tolist(), ensemble.defaults
    other = Ensemble(ensemble.members, weights, unit=unit, router=router, defaults=defaults)
    if ensemble.settings(**options).rule is not None:
        _set_up(other, {**options, "method": "greedy"})  # whatever the temperature


def _set_up(ensemble: Ensemble, options: dict[str, Any]) -> None:
    ensemble.context(ensemble.settings(**options))


def _refusal(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except MixlmError as error:
        return error.with_hint
    return None


def compare_vocabularies(ensemble: Ensemble) -> tuple[PairReport, ...]:
    """Count the byte strings that each pair of members has in common."""
    sets = [set(member.engine.vocabulary.tokens) - {b""} for member in ensemble.members]
    reports = []
    for i, j in combinations(range(len(sets)), 2):
        common = len(sets[i] & sets[j])
        share = (common / max(len(sets[i]), 1), common / max(len(sets[j]), 1))
        reports.append(PairReport((ensemble.names[i], ensemble.names[j]), common, share))
    return tuple(reports)


def describe_rule(ensemble: Ensemble, options: Mapping[str, Any]) -> RuleReport | None:
    """Describe the rule of the options; None for the average. Raises ConfigError where members do not fit its roles."""
    settings = ensemble.settings(**options)
    rule = settings.combination
    if settings.rule is None or rule is None:
        return None
    needs, roles = [f"{rule.minimum_members} members or more"], {}
    if rule.roles:
        needs = [f"a member for each of {', '.join(rule.roles)}"]
        members = assign_roles(rule, ensemble.names, [member.role for member in ensemble.members])
        roles = {role: ensemble.names[i] for role, i in zip(rule.roles, members, strict=True)}
    if rule.shared_vocabulary:
        needs.append("one vocabulary")
    if rule.common_options:
        needs.append("the same sampling options for all members, which apply to the combination")
    parameters = rule_as_dict(settings.rule, settings.rule_parameters)
    del parameters["name"]
    return RuleReport(rule.name, parameters, roles, tuple(needs), _bounds(rule, len(ensemble.members)))


def _bounds(rule: Combination, members: int) -> str:
    """Return how a position is decided before all members have run."""
    if not rule.speculates:
        if rule.first_member(np.full(members, 1 / members)) is not None:
            return "a coin chooses the first member, which decides some positions alone"
        if has_envelope(rule, members):
            return "members run in order until the others cannot change what is sampled"
    return "all members run, or verify drafts"
