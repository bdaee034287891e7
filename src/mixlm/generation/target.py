"""The target distribution of an ensemble under a combination rule: from the members' distributions to the rule's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mixlm.core.combinations.base import Aligned, Combination, align, align_logprobs
from mixlm.core.mixing import mix
from mixlm.core.options import GenerationOptions
from mixlm.core.rule_options import build_rule, check_whole_tokens
from mixlm.errors import ConfigError, EngineError, UnsupportedError, did_you_mean
from mixlm.generation.sequence import DecodeStep
from mixlm.types import Candidates, Floats, Ids, LogitsRow, Sampling
from mixlm.units.base import UnitTraits


class RuleTarget:
    """The distribution of a combination rule.

    Args:
        rule: The rule.
        roles: The member of each of the rule's roles; None for a rule of all members that have weight.
        scored: The rule that given texts are scored under; the rule by default.

    Attributes:
        has_bounds: Whether the rule's bounds hold for what `combine` returns.
        combines_symbols: Whether what it combines are the unit's symbols.
    """

    has_bounds = True
    combines_symbols = True

    def __init__(
        self, rule: Combination, roles: Sequence[int] | None = None, scored: Combination | None = None
    ) -> None:
        self.rule = rule
        self.scored = scored or rule
        self._roles = None if roles is None else tuple(roles)

    def members(self, step: DecodeStep) -> list[int]:
        """Return the members that take part at a position, in the order of the rule's rows.

        Raises:
            EngineError: A member that has a role is unavailable, or the grammar leaves it no token.
        """
        if self._roles is None:
            return self.rows(step.weights)[0]
        for role, member in zip(self.rule.roles, self._roles, strict=True):
            view = step.views[member]
            if member in step.unavailable or view.stuck:
                reason = "is unavailable" if member in step.unavailable else "has no token that json_schema allows"
                raise EngineError(f"{view.member.name}, the {role} of rule {self.rule.name}, {reason}")
        return list(self._roles)

    def weights(self, step: DecodeStep, members: Sequence[int]) -> Floats:
        """Return the weights of these members, float64, summing to 1; equal ones where members have roles."""
        return self._normalised(step.weights, members)

    def rows(self, weights: Floats) -> tuple[list[int], Floats]:
        """Return the members in the order of the rule's rows, and their weights: for given ones of all members."""
        rows = np.flatnonzero(weights > 0).tolist() if self._roles is None else list(self._roles)
        return rows, self._normalised(weights, rows)

    def _normalised(self, weights: Floats, members: Sequence[int]) -> Floats:
        own = weights[list(members)] if self._roles is None else np.ones(len(members))
        normalised: Floats = own / own.sum()
        return normalised

    def distribution(
        self, step: DecodeStep, member: int, *, normalize: bool = True
    ) -> Callable[[LogitsRow], Candidates]:
        """Return a member's function from logits for the text as it is now to what is combined.

        normalize: whether it sums to 1 also where all that the rule takes are proportions.
        """
        normalize = normalize or not (self.rule.is_product and self.rule.shared_vocabulary)
        return step.views[member].bind_distribution(normalize=normalize)

    def symbol(self, step: DecodeStep, combined: int) -> int:
        """Return the unit's symbol for one that the rule combines."""
        return combined

    def in_symbols(self, step: DecodeStep, distribution: Candidates) -> Candidates:
        """Return the rule's distribution as one over the unit's symbols."""
        return distribution

    def combine(
        self,
        members: Sequence[int],
        parts: Sequence[Candidates],
        weights: Floats,
        aligned: Callable[[], Aligned] | None = None,
    ) -> Candidates:
        """Return the rule's distribution, by its support.

        parts: the distributions of these members. weights: theirs, float64 (members,). aligned: returns the parts over
        the union of their supports, where it may be known. Raises UnsupportedError where the rule is not defined.
        """
        from mixlm.core.combinations.average import Average

        if type(self.rule).combine is Average.combine:
            return mix([*zip(weights.tolist(), parts, strict=True)])
        if self.rule.is_product:
            symbols, rows = align_logprobs(parts)
            columns, logprobs = self.rule.from_logprobs(rows, weights)
            return Candidates(symbols[columns], logprobs)
        symbols, probs = align(parts) if aligned is None else aligned()
        return support(symbols, self.rule.combine(probs, weights))

    def contributor(self, symbol: int, parts: Sequence[Candidates], weights: Floats) -> int:
        """Return the row that gives a symbol most of its probability, by weight; the first where members have roles."""
        if self._roles is not None:
            return 0
        return int(np.argmax(weights * [np.exp(part.logprobs[part.ids == symbol]).sum() for part in parts]))


