"""What a combination rule needs of an ensemble, and how early it is decided and how fast it writes on a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mixlm.core.combinations.base import Combination
from mixlm.core.rule_options import rule_as_dict
from mixlm.decoding.layered import has_envelope
from mixlm.ensemble import Ensemble
from mixlm.generation.target import assign_roles
from mixlm.inspection.report import RuleReport
from mixlm.types import Usage

_TOKENS = 32


def describe_rule(ensemble: Ensemble, options: Mapping[str, Any]) -> RuleReport | None:
    """Describe the rule of the options; None for the average. Raises ConfigError where members do not fit its roles."""
    settings = ensemble.settings(**options)
    rule = settings.combination
    if settings.rule is None or rule is None:
        return None
    roles = {}
    if rule.roles:
        members = assign_roles(rule, ensemble.names, [member.role for member in ensemble.members])
        roles = {role: ensemble.names[i] for role, i in zip(rule.roles, members, strict=True)}
    parameters = rule_as_dict(settings.rule, settings.rule_parameters)
    del parameters["name"]
    return RuleReport(rule.name, parameters, roles, _needs(rule), _bounds(rule, len(ensemble.members)))


def measure_rule(ensemble: Ensemble, report: RuleReport, prompt: str, options: Mapping[str, Any]) -> RuleReport:
    """Return the report with the forwards and the speed of `layered`, beside `conventional`, in one short run each.

    The first run of each warms up. `layered` runs with drafts where they promise more, and once more without any.
    """
    plain = {name: value for name, value in options.items() if name not in ("method", "max_tokens", "stop", "draft")}
    written = {"seed": 0, **plain, "max_tokens": _TOKENS, "ignore_end": True}

    def measure(method: str, draft: str | None = None) -> Usage:
        for _ in range(2):
            usage: Usage = ensemble.generate(prompt, **{**written, "method": method, "draft": draft}).usage
        return usage

    conventional, layered, without_drafts = measure("conventional"), measure("layered"), measure("layered", "none")
    others = max(len(ensemble.members) - 1, 1)
    return replace(
        report,
        tokens=_TOKENS,
        stopped=float(np.clip((len(ensemble.members) - _forwards(without_drafts)) / others, 0, 1)),
        forwards=_forwards(layered),
        drafted=layered.drafted,
        accepted=layered.accepted,
        tokens_per_second=layered.tokens_per_second,
        conventional_tokens_per_second=conventional.tokens_per_second,
    )


def _forwards(usage: Usage) -> float:
    """Return the forwards of a token, of all members."""
    return sum(member.forwards for member in usage.members.values()) / max(usage.tokens, 1)


def _needs(rule: Combination) -> tuple[str, ...]:
    """Return what a rule asks of the members."""
    roles = ", ".join(rule.roles)
    needs = [f"a member for each of {roles}" if roles else f"{rule.minimum_members} members or more"]
    if rule.shared_vocabulary:
        needs.append("one vocabulary")
    if rule.common_options:
        needs.append("the same sampling options for all members, which apply to the combination")
    return tuple(needs)


def _bounds(rule: Combination, members: int) -> str:
    """Return how a position is decided before all members have run."""
    if rule.speculates:
        return "all members run, or verify drafts"
    if rule.first_member(np.full(members, 1 / members)) is not None:
        return "a coin chooses the first member, which decides some positions alone"
    if has_envelope(rule, members):
        return "members run in order until the others cannot change what is sampled"
    return "all members run, or verify drafts"
