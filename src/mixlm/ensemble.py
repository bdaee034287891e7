"""An ensemble: members, weights and a unit; what a prompt is to each member; conversations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Unpack, cast, overload

import numpy as np

from mixlm.config import UNITS, UnitName
from mixlm.core.grammar import GrammarCache
from mixlm.core.logit_bias import member_logit_bias
from mixlm.core.mixing import normalized_weights
from mixlm.core.options import GenerationOptions, Options
from mixlm.core.sampling import Transform
from mixlm.decoding import SpeculationStats, StrategyContext, build_strategy, check_method
from mixlm.decoding.cost_model import Costs
from mixlm.engines import Engine
from mixlm.engines.base import Session
from mixlm.errors import ConfigError, MixlmError, PromptTooLongError, UnsupportedError, did_you_mean
from mixlm.generation.generation import EncodedPrompt, Generation, GenerationContext
from mixlm.generation.member import Member, MemberOptions
from mixlm.generation.scheduler import Scheduler
from mixlm.routing import FixedRouter, Router
from mixlm.types import ROLES, Completion, Ids, Message, Token
from mixlm.units.base import Unit
from mixlm.units.byte import ByteUnit
from mixlm.units.piece import PieceUnit
from mixlm.units.token import TokenUnit, vocabulary_conflict
from mixlm.units.word import WordUnit

AT_ONCE = 16

Prompt = str | Sequence[Message | Mapping[str, str]]


@dataclass(frozen=True)
class MemberSpec:
    """A loaded member: its engine, the name it is shown by, and its own sampling options."""

    engine: Engine
    name: str
    sampling: Mapping[str, Any] = field(default_factory=dict)


class Ensemble:
    """Several language models that write one text.

    weights: one a member, any positive scale; equal when left out. unit: "token" (members that share a vocabulary),
    "piece", "word" and "byte" (any vocabularies), or "auto". router: weights by state, in place of `weights`.
    defaults: for every reply.
    Raises ConfigError for weights that do not fit, UnsupportedError when the unit does not fit the vocabularies or the
    default method.
    """

    def __init__(
        self,
        members: Sequence[MemberSpec],
        weights: Sequence[float] | None = None,
        *,
        unit: UnitName = "auto",
        router: Router | None = None,
        defaults: GenerationOptions | None = None,
    ) -> None:
        if not members:
            raise ConfigError("an ensemble needs at least one member")
        self.members = tuple(members)
        self.weights = normalized_weights(weights, len(members))
        self.router = router or FixedRouter(self.weights)
        self.defaults = defaults or GenerationOptions()
        self.unit = _unit([one.engine for one in members], unit)
        check_method(self.defaults.method, self.unit.name)
        self._symbols = [self.unit.symbols(i) for i in range(len(members))]
        self.grammars = GrammarCache([one.engine.vocabulary for one in members])

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names, in order."""
        return tuple(one.name for one in self.members)

    # A str is a sequence of str as well; it is one prompt.
    @overload
    def generate(self, prompt: str, **options: Unpack[Options]) -> Completion: ...  # type: ignore[overload-overlap]

    @overload
    def generate(self, prompt: Sequence[Message | Mapping[str, str]], **options: Unpack[Options]) -> Completion: ...

    @overload
    def generate(self, prompt: Sequence[Prompt], **options: Unpack[Options]) -> list[Completion]: ...

    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Unpack[Options]) -> Completion | list[Completion]:
        """Write a whole reply, or one to each of several prompts, together.

        prompt: a user's message, a conversation, or with raw=True a text to continue; or a list of such. Raises the
        first error that ends a reply.
        """
        if not _several(prompt):
            return self.stream(cast(Prompt, prompt), **options).finish()
        found: dict[int, Completion] = {}
        for at, stream in self.generations(cast(Sequence[Prompt], prompt), **options):
            if stream.error is not None:
                raise stream.error
            found[at] = stream.completion
        return [found[at] for at in range(len(found))]

    def generations(
        self, prompts: Iterable[Prompt], *, at_once: int = AT_ONCE, **options: Unpack[Options]
    ) -> Iterator[tuple[int, Generation]]:
        """Reply to many prompts, `at_once` at a time. Gives each prompt's number and its finished reply as they come.

        The reply to prompt i is the one that `generate` gives with sequence=i, whatever is written at the same time.
        A reply that fails has an `error`, and the text so far; the others go on.
        """
        return self.numbered_generations(enumerate(prompts), at_once=at_once, **options)

    def numbered_generations(
        self, prompts: Iterable[tuple[int, Prompt]], *, at_once: int = AT_ONCE, **options: Unpack[Options]
    ) -> Iterator[tuple[int, Generation]]:
        """Reply to prompts that have numbers of their own: `replies`, for going on where it stopped."""
        if at_once < 1:
            raise ConfigError(f"at_once is {at_once}; it must be 1 or more")
        settings = self.settings(**options)
        scheduler, numbers = Scheduler(at_once), {}
        left = iter(prompts)
        while True:
            for at, prompt in islice(left, scheduler.free_slots):
                writer = self.context(settings.with_turn(at))
                try:
                    stream = writer.start(self.encode_prompt(prompt, settings))
                except MixlmError as error:
                    stream = writer.start(EncodedPrompt(tuple(np.zeros(0, dtype=np.int64) for _ in self.members), b""))
                    stream.fail(error)
                    yield at, stream
                    continue
                numbers[stream] = at
                scheduler.add(stream)
            if scheduler.idle:
                return
            yield from ((numbers.pop(one), one) for one in scheduler.step() if one.finished)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Generation:
        """Write a reply token by token: iterate over it, then read its `completion`."""
        settings = self.settings(**options)
        return self.context(settings).start(self.encode_prompt(prompt, settings))

    def chat(self, **options: Unpack[Options]) -> Chat:
        """Begin a conversation that remembers its turns, and whose members keep their caches between them."""
        return Chat(self, options)

    def with_weights(self, weights: Sequence[float]) -> Ensemble:
        """Return this ensemble with other weights, in place of a router too. The engines are shared."""
        other = copy(self)
        other.weights = normalized_weights(weights, len(self.members))
        other.router = FixedRouter(other.weights)
        return other

    def with_unit(self, unit: UnitName) -> Ensemble:
        """Return this ensemble in another unit. The engines are shared.

        Raises UnsupportedError when the vocabularies do not have it. The default method is looked at when a reply is
        set up: a call may name another.
        """
        other = copy(self)
        other.unit = _unit([one.engine for one in self.members], unit)
        other._symbols = [other.unit.symbols(i) for i in range(len(self.members))]
        return other

    def settings(self, **options: Unpack[Options]) -> GenerationOptions:
        """Return the checked settings of a call."""
        return self.defaults.with_options(options)

    def encode_prompt(self, prompt: Prompt, settings: GenerationOptions) -> EncodedPrompt:
        """Return each member's prompt. Raises PromptTooLongError when a member's context cannot hold its own."""
        if settings.raw:
            if not isinstance(prompt, str) or settings.system is not None:
                raise ConfigError("a raw prompt is one text, without messages and without a system text")
            text, prompts = prompt, [one.engine.prompts.raw(prompt) for one in self.members]
        else:
            messages = _messages(prompt)
            if settings.system is not None:
                messages.insert(0, Message("system", settings.system))
            text = "\n".join(one.content for one in messages)
            prompts = [one.engine.prompts.chat(messages) for one in self.members]
        for one, ids in zip(self.members, prompts, strict=True):
            if len(ids) == 0:
                raise ConfigError(f"the prompt has no tokens for {one.name}", "give a prompt that is not empty")
            if len(ids) >= one.engine.context_length:
                raise PromptTooLongError(
                    f"the prompt has {len(ids)} tokens for {one.name}, whose context holds {one.engine.context_length}",
                    "shorten it; the reply needs room too",
                )
        return EncodedPrompt(tuple(prompts), text.encode(errors="replace"))

    def context(self, settings: GenerationOptions, sessions: Sequence[Session] | None = None) -> GenerationContext:
        """Return what writes replies by these settings, with new sessions or given ones."""
        if settings.wants_ensemble_logprobs and self.unit.name in ("word", "byte"):
            raise UnsupportedError(
                f"logprobs_of is 'ensemble', and in the unit {self.unit.name} members have no common law of a symbol",
                "use --unit piece, or leave it out for those of the drawn member",
            )
        for one in self.members:
            if settings.score_prompt and one.engine.top_k_limit is not None:
                raise UnsupportedError(
                    f"score_prompt needs every token's probability, and {one.name} tells its likeliest only",
                    "use --engine hf (engine='hf')",
                )
        drawable = self._symbols
        if settings.ignore_end:
            drawable = [np.where(symbols == self.unit.end, -1, symbols) for symbols in drawable]
        # What an engine draws by itself comes without alternatives, and from its own logits as they are.
        alone = (
            settings.method in ("mixture", "single")
            and self.unit.name in ("token", "piece")
            and not (
                settings.top_logprobs or settings.wants_ensemble_logprobs or settings.logit_bias or settings.json_schema
            )
        )
        grammars = (
            [None] * len(self.members)
            if settings.json_schema is None
            else self.grammars.for_schema(settings.json_schema)
        )
        members = [
            Member(
                one.engine,
                one.name,
                self._transform(one, settings, symbols),
                symbols,
                MemberOptions(settings.top_logprobs, grammar, alone),
            )
            for one, symbols, grammar in zip(self.members, drawable, grammars, strict=True)
        ]
        drawn = sessions or [one.engine.session() for one in self.members]
        sizes = [one.engine.weights_bytes for one in self.members]
        costs = Costs(lambda: [one.stats.forwards for one in drawn], sizes)
        parts = StrategyContext(
            self.weights, self.names, [one.sampling for one in self.members], sizes, costs, self.unit.name
        )
        tally = SpeculationStats()
        return GenerationContext(
            self.unit,
            self.router,
            settings,
            members,
            build_strategy(settings, parts, tally),
            drawn,
            tally,
            int(np.argmax(self.weights)),
        )

    def _transform(self, member: MemberSpec, settings: GenerationOptions, symbols: Ids) -> Transform:
        """Return a member's transform `A_i`. symbols: of its ids, -1 for those it may not draw."""
        bias = member_logit_bias(settings.logit_bias, member.engine.vocabulary, symbols, member.name, self.unit.name)
        return Transform(settings.member_sampling(member.sampling), np.flatnonzero(symbols < 0), bias)


