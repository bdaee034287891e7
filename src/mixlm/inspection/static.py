"""What can be said of an ensemble without running a model: its members, and what they can do together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from mixlm.config import METHODS, RULES, UNITS
from mixlm.engines import Engine
from mixlm.ensemble import Ensemble
from mixlm.errors import MixlmError
from mixlm.inspection.report import MemberReport, PairReport, Possibility
from mixlm.types import Ids

# Beside the methods themselves, options that change the law of one.
_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "conventional, mix-then-truncate": {"method": "conventional", "mix_then_truncate": True},
    **{f"conventional, rule {rule}": {"method": "conventional", "rule": rule} for rule in RULES},
}


def members(ensemble: Ensemble, question: str, options: Mapping[str, Any]) -> tuple[MemberReport, ...]:
    """Describe each member. Raises what `Ensemble.prompts` raises for the question."""
    prompts = ensemble.encode_prompt(question, ensemble.settings(**options)).ids
    out = []
    for i, (one, ids) in enumerate(zip(ensemble.members, prompts, strict=True)):
        engine, vocabulary = one.engine, one.engine.vocabulary
        earlier = [
            other.name
            for other in ensemble.members[:i]
            if other.engine.weight_parts.keys() & engine.weight_parts.keys()
        ]
        out.append(
            MemberReport(
                name=one.name,
                weight=float(ensemble.weights[i]),
                rows=vocabulary.size,
                pieces=len(set(vocabulary.tokens) - {b""}),
                control=len(vocabulary.special_ids),
                ends={vocabulary.name(end): end for end in sorted(vocabulary.end_ids)},
                reading=dict(engine.tokenizer_info),
                details=dict(engine.details),
                prompt=spelled(engine, ids),
                prompt_tokens=len(ids),
                stops=tuple(engine.stops),
                context_length=engine.context_length,
                weights_bytes=engine.weights_bytes,
                shares=earlier[0] if earlier else None,
                notes=tuple(engine.notes),
            )
        )
    return tuple(out)


def spelled(engine: Engine, ids: Ids) -> str:
    """Return ids as a text in which control tokens are spelled out."""
    vocabulary = engine.vocabulary
    pieces = [vocabulary.tokens[i] or vocabulary.name(i).encode() for i in ids.tolist()]
    return b"".join(pieces).decode(errors="replace")


def possibilities(ensemble: Ensemble, options: Mapping[str, Any]) -> tuple[Possibility, ...]:
    """Say which units and methods can be used, by asking for each of them. options: of replies, as they will be given.

    A refusal's sentence is the reason.
    """
    out = []
    for unit in UNITS:
        if unit != "auto":
            reason = _refusal(partial(Ensemble, ensemble.members, ensemble.weights.tolist(), unit=unit))
            out.append(Possibility("unit", unit, reason is None, reason))
    wanted: dict[str, Mapping[str, Any]] = {method: {"method": method} for method in METHODS} | dict(_VARIANTS)
    for name, changes in wanted.items():
        reason = _refusal(partial(_set_up, ensemble, {**options, **changes}))
        out.append(Possibility("method", name, reason is None, reason))
    return tuple(out)


def _set_up(ensemble: Ensemble, options: dict[str, Any]) -> None:
    ensemble.context(ensemble.settings(**options))


def _refusal(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except MixlmError as error:
        return str(error)
    return None


def pairs(ensemble: Ensemble) -> tuple[PairReport, ...]:
    """Count the byte strings that each two members have in common."""
    sets = [set(one.engine.vocabulary.tokens) - {b""} for one in ensemble.members]
    out = []
    for i, j in combinations(range(len(sets)), 2):
        common = len(sets[i] & sets[j])
        share = (common / max(len(sets[i]), 1), common / max(len(sets[j]), 1))
        out.append(PairReport((ensemble.names[i], ensemble.names[j]), common, share))
    return tuple(out)


def having(symbols: Sequence[Ids], size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Mark which shared symbols each member has: bool (members, size)."""
    marks = np.zeros((len(symbols), size), dtype=bool)
    for row, own in zip(marks, symbols, strict=True):
        row[own[own >= 0]] = True
    return marks
