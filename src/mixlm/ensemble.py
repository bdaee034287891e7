"""An ensemble: members, their weights, and the unit in which they share one text."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from html import escape
from itertools import starmap
from typing import TYPE_CHECKING, Any, Unpack, cast, overload

from mixlm.binding import Binder, LoadedMember, check_two_prompts
from mixlm.choices import UnitName
from mixlm.core.grammar import GrammarCache
from mixlm.core.mixing import normalized_weights
from mixlm.core.options import GenerationOptions, Options
from mixlm.decoding import check_unit_method
from mixlm.engines.base import Session
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation.dispatch import to_mixlm_error
from mixlm.generation.generation import Generation, GenerationContext
from mixlm.generation.prompt import EncodedPrompt, Prompt, encode_prompt, is_batch
from mixlm.option_spec import OptionSpec
from mixlm.routing.base import FixedRouter, Router, RouterFunction, as_router
from mixlm.types import Completion, Message, Sampling, Token, colored_html
from mixlm.units import build_unit
from mixlm.units.base import Unit

if TYPE_CHECKING:
    from mixlm.generation.background import AsyncGeneration, BackgroundRunner
    from mixlm.generation.next_distribution import NextDistribution

AT_ONCE = 16


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
        members: Sequence[LoadedMember],
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
            check_unit_method(self.defaults.method, self.unit.name, self.defaults.rule)
        else:
            self.unit = unit
        self._binder.check_router(self.defaults.combination)

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
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
            raise ConfigError(f"prompts is {prompts!r:.60}; it must be a list of prompts", "of one prompt, call stream")
        return self.numbered_generations(enumerate(prompts), at_once=at_once, **options)

    def numbered_generations(
        self, prompts: Iterable[tuple[int, Prompt]], *, at_once: int = AT_ONCE, **options: Unpack[Options]
    ) -> Iterator[tuple[int, Generation]]:
        """Generate for prompts that have numbers of their own: `generations`, to resume where it stopped."""
        from mixlm.generation.scheduler import Scheduler

        OptionSpec(whole=True, minimum=1).check("at_once", at_once)
        settings = self.settings(**options)

        def begin(number: int, prompt: Prompt) -> tuple[int, Generation]:
            context = self.context(settings.with_sequence_offset(number))
            try:
                return number, context.start(self.encode_prompt(prompt, settings))
            except Exception as error:
                return number, context.refused(to_mixlm_error(error))

        yield from Scheduler(at_once).run_each(starmap(begin, prompts))

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
        return await finish_all(
            [self._begin_async(item, settings.with_sequence_offset(i)) for i, item in enumerate(prompts)]
        )

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
        self.settings(**options)  # an invalid option is refused here, not at the first turn
        return Chat(self, options)

    def with_weights(self, weights: Sequence[float]) -> Ensemble:
        """Return this ensemble with other weights, in place of a router too. The engines are shared."""
        return self._changed(weights=weights, router=None)

    def with_router(self, router: Router | RouterFunction) -> Ensemble:
        """Return this ensemble with another router. The engines are shared.

        Raises:
            UnsupportedError: The router observes what a member's engine does not give.
        """
        return self._changed(router=router)

    def with_unit(self, unit: UnitName) -> Ensemble:
        """Return this ensemble in another unit. The engines are shared.

        The unit is checked against the method of each call, not against the default method.

        Raises:
            UnsupportedError: The unit does not fit the vocabularies.
        """
        return self._changed(unit=self._build_unit(unit))

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
        from mixlm.core.logits_processor import as_processor

        if not isinstance(processors, Mapping):
            raise ConfigError(f"processors is {processors!r}; it must be a dict of processors by their members' names")
        for name in processors:
            if name not in self.names:
                raise ConfigError(f"there is no member {name!r}", f"the members are {', '.join(self.names)}")
        checked = {
            name: None if processor is None else as_processor(processor) for name, processor in processors.items()
        }
        members = [replace(member, processor=checked.get(member.name, member.processor)) for member in self.members]
        return self._changed(members=members)

    def _changed(self, **changes: Any) -> Ensemble:
        """Return an ensemble like this one with other arguments in place of some. The engines are shared."""
        names = ("members", "weights", "unit", "router", "defaults", "grammars")
        arguments: dict[str, Any] = {name: getattr(self, name) for name in names}
        return Ensemble(**{**arguments, **changes})

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
        check_two_prompts(settings.combination, self.members, encoded.ids)
        return encoded

    def context(self, settings: GenerationOptions, sessions: Sequence[Session] | None = None) -> GenerationContext:
        """Return what generates with these options, with new sessions or the given ones, one a member.

        New ones end with a generation; given ones are kept for the next.

        Raises:
            UnsupportedError: A member, or the unit, cannot do what the options say.
        """
        return self._binder.context(settings, sessions)

    @property
    def _binder(self) -> Binder:
        return Binder(self.members, self.weights, self.unit, self.router, self.grammars)

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


class Chat:
    """A conversation. A turn that is interrupted stays in the history as far as it was generated."""

    def __init__(self, ensemble: Ensemble, options: Options) -> None:
        self.messages: list[Message] = []
        self._ensemble = ensemble
        self._options = options
        self._sessions = [member.engine.session() for member in ensemble.members]
        self._turns: list[tuple[int, list[Token]]] = []  # the index of each completion, and what is read of it

    def __repr__(self) -> str:
        return f"<Chat of {len(self.messages)} messages with {', '.join(self._ensemble.names)}>"

    def _repr_html_(self) -> str:
        """Return the conversation for a notebook, each token of the completions in its member's colour."""
        turns, parts = dict(self._turns), []
        for index, message in enumerate(self.messages):
            tokens = turns.get(index, [])
            if message != Message("assistant", "".join(token.text for token in tokens)):  # it is edited, or a user's
                tokens = []
            shown = colored_html(tokens, self._ensemble.names)
            plain = f'<pre style="white-space:pre-wrap">{escape(message.content)}</pre>'
            parts.append(f"<b>{escape(message.role)}</b>{shown if tokens else plain}")
        return "".join(parts)

    def send(self, text: str) -> Completion:
        """Add a user's message and return the whole completion."""
        return self.stream(text).finish()

    def stream(self, text: str) -> ChatGeneration:
        """Add a user's message and iterate over the completion. The message joins the history once it fits."""
        options = self._ensemble.settings(**self._options).with_sequence_offset(len(self._turns))
        user = Message("user", text)
        prompt = self._ensemble.encode_prompt([*self.messages, user], options)
        context = self._ensemble.context(options, self._sessions)
        self.messages += [user, Message("assistant", "")]
        self._turns.append((len(self.messages) - 1, []))
        return ChatGeneration(context, prompt, self.messages, *self._turns[-1])


class ChatGeneration(Generation):
    """A turn of a conversation in progress."""

    def __init__(
        self, context: GenerationContext, prompt: EncodedPrompt, messages: list[Message], index: int, read: list[Token]
    ) -> None:
        super().__init__(context, prompt)
        self._messages = messages
        self._index = index
        self._read = read

    def __next__(self) -> Token:
        token = super().__next__()
        self._read.append(token)
        self._messages[self._index] = Message("assistant", self._messages[self._index].content + token.text)
        return token


def _options_text() -> str:
    """Return what the records of options say of each, as lines of a docstring."""
    sections = (
        inspect.cleandoc(record.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
        for record in (GenerationOptions, Sampling)
    )
    return "\n\nOptions:\n" + "\n".join(sections) + "\n"


Ensemble.generate.__doc__ = inspect.cleandoc(Ensemble.generate.__doc__ or "") + _options_text()