class Chat:
    """A conversation. A reply that is stopped half-way stays in the history as far as it was written."""

    def __init__(self, ensemble: Ensemble, options: Options) -> None:
        self._ensemble = ensemble
        self._options = options
        self._sessions = [one.engine.session() for one in ensemble.members]
        self._turn = 0
        self.messages: list[Message] = []

    def send(self, text: str) -> Completion:
        """Say something and return the whole reply."""
        for _ in (stream := self.stream(text)):
            pass
        return stream.completion

    def stream(self, text: str) -> ChatStream:
        """Say something and iterate over the reply. The question joins the history once it fits the members."""
        settings = self._ensemble.settings(**self._options).with_turn(self._turn)
        prompts = self._ensemble.encode_prompt([*self.messages, Message("user", text)], settings)
        stream = self._ensemble.context(settings, self._sessions).start(prompts)
        self._turn += 1
        self.messages.append(Message("user", text))
        return ChatStream(stream, self.messages)


class ChatStream(Iterator[Token]):
    """A reply of a conversation; what has been read of it is the last message of the history."""

    def __init__(self, stream: Generation, messages: list[Message]) -> None:
        self._stream = stream
        self._messages = messages
        messages.append(Message("assistant", ""))
        self._place = len(messages) - 1

    def __next__(self) -> Token:
        token = next(self._stream)
        said = self._messages[self._place].content + token.text
        self._messages[self._place] = Message("assistant", said)
        return token

    @property
    def completion(self) -> Completion:
        """The reply so far."""
        return self._stream.completion


