"""Members bound to the options of a generation: each one's transform and map, the rule, and the strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mixlm.core.grammar import GrammarCache
from mixlm.core.options import GenerationOptions
from mixlm.core.sampling import Transform
from mixlm.decoding import SpeculationStats, StrategyContext, build_strategy
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
class MemberSpec:
    """A loaded member: its engine, the name it is shown by, its own sampling options, and its role in a rule.

    processor: what changes its logits first: see `Ensemble.with_logits_processors`.
    """

    engine: Engine
    name: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    role: str | None = None
    processor: LogitsProcessor | None = None


def check_two_prompts(rule: Combination | None, members: Sequence[MemberSpec], prompts: Sequence[Ids]) -> None:
    """Raise ConfigError where a rule is of two prompts of one model, and the prompts, a member each, are the same."""
    if rule is None or not rule.two_prompts:
        return
    models = {(member.engine.batch_key, id(member.processor)) for member in members}
    if len(models) == 1 and all(np.array_equal(prompts[0], other) for other in prompts[1:]):
        raise ConfigError(
            f"both prompts of rule {rule.name} are the same, so it changes nothing",
            "give the second member another system message in an ensemble file, and no raw prompt or bare text",
        )


class Binder:
    """What an ensemble is made of, to be bound to the options of a generation.

    Args:
        members: Those of the ensemble.
        weights: float64 (members,), summing to 1.
        unit: What they share a distribution over.
        router: Weighs them.
        grammars: A cache for JSON schemas and tools.
    """

    def __init__(
        self, members: Sequence[MemberSpec], weights: Floats, unit: Unit, router: Router, grammars: GrammarCache
    ) -> None:
        self._members = members
        self._names = tuple(member.name for member in members)
        self._weights = weights
        self._unit = unit
        self._router = router
        self._grammars = grammars

    def context(self, settings: GenerationOptions, sessions: Sequence[Session] | None = None) -> GenerationContext:
        """Return what generates with these options, with new sessions or the given ones, one a member.

        New ones end with a generation; given ones are kept for the next.

        Raises:
            UnsupportedError: A member, or the unit, cannot do what the options say.
        """
        self._check(settings)
        keeps_sessions = sessions is not None
        sessions = sessions or [member.engine.session() for member in self._members]
        speculation = SpeculationStats()
        strategy_context = StrategyContext(
            weights=self._weights,
            names=self._names,
            sampling=[member.sampling for member in self._members],
            sizes=[member.engine.weights_bytes for member in self._members],
            forwards=lambda: [session.stats.forwards for session in sessions],
            unit=self._unit.name,
            traits=self._unit.traits,
            speculation=speculation,
            batch_keys=[member.engine.batch_key for member in self._members],
            target=self._target(settings),
        )
        observes = observed_by(self._router) if settings.method != "single" else None
        if observes is not None:
            strategy_context = replace(strategy_context, observed=observes.member)
        return GenerationContext(
            self._unit,
            self._router,
            settings,
            self._bind_members(settings, strategy_context.target),
            build_strategy(settings, strategy_context),
            sessions,
            speculation,
            strategy_context.heaviest_member,
            self._bind_members(replace(settings, min_tokens=0, ignore_end=True), strategy_context.target)
            if settings.min_tokens
            else (),
            strategy_context.target,
            keeps_sessions=keeps_sessions,
        )

    def _target(self, settings: GenerationOptions) -> RuleTarget | None:
        """Return what the rule of the options makes of the members; None for samples of the average."""
        if settings.combination is None and settings.method != "greedy":
            return None
        from mixlm.generation.target import average_target, build_target

        if settings.combination is None:
            return average_target()
        if settings.combination.roles and not isinstance(self._router, FixedRouter):
            raise ConfigError(
                f"a router gives weights, and rule {settings.combination.name} tells its members apart by their roles, "
                "not by weights",
                "use it without a router",
            )
        return build_target(
            settings,
            weights=self._weights,
            names=self._names,
            sampling=[member.sampling for member in self._members],
            roles=[member.role for member in self._members],
            traits=self._unit.traits,
        )

    def check_router(self) -> None:
        """Check that the members and the unit give what the router observes.

        Raises:
            ConfigError: The router was trained for another model.
            UnsupportedError: A member's engine, or the unit, does not give it.
        """
        observes = observed_by(self._router, len(self._members))
        if observes is None:
            return
        member = self._members[observes.member]
        limit, size = member.engine.reported_tokens, member.engine.hidden_size
        about = f"the router observes {member.name}"
        if not self._unit.traits.full_distributions:
            raise UnsupportedError(
                f"{about}, and in the unit {self._unit.name} members have no distribution at every position",
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
        if settings.wants_ensemble_logprobs and not self._unit.traits.full_distributions:
            raise UnsupportedError(
                f"logprobs_of is 'ensemble', and in the unit {self._unit.name} members have no common distribution "
                "over symbols",
                "use --unit piece, or leave it out for the log-probabilities of the sampled member",
            )
        if not self._unit.traits.full_distributions and (settings.method != "single" or self._unit.traits.counts_bytes):
            self._check_restricts()
        if settings.score_prompt and settings.rule is not None and settings.combination is not None:
            self._check_scored_rule(settings.combination)
        for member in self._members:
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
        for member in self._members:
            if not member.engine.takes_ids and not member.engine.reports_all:
                raise UnsupportedError(
                    f"in the unit {self._unit.name} members are asked for their most likely tokens among those that "
                    f"continue the text, and {member.name} runs in an engine that reports its "
                    f"{member.engine.max_top_k} most likely tokens of all only",
                    "use --unit piece, --engine hf (engine='hf'), llama.cpp, SGLang, or vLLM whose logprobs mode is "
                    "processed_logprobs",
                )

    def _check_scored_rule(self, rule: Combination) -> None:
        """Raise UnsupportedError where the tokens of a given text have no log-probability under a rule."""
        about = f"score_prompt gives the log-probability of each token under rule {rule.name}"
        hint = "use mixlm score with --rule, or members that share one vocabulary with --unit token"
        if not self._unit.traits.shared_vocabulary:
            raise UnsupportedError(f"{about}, and members with different vocabularies have different tokens", hint)
        if rule.alignment == "strings":
            raise UnsupportedError(f"{about}, and it combines tokens as they are spelled", "use mean-then-truncate")
        if not isinstance(self._router, FixedRouter):
            raise UnsupportedError(f"{about} with weights that are fixed, and these depend on the text")
        for member in self._members:
            if member.engine.top_k_limit is not None:
                raise UnsupportedError(
                    f"{about}, which needs every token's probability, and {member.name} reports its most likely only",
                    "use --engine hf (engine='hf')",
                )

    def _bind_members(self, settings: GenerationOptions, target: RuleTarget | None) -> list[Member]:
        """Return each member with its transform `A_i` and its map `K_i` for these options."""
        # An engine that samples itself reports no top logprobs, and uses its own logits as they are.
        samples_only = (
            settings.method in ("mixture", "single")
            and self._unit.traits.full_distributions
            and not settings.top_logprobs
            and not settings.wants_ensemble_logprobs
            and not settings.logit_bias
            and settings.language is None
        )
        observes = observed_by(self._router)
        language = settings.language
        grammars = [None] * len(self._members) if language is None else self._grammars.for_language(language)
        members = []
        for i, (spec, grammar) in enumerate(zip(self._members, grammars, strict=True)):
            all_symbols = self._unit.symbols(i)
            symbols = np.where(all_symbols == self._unit.end, -1, all_symbols) if settings.ignore_end else all_symbols
            bias = None
            if settings.logit_bias:
                from mixlm.core.logit_bias import member_logit_bias

                bias = member_logit_bias(
                    settings.logit_bias,
                    spec.engine.vocabulary,
                    symbols,
                    member=spec.name,
                    unit=self._unit.name,
                    shared_vocabulary=self._unit.traits.shared_vocabulary,
                )
            sampling, banned = settings.member_sampling(spec.sampling), np.flatnonzero(symbols < 0)
            # Of the other members, `Member` says what their engines cannot do.
            transform = Transform(sampling, banned, bias)
            can_take_more = spec.engine.top_k_limit is not None and bias is None and spec.processor is None
            takes_more = False
            if can_take_more and grammar is None and target is not None and sampling == PLAIN_SAMPLING:
                from mixlm.generation.target import report_transform

                transform = report_transform(target, settings, spec.name, spec.engine, sampling, banned)
                takes_more = True
            elif (
                can_take_more
                and grammar is not None
                and spec.engine.reports_all
                and not (sampling.top_k or sampling.has_penalties)
            ):
                transform.top_k_filter = TopKFilter(spec.engine.vocabulary.size, banned)  # of what is allowed
                takes_more = True
            # The observed member has run before its coin falls, so its samples are taken from those logits.
            is_observed = observes is not None and observes.member == i and settings.method != "single"
            members.append(
                Member(
                    spec.engine,
                    spec.name,
                    transform,
                    symbols,
                    settings.top_logprobs,
                    grammar,
                    spec.processor,
                    samples_only=samples_only and not is_observed,
                    takes_more=takes_more,
                )
            )
        return members