def build_target(
    options: GenerationOptions,
    *,
    weights: Floats,
    names: Sequence[str],
    sampling: Sequence[Mapping[str, Any]],
    roles: Sequence[str | None],
    traits: UnitTraits | None,
) -> RuleTarget | None:
    """Return the target of the options' rule; None where they need none.

    weights: float64 (members,). sampling: each member's own options. roles: each one's, None for those without.
    traits: of the unit; None while it is not known.

    Raises:
        ConfigError: The members do not fit the rule's number or roles.
        UnsupportedError: The unit does not fit the rule, or members have options of their own where it has one
            distribution to apply them to.
    """
    rule = options.combination
    if rule is None:
        return None
    if traits is not None:
        _check_unit(rule, traits)
    rule.check_members(len(names))
    assigned = assign_roles(rule, names, roles) if rule.roles else None
    if assigned is not None and not np.allclose(weights, weights[0]):
        raise ConfigError(
            f"weights are given, and rule {rule.name} tells its members apart by their roles, not by weights",
            "leave them out; strength says how much the roles count",
        )
    common = _common_sampling(options, rule, sampling)
    if common is not None:
        if options.method == "greedy":
            common = mode_sampling(rule, common)
        spelled, rule = rule, rule.with_sampling(common)  # refuses what the rule does not take
        if options.rule == "unite" and traits is not None and not traits.shared_vocabulary:
            from mixlm.generation.spellings import SpelledTarget

            return SpelledTarget(spelled, common)
    if rule.alignment == "strings":
        from mixlm.generation.spellings import StringTarget

        return StringTarget(rule)
    return RuleTarget(rule, assigned, scored_rule(options, sampling))


def average_target() -> RuleTarget:
    """Return the target of the plain average, for methods that need its bounds."""
    from mixlm.core.combinations.average import Average

    return RuleTarget(Average())


def assign_roles(rule: Combination, names: Sequence[str], roles: Sequence[str | None]) -> list[int]:
    """Return the member of each of a rule's roles: the one that was given it, or by order where none was given any.

    Raises:
        ConfigError: A role is unknown, given twice, or to no member.
    """
    listed = ", ".join(rule.roles)
    if not any(roles):
        return list(range(len(names)))
    for name, role in zip(names, roles, strict=True):
        if role not in rule.roles:
            problem = "no role" if role is None else f"the role {role!r}"
            hint = did_you_mean(role, rule.roles) if role else None
            raise ConfigError(f"{name} has {problem}, and rule {rule.name} has the roles {listed}", hint)
        if roles.count(role) > 1:
            raise ConfigError(f"several members have the role {role}; rule {rule.name} has one for each of {listed}")
    return [list(roles).index(role) for role in rule.roles]


def mode_sampling(rule: Combination, common: Sampling) -> Sampling:
    """Return what of a rule's sampling its most likely symbol depends on: the k of a union, which is the rule's own."""
    return Sampling(temperature=1.0, top_k=common.top_k if rule.alignment == "spellings" else 0, top_p=1.0, min_p=0.0)


def scored_rule(options: GenerationOptions, sampling: Sequence[Mapping[str, Any]]) -> Combination:
    """Return the rule that texts are scored under: without sampling options, but for the k of a union, its own.

    sampling: each member's own options. Raises UnsupportedError for a union where these differ.
    """
    rule = build_rule(options.rule or "average", options.rule_parameters)
    if rule.alignment != "spellings":
        return rule
    common = _common_sampling(options, rule, sampling)
    return rule if common is None else rule.with_sampling(mode_sampling(rule, common))


def _check_unit(rule: Combination, traits: UnitTraits) -> None:
    check_whole_tokens(rule, full_distributions=traits.full_distributions)
    if rule.shared_vocabulary and not traits.shared_vocabulary:
        raise UnsupportedError(
            f"rule {rule.name} divides by a member's probabilities, and members with different vocabularies give tokens"
            " of the others none",
            "use members that share one vocabulary with --unit token, or --rule geometric",
        )


def _common_sampling(
    options: GenerationOptions, rule: Combination, sampling: Sequence[Mapping[str, Any]]
) -> Sampling | None:
    """Return the sampling that applies to the combination. Raises UnsupportedError where members have their own."""
    first, *others = [options.combined_sampling(member) for member in sampling]
    if any(other != first for other in others):
        raise UnsupportedError(
            f"members have sampling options of their own, and {rule.name} has one distribution to apply them to",
            "give the same options to all members",
        )
    return first


def support(symbols: Ids, probs: Floats) -> Candidates:
    """Return the distribution of the symbols that have any probability."""
    positive = probs > 0
    return Candidates(symbols[positive], np.log(probs[positive]))
