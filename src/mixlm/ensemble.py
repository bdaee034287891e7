"""An ensemble: members, their weights, and the unit in which they share one text."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Unpack, cast, overload

import numpy as np

from mixlm.config import UnitName
from mixlm.core.grammar import GrammarCache
from mixlm.core.logit_bias import member_logit_bias
from mixlm.core.logits_processor import LogitsProcessor, as_processor
from mixlm.core.mixing import normalized_weights
from mixlm.core.options import OPTIONS, GenerationOptions, Options
from mixlm.core.sampling import Transform
from mixlm.decoding import SpeculationStats, StrategyContext, build_strategy, check_method
from mixlm.engines import Engine
from mixlm.engines.base import Session
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation.dispatch import to_mixlm_error
from mixlm.generation.generation import Generation, GenerationContext
from mixlm.generation.member import Member, MemberOptions
from mixlm.generation.prompt import EncodedPrompt, Prompt, encode_prompt, is_batch
from mixlm.routing.base import Router, RouterFunction, as_router
from mixlm.routing.fixed import FixedRouter
from mixlm.routing.observation import observed_by
from mixlm.types import Completion, Ids, Message, Sampling, TopKFilter
from mixlm.units.base import Unit
from mixlm.units.registry import build_unit

if TYPE_CHECKING:
    from mixlm.chat import Chat
    from mixlm.core.combinations import Combination
    from mixlm.generation.background import AsyncGeneration, BackgroundRunner
    from mixlm.generation.next_distribution import NextDistribution
    from mixlm.generation.target import RuleTarget

AT_ONCE = 16
# A distribution as the model gives it.
_UNCHANGED = Sampling(temperature=1.0, top_k=0)


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


class Ensemble:
    """Several language models that write one text.

    Args:
        weights: One a member, on any positive scale; equal when left out.
        unit: "token" (members that share a vocabulary), "piece", "word" and "byte" (any vocabularies), or "auto"; or
            one that was built for these members.
        router: Weights that depend on the prompt or the text, in place of `weights`: a router, or a function of the
            prompt and the last 4096 bytes of the text so far, both bytes, that returns one weight per member.
        defaults: The options of every call, where it gives no others.
        grammars: A cache for JSON schemas that another ensemble of these members filled.

    Raises:
        ConfigError: The weights or the router do not fit the members.
        UnsupportedError: The unit does not fit the vocabularies, or the default method.

    >>> import mixlm
    >>> ensemble = mixlm.load("toy:1", "toy:2", weights=[0.7, 0.3])
    >>> completion = ensemble.generate("the river", seed=1, max_tokens=4, ignore_end=True)
    >>> len(completion.tokens)
    4
    """

    def __init__(
        self,
        members: Sequence[MemberSpec],
        weights: Sequence[float] | None = None,
        *,
        unit: UnitName | Unit = "auto",
        router: Router | RouterFunction | None = None,
        defaults: GenerationOptions | None = None,
        grammars: GrammarCache | None = None,
    ) -> None:
        if not members:
            raise ConfigError("an ensemble needs at least one member")
        self.members = tuple(members)
        self.weights = normalized_weights(weights, len(members))
        self.router = FixedRouter(self.weights) if router is None else as_router(router, len(members))
        self.defaults = defaults or GenerationOptions()
        self.grammars = grammars or GrammarCache([member.engine.vocabulary for member in members])
        if isinstance(unit, str):
            self.unit = self._build_unit(unit)
            check_method(self.defaults.method, self.unit.name, self.defaults.rule)
        else:
            self.unit = unit
        self._symbols = [self.unit.symbols(i) for i in range(len(members))]
        self._check_router()

    def __repr__(self) -> str:
        members = ", ".join(
            f"{member.name} ({member.engine.backend}, {weight:.3g})"
            for member, weight in zip(self.members, self.weights, strict=True)
        )
        routed = "" if isinstance(self.router, FixedRouter) else f", router={type(self.router).__name__}"
        return f"<Ensemble of {members}; unit={self.unit.name!r}, method={self.defaults.method!r}{routed}>"

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names, in order."""
        return tuple(member.name for member in self.members)

    # A str is a sequence of str as well; it is one prompt.
    @overload
    def generate(self, prompt: str, **options: Unpack[Options]) -> Completion: ...  # type: ignore[overload-overlap]

    @overload
    def generate(self, prompt: Sequence[Message | Mapping[str, str]], **options: Unpack[Options]) -> Completion: ...

    @overload
    def generate(self, prompt: Sequence[Prompt], **options: Unpack[Options]) -> list[Completion]: ...

    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Unpack[Options]) -> Completion | list[Completion]:
        """Return a completion, or one for each of several prompts, generated together.

        Args:
            prompt: A user's message, a conversation, or with `raw=True` a text to continue; or a list of such.
            options: See `GenerationOptions` and `Sampling`.

        Raises:
            MixlmError: The first error that ends a generation.
        """
        if not is_batch(prompt):
            return self.stream(cast(Prompt, prompt), **options).finish()
        completions: dict[int, Completion] = {}
        for number, generation in self.generations(cast(Sequence[Prompt], prompt), **options):
            if generation.error is not None:
                raise generation.error
            completions[number] = generation.completion
        return [completions[number] for number in range(len(completions))]

    def generations(
        self, prompts: Iterable[Prompt], *, at_once: int = AT_ONCE, **options: Unpack[Options]
    ) -> Iterator[tuple[int, Generation]]:
        """Generate for many prompts, `at_once` at a time; yields each prompt's index and its finished generation.

        The completion of prompt i is that of `generate` with `sequence=i`, whatever is generated at the same time. A
        generation that fails has an `error` and the completion so far; the others continue.
        """
        return self.numbered_generations(enumerate(prompts), at_once=at_once, **options)

    def numbered_generations(
        self, prompts: Iterable[tuple[int, Prompt]], *, at_once: int = AT_ONCE, **options: Unpack[Options]
    ) -> Iterator[tuple[int, Generation]]:
        """Generate for prompts that have numbers of their own: `generations`, to resume where it stopped."""
        from mixlm.generation.scheduler import Scheduler

        if at_once < 1:
            raise ConfigError(f"at_once is {at_once}; it must be 1 or more")
        settings = self.settings(**options)
        scheduler = Scheduler(at_once)
        numbers: dict[Generation, int] = {}
        remaining = iter(prompts)
        while True:
            for number, prompt in islice(remaining, scheduler.free_slots):
                context = self.context(settings.with_turn(number))
                try:
                    generation = context.start(self.encode_prompt(prompt, settings))
                except Exception as error:
                    no_ids = np.zeros(0, dtype=np.int64)
                    generation = context.start(EncodedPrompt((no_ids,) * len(self.members), b""))
                    generation.fail(to_mixlm_error(error))
                    yield number, generation
                    continue
                numbers[generation] = number
                scheduler.add(generation)
            if scheduler.idle:
                return
            for generation in scheduler.step():
                if generation.finished:
                    yield numbers.pop(generation), generation

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Generation:
        """Generate token by token: iterate over the result, then read its `completion`."""
        settings = self.settings(**options)
        return self.context(settings).start(self.encode_prompt(prompt, settings))

    @overload
    async def agenerate(self, prompt: str, **options: Unpack[Options]) -> Completion: ...  # type: ignore[overload-overlap]

    @overload
    async def agenerate(
        self, prompt: Sequence[Message | Mapping[str, str]], **options: Unpack[Options]
    ) -> Completion: ...

    @overload
    async def agenerate(self, prompt: Sequence[Prompt], **options: Unpack[Options]) -> list[Completion]: ...

    async def agenerate(
        self, prompt: Prompt | Sequence[Prompt], **options: Unpack[Options]
    ) -> Completion | list[Completion]:
        """Return what `generate` returns, while the event loop does other things.

        Calls that are in progress at the same time are batched, `AT_ONCE` at most. A task that is cancelled ends its
        generation.
        """
        from mixlm.generation.background import finish_all

        if not is_batch(prompt):
            return await self.astream(cast(Prompt, prompt), **options).finish()
        settings = self.settings(**options)
        prompts = cast(Sequence[Prompt], prompt)
        return await finish_all([self._begin_async(item, settings.with_turn(i)) for i, item in enumerate(prompts)])

    def astream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncGeneration:
        """Generate token by token in the background: `async for` over the result, then read its `completion`."""
        return self._begin_async(prompt, self.settings(**options))

    def distribution(self, prompt: Prompt, **options: Unpack[Options]) -> NextDistribution:
        """Return the exact distribution of the symbol that follows a prompt, and each member's part in it.

        It is the one that the method samples from, whatever it costs the method; every member with weight runs once.

        Args:
            prompt: As in `generate`; with `raw=True`, the text so far.
            options: As in `generate`.

        Raises:
            UnsupportedError: The unit has no common distribution over symbols (`word`, `byte`).

        >>> import mixlm
        >>> ensemble = mixlm.load("toy:1", "toy:2", weights=[0.7, 0.3])
        >>> following = ensemble.distribution("the river")
        >>> bool(np.allclose(following.weights @ following.members, following.probs))
        True
        """
        from mixlm.generation.next_distribution import next_distribution

        if not self.unit.traits.full_distributions:
            raise UnsupportedError(
                f"in the unit {self.unit.name} members have no common distribution over symbols",
                "use the unit piece: with_unit('piece')",
            )
        settings = self.settings(**options)
        # Whole distributions are requested, also where the method has members sampled by their engines.
        settings = replace(settings, top_logprobs=settings.top_logprobs or 1)
        return next_distribution(self.context(settings), self.encode_prompt(prompt, settings))

    def chat(self, **options: Unpack[Options]) -> Chat:
        """Begin a conversation that remembers its turns, and whose members keep their KV caches between them."""
        from mixlm.chat import Chat

        return Chat(self, options)

    def with_weights(self, weights: Sequence[float]) -> Ensemble:
        """Return this ensemble with other weights, in place of a router too. The engines are shared."""
        return Ensemble(self.members, weights, unit=self.unit, defaults=self.defaults, grammars=self.grammars)

    def with_router(self, router: Router | RouterFunction) -> Ensemble:
        """Return this ensemble with another router. The engines are shared.

        Raises:
            UnsupportedError: The router observes what a member's engine does not give.
        """
        return Ensemble(
            self.members,
            self.weights.tolist(),
            unit=self.unit,
            router=router,
            defaults=self.defaults,
            grammars=self.grammars,
        )

    def with_unit(self, unit: UnitName) -> Ensemble:
        """Return this ensemble in another unit. The engines are shared.

        The unit is checked against the method of each call, not against the default method.

        Raises:
            UnsupportedError: The unit does not fit the vocabularies.
        """
        return Ensemble(
            self.members,
            self.weights.tolist(),
            unit=self._build_unit(unit),
            router=self.router,
            defaults=self.defaults,
            grammars=self.grammars,
        )

    def with_logits_processors(self, processors: Mapping[str, Any]) -> Ensemble:
        """Return this ensemble with functions that change members' logits. The engines are shared.

        A processor is the first step of its member's transform `A_i`: it sees that member's tokens and logits and no
        other's, so every method stays exact. It must depend on its arguments alone. Its member needs an engine that
        returns all logits. Log-probabilities of given texts (scores, echo) are the model's own, without it.

        Args:
            processors: By a member's name: a function of the member's ids so far, int64 (n,), and the logits after
                them, float32 (vocab,), that returns logits of that shape; or a `LogitsProcessor` of transformers, or a
                `LogitsProcessorList`; or None for none.

        Raises:
            ConfigError: There is no such member, or a processor cannot be called.

        >>> import mixlm
        >>> ensemble = mixlm.load("toy:1", "toy:2")
        >>> colder = ensemble.with_logits_processors({"toy:1": lambda ids, logits: logits * 2})
        """
        for name in processors:
            if name not in self.names:
                raise ConfigError(f"there is no member {name!r}", f"the members are {', '.join(self.names)}")
        members = [
            replace(
                member, processor=None if processors[member.name] is None else as_processor(processors[member.name])
            )
            if member.name in processors
            else member
            for member in self.members
        ]
        return Ensemble(
            members,
            self.weights.tolist(),
            unit=self.unit,
            router=self.router,
            defaults=self.defaults,
            grammars=self.grammars,
        )

    def settings(self, **options: Unpack[Options]) -> GenerationOptions:
        """Return the checked options of a call."""
        return self.defaults.with_options(options)

    def encode_prompt(self, prompt: Prompt, settings: GenerationOptions) -> EncodedPrompt:
        """Return a prompt in each member's tokens.

        Raises:
            PromptTooLongError: A context has no room for it.
            ConfigError: It is no prompt; or the rule is of two prompts, and both are the same.
        """
        encoded = encode_prompt(prompt, settings, [member.engine for member in self.members], self.names)
        rule = settings.combination
        if rule is not None and rule.two_prompts and self._is_one_model and _are_equal(encoded.ids):
            raise ConfigError(
                f"both prompts of rule {rule.name} are the same, so it changes nothing",
                "give the second member another system message in an ensemble file, and no raw prompt",
            )
        return encoded

    @property
    def _is_one_model(self) -> bool:
        """Whether all members are the same model, and differ in their prompts at most."""
        return len({(member.engine.batch_key, id(member.processor)) for member in self.members}) == 1

    def context(self, settings: GenerationOptions, sessions: Sequence[Session] | None = None) -> GenerationContext:
        """Return what generates with these options, with new sessions or the given ones, one a member.

        New ones end with a generation; given ones are kept for the next.

        Raises:
            UnsupportedError: A member, or the unit, cannot do what the options say.
        """
        self._check(settings)
        keeps_sessions = sessions is not None
        sessions = sessions or [member.engine.session() for member in self.members]
        speculation = SpeculationStats()
        strategy_context = StrategyContext(
            weights=self.weights,
            names=self.names,
            sampling=[member.sampling for member in self.members],
            sizes=[member.engine.weights_bytes for member in self.members],
            forwards=lambda: [session.stats.forwards for session in sessions],
            unit=self.unit.name,
            traits=self.unit.traits,
            speculation=speculation,
            batch_keys=[member.engine.batch_key for member in self.members],
            target=self._target(settings),
        )
        observes = observed_by(self.router) if settings.method != "single" else None
        if observes is not None:
            strategy_context = replace(strategy_context, observed=observes.member)
        return GenerationContext(
            self.unit,
            self.router,
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
        """Return what the rule of the options makes of the members; None for the average.

        The mode of an average is found by bounds too where engines report their most likely tokens only.
        """
        if settings.combination is None and not self._finds_mode_by_bounds(settings):
            return None
        from mixlm.generation.target import average_target, build_target

        if settings.combination is None:
            return average_target()
        return build_target(
            settings,
            weights=self.weights,
            names=self.names,
            sampling=[member.sampling for member in self.members],
            roles=[member.role for member in self.members],
            traits=self.unit.traits,
        )

    def _finds_mode_by_bounds(self, settings: GenerationOptions) -> bool:
        return (
            settings.method == "greedy"
            and settings.language is None
            and self.unit.traits.full_distributions
            and any(
                member.engine.top_k_limit is not None and settings.member_sampling(member.sampling) == _UNCHANGED
                for member in self.members
            )
        )

    def _check_router(self) -> None:
        """Raise UnsupportedError where the router observes what a member's engine, or the unit, does not give."""
        observes = observed_by(self.router, len(self.members))
        if observes is None:
            return
        member = self.members[observes.member]
        limit, size = member.engine.top_k_limit, member.engine.hidden_size
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
        if limit is not None and observes.top_k > limit:
            raise UnsupportedError(
                f"{about} by its {observes.top_k} most likely tokens, and its engine reports {limit}",
                f"set candidates of {member.name} to {observes.top_k} or more, or use --engine hf (engine='hf')",
            )

    def _begin_async(self, prompt: Prompt, settings: GenerationOptions) -> AsyncGeneration:
        """Return a generation that the background thread runs once it is awaited."""
        from mixlm.generation.background import AsyncGeneration

        return AsyncGeneration(
            self._background, lambda: self.context(settings).start(self.encode_prompt(prompt, settings))
        )

    @cached_property
    def _background(self) -> BackgroundRunner:
        from mixlm.generation.background import BackgroundRunner

        return BackgroundRunner(AT_ONCE)

    def _build_unit(self, name: UnitName) -> Unit:
        engines = [member.engine for member in self.members]
        return build_unit(name, [engine.vocabulary for engine in engines], [engine.encoder for engine in engines])

    def _check(self, settings: GenerationOptions) -> None:
        if settings.wants_ensemble_logprobs and not self.unit.traits.full_distributions:
            raise UnsupportedError(
                f"logprobs_of is 'ensemble', and in the unit {self.unit.name} members have no common distribution over "
                "symbols",
                "use --unit piece, or leave it out for the log-probabilities of the sampled member",
            )
        if settings.score_prompt and settings.rule is not None and settings.combination is not None:
            self._check_scored_rule(settings.combination)
        for member in self.members:
            if settings.score_prompt and not member.engine.scores_texts:
                raise UnsupportedError(
                    f"score_prompt needs every token's probability, and {member.name} reports its "
                    f"{member.engine.top_k_limit} most likely only",
                    "use --engine hf (engine='hf')",
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
        # An engine that samples itself reports no top logprobs, and uses its own logits as they are.
        samples_only = (
            settings.method in ("mixture", "single")
            and self.unit.traits.full_distributions
            and not settings.top_logprobs
            and not settings.wants_ensemble_logprobs
            and not settings.logit_bias
            and settings.language is None
        )
        observes = observed_by(self.router)
        language = settings.language
        grammars = [None] * len(self.members) if language is None else self.grammars.for_language(language)
        members = []
        for i, (spec, all_symbols, grammar) in enumerate(zip(self.members, self._symbols, grammars, strict=True)):
            symbols = np.where(all_symbols == self.unit.end, -1, all_symbols) if settings.ignore_end else all_symbols
            bias = member_logit_bias(
                settings.logit_bias,
                spec.engine.vocabulary,
                symbols,
                member=spec.name,
                unit=self.unit.name,
                shared_vocabulary=self.unit.traits.shared_vocabulary,
            )
            sampling, banned = settings.member_sampling(spec.sampling), np.flatnonzero(symbols < 0)
            # Of the other members, `Member` says what their engines cannot do.
            transform = Transform(sampling, banned, bias)
            takes_more = spec.engine.top_k_limit is not None and bias is None and spec.processor is None
            if takes_more and grammar is None and target is not None and sampling == _UNCHANGED:
                from mixlm.generation.target import report_transform

                transform = report_transform(target, settings, spec.name, spec.engine, sampling, banned)
            elif (
                takes_more
                and grammar is not None
                and spec.engine.reports_all
                and not (sampling.top_k or sampling.has_penalties)
            ):
                transform.top_k_filter = TopKFilter(spec.engine.vocabulary.size, banned)  # of what is allowed
            else:
                takes_more = False
            # The observed member has run before its coin falls, so its samples are taken from those logits.
            is_observed = observes is not None and observes.member == i and settings.method != "single"
            options = MemberOptions(
                settings.top_logprobs, grammar, samples_only and not is_observed, spec.processor, takes_more
            )
            members.append(Member(spec.engine, spec.name, transform, symbols, options))
        return members


def _are_equal(prompts: Sequence[Ids]) -> bool:
    return all(np.array_equal(prompts[0], other) for other in prompts[1:])


def _options_text() -> str:
    """Return the table of options as lines of a docstring."""
    lines = (f"    {name}: {spec.help or 'See `GenerationOptions`.'}" for name, spec in OPTIONS.items())
    return "\n\nOptions:\n" + "\n".join(lines) + "\n"


Ensemble.generate.__doc__ = inspect.cleandoc(Ensemble.generate.__doc__ or "") + _options_text()