def _several(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether these are several prompts, and not one text or one conversation."""
    return not isinstance(prompt, str) and any(not isinstance(one, Message | Mapping) for one in prompt)


def _messages(prompt: Prompt) -> list[Message]:
    """Return a prompt as messages. Raises ConfigError for none, and for what is no message."""
    if isinstance(prompt, str):
        return [Message("user", prompt)]
    messages = [one if isinstance(one, Message) else _message(one) for one in prompt]
    if not messages:
        raise ConfigError("the conversation has no messages", "give at least one message of the user")
    return messages


def _message(given: Mapping[str, str]) -> Message:
    role, content = given.get("role"), given.get("content")
    if role not in ROLES or not isinstance(content, str) or len(given) != 2:
        allowed = ", ".join(ROLES)
        raise ConfigError(f"{dict(given)} is no message", f"a message has a role ({allowed}) and a content, a text")
    return Message(role, content)


def _unit(engines: Sequence[Engine], name: UnitName) -> Unit:
    vocabularies = [one.vocabulary for one in engines]
    if name not in UNITS:
        raise ConfigError(f"unit is {name!r}; it must be one of {', '.join(UNITS)}", did_you_mean(name, UNITS))
    encoders = [one.encoder for one in engines]
    if name == "word":
        return WordUnit(vocabularies, encoders)
    if name == "byte":
        return ByteUnit(vocabularies, encoders)
    if name != "piece":
        reason = vocabulary_conflict(vocabularies)
        if reason is None:
            return TokenUnit(vocabularies)
        if name == "token":
            raise UnsupportedError(f"these members share no vocabulary: {reason}", "use --unit piece")
    return PieceUnit(vocabularies, encoders)
