"""Inspect an ensemble without running a model: its members, and the units and methods that are possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from mixlm.choices import METHODS, RULES, UNITS, UnitName
from mixlm.engines import Engine
from mixlm.ensemble import Ensemble
from mixlm.errors import MixlmError
from mixlm.inspection.report import Feasibility, MemberReport, PairReport
from mixlm.routing.base import observed_by
from mixlm.routing.gate_router import GateInputs
from mixlm.types import Ids

# Rules: options that change the target distribution.
_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    f"rule {rule}": {"method": "layered", "rule": rule} for rule in RULES if rule not in ("average", "unite")
}


def describe_members(ensemble: Ensemble, question: str, options: Mapping[str, Any]) -> tuple[MemberReport, ...]:
    """Describe each member. Raises what `Ensemble.encode_prompt` raises for the question."""
    prompts = ensemble.encode_prompt(question, ensemble.settings(**options)).ids
    reports = []
    for i, (member, ids) in enumerate(zip(ensemble.members, prompts, strict=True)):
        engine, vocabulary = member.engine, member.engine.vocabulary
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
                prompt=spell_out(engine, ids),
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


def spell_out(engine: Engine, ids: Ids) -> str:
    """Return the text of ids, with control tokens spelled out."""
    vocabulary = engine.vocabulary
    pieces = [vocabulary.tokens[i] or vocabulary.name(i).encode() for i in ids.tolist()]
    return b"".join(pieces).decode(errors="replace")


def check_feasibility(ensemble: Ensemble, options: Mapping[str, Any]) -> tuple[Feasibility, ...]:
    """Find out which units and methods are possible, by trying each. The error message is the reason if one is not.

    Args:
        ensemble: The ensemble.
        options: Generation options.
    """
    results = []
    for unit in UNITS:
        if unit != "auto":
            reason = _refusal(partial(_set_up_unit, ensemble, unit, options))
            results.append(Feasibility("unit", unit, reason is None, reason))
    methods: dict[str, Mapping[str, Any]] = {method: {"method": method} for method in METHODS} | dict(_VARIANTS)
    for name, changes in methods.items():
        reason = _refusal(partial(_set_up, ensemble, {**options, **changes}))
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


def shared_symbols(symbols: Sequence[Ids], size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Mark the shared symbols that each member has: bool (members, size)."""
    marks = np.zeros((len(symbols), size), dtype=bool)
    for row, ids in zip(marks, symbols, strict=True):
        row[ids[ids >= 0]] = True
    return marks
