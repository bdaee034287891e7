"""Members bound to the options of a generation: each one's transform and map, the rule, and the strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mixlm.core.grammar import GrammarCache
from mixlm.core.options import GenerationOptions
from mixlm.core.sampling import ReportTransform, Transform
from mixlm.decoding import StrategyContext, build_strategy
from mixlm.engines import Engine
from mixlm.engines.base import Session
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation.generation import GenerationContext
from mixlm.generation.member import Member
from mixlm.routing.base import TOP_K, FixedRouter, Router, observed_by
from mixlm.types import PLAIN_SAMPLING, Floats, Ids, LogitsProcessor, TopKFilter
from mixlm.units.base import Unit

if TYPE_CHECKING:
    from mixlm.core.combinations import Combination
    from mixlm.generation.target import RuleTarget


@dataclass(frozen=True)
class LoadedMember:
    """A loaded member: its engine, the name it is shown by, its own sampling options, and its role in a rule.

    processor: what changes its logits first: see `Ensemble.with_logits_processors`.
    """

    engine: Engine
    name: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    role: str | None = None
    processor: LogitsProcessor | None = None


def check_two_prompts(rule: Combination | None, members: Sequence[LoadedMember], prompts: Sequence[Ids]) -> None:
    """Raise ConfigError where a rule is of two prompts of one model, and the prompts, a member each, are the same."""
    if rule is None or not rule.two_prompts:
        return
    models = {(member.engine.batch_key, id(member.processor)) for member in members}
    if len(models) == 1 and all(np.array_equal(prompts[0], other) for other in prompts[1:]):
        raise ConfigError(
            f"both prompts of rule {rule.name} are the same, so it changes nothing",
            "give the second member another system message in an ensemble file, and no raw prompt or bare text",
        )


@dataclass(frozen=True)
class Binder:
    """What an ensemble is made of, to be bound to the options of a generation. weights: float64 (members,)."""

    members: Sequence[LoadedMember]
    weights: Floats
    unit: Unit
    router: Router
    grammars: GrammarCache

    def context(self, settings: GenerationOptions, sessions: Sequence[Session] | None = None) -> GenerationContext:
        """Bind the members to `settings`.

        Returns what generations with them need. sessions: reused if given, one for each member.
        """
        self._check(settings)
        keeps_sessions = sessions is not None
        sessions = sessions or [member.engine.session() for member in self.members]
        observes = observed_by(self.router) if settings.method != "single" else None
        target = self._target(settings)
        strategy_context = StrategyContext(
            weights=self.weights,
            names=[member.name for member in self.members],
            sampling=[member.sampling for member in self.members],
            sizes=[member.engine.weights_bytes for member in self.members],
            forwards=lambda: [session.stats.forwards for session in sessions],
            unit=self.unit.name,
            traits=self.unit.traits,
            observed=None if observes is None else observes.member,
            batch_keys=[member.engine.batch_key for member in self.members],
            target=target,
        )
        opening = replace(settings, min_tokens=0, ignore_end=True) if settings.min_tokens else None
        return GenerationContext(
            self.unit,
            self.router,
            settings,
            self._bind_members(settings, target),
            build_strategy(settings, strategy_context),
            sessions,
            strategy_context.speculation,
            strategy_context.heaviest_member,
            () if opening is None else self._bind_members(opening, target),
            target,
            keeps_sessions=keeps_sessions,
        )

    def _target(self, settings: GenerationOptions) -> RuleTarget | None:
        """Return what the rule of the options makes of the members; None for samples of the average."""
        rule = settings.combination
        if rule is None and settings.method != "greedy":
            return None
        from mixlm.generation.target import average_target, build_target

        if rule is None:
            return average_target()
        self._check_roles(rule)
        return build_target(
            settings,
            weights=self.weights,
            names=[member.name for member in self.members],
            sampling=[member.sampling for member in self.members],
            roles=[member.role for member in self.members],
            traits=self.unit.traits,
        )

    def _check_roles(self, rule: Combination) -> None:
        if rule.roles and not isinstance(self.router, FixedRouter):
            raise ConfigError(
                f"a router gives weights, and rule {rule.name} tells its members apart by their roles, not by weights",
                "use it without a router",
            )

    def check_router(self, rule: Combination | None) -> None:
        """Check that a rule takes the router, and that the members and the unit give what it observes.

        Raises:
            ConfigError: The router was trained for another model, or the rule takes none.
            UnsupportedError: A member's engine, or the unit, does not give it.
        """
        if rule is not None:
            self._check_roles(rule)
        observes = observed_by(self.router, len(self.members))
        if observes is None:
            return
        member = self.members[observes.member]
        limit, size = member.engine.reported_tokens, member.engine.hidden_size
        about = f"the router observes {member.name}"
        if not self.unit.traits.full_distributions:
            raise UnsupportedError(
                f"{about}, and in the unit {self.unit.name} members have no distribution at every position",
                "use --unit piece, or a router of the text",
            )
        if observes.hidden and size is None:
            raise UnsupportedError(
                f"{about} by its hidden state, which {member.engine.backend} does not give",
                "use --engine hf (engine='hf'), or a router of its most likely tokens",
            )
        if observes.hidden and observes.hidden_size not in (None, size):
            raise ConfigError(
                f"{about} by hidden states of {observes.hidden_size} numbers, and its have {size}",
                "it was trained for another model: train one with mixlm fit --router",
            )
        rows = member.engine.vocabulary.size
        if observes.top_k > max(rows, TOP_K):
            raise ConfigError(
                f"{about} by its {observes.top_k} most likely tokens, and its vocabulary has {rows} of them",
                f"observe {TOP_K} or so",
            )
        if limit is not None and observes.top_k > limit:
            raise UnsupportedError(
                f"{about} by its {observes.top_k} most likely tokens, and its engine reports {limit}",
                f"let its server return more (max_logprobs of vLLM), set more candidates of {member.name}, or use "
                "--engine hf (engine='hf')",
            )

    def _check(self, settings: GenerationOptions) -> None:
        if settings.wants_ensemble_logprobs and not self.unit.traits.full_distributions:
            raise UnsupportedError(
                f"logprobs_of is 'ensemble', and in the unit {self.unit.name} members have no common distribution "
                "over symbols",
                "use --unit piece, or leave it out for the log-probabilities of the sampled member",
            )
        if not self.unit.traits.full_distributions and (settings.method != "single" or self.unit.traits.counts_bytes):
            self._check_restricts()
        if settings.score_prompt and settings.rule is not None and settings.combination is not None:
            self._check_scored_rule(settings.combination)
        for member in self.members:
            if settings.score_prompt and not member.engine.scores_texts:
                raise UnsupportedError(
                    f"score_prompt needs every token's probability, and {member.name} reports its "
                    f"{member.engine.top_k_limit} most likely only",
                    "use --engine hf (engine='hf')",
                )

    def _check_restricts(self) -> None:
        """Raise UnsupportedError where a member's most likely tokens among some of the vocabulary may not be known.

        They are needed where none of its own most likely ones continues what another member has generated.
        """
        for member in self.members:
            if not member.engine.takes_ids and not member.engine.reports_all:
                raise UnsupportedError(
                    f"in the unit {self.unit.name} members are asked for their most likely tokens among those that "
                    f"continue the text, and {member.name} runs in an engine that reports its "
                    f"{member.engine.max_top_k} most likely tokens of all only",
                    "use --unit piece, --engine hf (engine='hf'), llama.cpp, SGLang, or vLLM whose logprobs mode is "
                    "processed_logprobs",
                )

    def _check_scored_rule(self, rule: Combination) -> None:
        """Raise UnsupportedError where the tokens of a given text have no log-probability under a rule."""
        about = f"score_prompt gives the log-probability of each token under rule {rule.name}"
        hint = "use mixlm score with --rule, or members that share one vocabulary with --unit token"
        if not self.unit.traits.shared_vocabulary:
            raise UnsupportedError(f"{about}, and members with different vocabularies have different tokens", hint)
        if rule.alignment == "strings":
            raise UnsupportedError(f"{about}, and it combines tokens as they are spelled", "use mean-then-truncate")
        if not isinstance(self.router, FixedRouter):
            raise UnsupportedError(f"{about} with weights that are fixed, and these depend on the text")
        for member in self.members:
            if member.engine.top_k_limit is not None:
                raise UnsupportedError(
                    f"{about}, which needs every token's probability, and {member.name} reports its most likely only",
                    "use --engine hf (engine='hf')",
                )

    def _bind_members(self, settings: GenerationOptions, target: RuleTarget | None) -> list[Member]:
        """Return each member with its transform `A_i` and its map `K_i` for these options."""
        traits, language = self.unit.traits, settings.language
        # An engine that samples itself reports no top logprobs, and uses its own logits as they are.
        samples_only = (
            settings.method in ("mixture", "single")
            and traits.full_distributions
            and not settings.top_logprobs
            and not settings.wants_ensemble_logprobs
            and not settings.logit_bias
            and language is None
        )
        # The observed member has run before its coin falls, so its samples are taken from those logits.
        observes = observed_by(self.router) if settings.method != "single" else None
        grammars = [None] * len(self.members) if language is None else self.grammars.for_language(language)
        members = []
        for i, (member, grammar) in enumerate(zip(self.members, grammars, strict=True)):
            symbols, bias = self.unit.symbols(i), None
            if settings.ignore_end:
                symbols = np.where(symbols == self.unit.end, -1, symbols)
            if settings.logit_bias:
                from mixlm.core.logit_bias import member_logit_bias

                bias = member_logit_bias(
                    settings.logit_bias,
                    member.engine.vocabulary,
                    symbols,
                    member=member.name,
                    unit=self.unit.name,
                    shared_vocabulary=traits.shared_vocabulary,
                )
            transform = Transform(settings.member_sampling(member.sampling), np.flatnonzero(symbols < 0), bias)
            # For the remaining cases, `Member.__post_init__` raises what the engine cannot do.
            if member.engine.top_k_limit is not None and bias is None and member.processor is None:
                if grammar is not None:
                    _report_allowed(member.engine, transform)
                elif target is not None and transform.sampling == PLAIN_SAMPLING:
                    transform = _report_transform(target, settings, member, transform)
            is_observed = observes is not None and observes.member == i
            members.append(
                Member(
                    member.engine,
                    member.name,
                    transform,
                    symbols,
                    settings.top_logprobs,
                    grammar,
                    member.processor,
                    samples_only=samples_only and not is_observed,
                )
            )
        return members


def _report_allowed(engine: Engine, transform: Transform) -> None:
    """Request every token that a grammar allows, of an engine that reports its most likely tokens, if it can."""
    if engine.reports_all and not (transform.sampling.top_k or transform.sampling.has_penalties):
        transform.top_k_filter = TopKFilter(engine.vocabulary.size, transform.banned)


def _report_transform(
    target: RuleTarget, settings: GenerationOptions, member: LoadedMember, transform: Transform
) -> Transform:
    """Return the transform of a member whose engine reports its most likely tokens, and whose sampling is plain.

    Bounds on what it does not report are enough for some rules; for others it has to report every token. Raises
    UnsupportedError where something needs every token's probability, and the engine reports fewer.
    """
    engine, rule, limit = member.engine, target.rule, member.engine.top_k_limit
    assert limit is not None
    needs_whole = {
        f"method {settings.method}": settings.method not in ("layered", "greedy"),
        "top_logprobs": settings.top_logprobs > 0,
        "logprobs_of": settings.wants_ensemble_logprobs,
        f"rule {rule.name}": not (target.has_bounds and rule.takes_reports),
    }
    reason = next((reason for reason, applies in needs_whole.items() if applies), None)
    if reason is None:
        return ReportTransform(transform.banned, limit)
    if not engine.reports_all:
        raise UnsupportedError(
            f"{reason} needs every token's probability here, and {member.name} reports its {engine.max_top_k} most "
            "likely at most",
            "use --engine hf (engine='hf')",
        )
    transform.top_k_filter = TopKFilter(engine.vocabulary.size, transform.banned, normalized=True)
    return transform
