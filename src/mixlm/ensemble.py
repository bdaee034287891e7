"""An ensemble: members, weights and a unit; and the loop that writes a text with them.

until an end:  weights ← route(state);  choice ← strategy(state, weights, noise);  state ← choice;  emit its text
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import numpy as np

from mixlm.config import UNITS, UnitName
from mixlm.decoding import strategy
from mixlm.decoding.base import Choice, Member, Step, Strategy, Writing, run
from mixlm.engines import Engine
from mixlm.engines.base import Session
from mixlm.errors import ConfigError, PromptTooLongError, UnsupportedError, did_you_mean
from mixlm.mixing import checked_weights
from mixlm.noise import Noise
from mixlm.records import ROLES, Completion, FinishReason, MemberUsage, Message, Token, Usage
from mixlm.routing import Context, Fixed, Router
from mixlm.sampling import Floats, Ids
from mixlm.settings import Options, Settings
from mixlm.text import TextStream
from mixlm.vocab.pieces import PieceUnit
from mixlm.vocab.shared import TokenUnit, conflict
from mixlm.vocab.units import Unit

Prompt = str | Sequence[Message | Mapping[str, str]]


@dataclass(frozen=True)
class Prompts:
    """A prompt as each member reads it, int64 ids, and as its author wrote it, UTF-8."""

    ids: tuple[Ids, ...]
    text: bytes


@dataclass(frozen=True)
class MemberSpec:
    """A loaded member: its engine, the name it is shown by, and its own sampling options."""

    engine: Engine
    name: str
    sampling: Mapping[str, Any] = field(default_factory=dict)


class Ensemble:
    """Several language models that write one text.

    weights: one a member, any positive scale; equal when left out. unit: "token" (members that share a vocabulary),
    "piece" (any vocabularies), or "auto". router: weights by state, in place of `weights`. defaults: for every reply.
    Raises ConfigError for weights that do not fit, UnsupportedError when the unit does not fit the vocabularies.
    """

    def __init__(
        self,
        members: Sequence[MemberSpec],
        weights: Sequence[float] | None = None,
        *,
        unit: UnitName = "auto",
        router: Router | None = None,
        defaults: Settings | None = None,
    ) -> None:
        if not members:
            raise ConfigError("an ensemble needs at least one member")
        self.members = tuple(members)
        self.weights = checked_weights(weights, len(members))
        self.router = router or Fixed(self.weights)
        self.defaults = defaults or Settings()
        self.unit = _unit([one.engine for one in members], unit)
        self._symbols = [self.unit.symbols(i) for i in range(len(members))]

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names, in order."""
        return tuple(one.name for one in self.members)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Write a whole reply. `prompt`: a user's message, a conversation, or with raw=True a text to continue."""
        return self.stream(prompt, **options).finish()

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """Write a reply token by token: iterate over it, then read its `completion`."""
        settings = self.settings(**options)
        return self.writer(settings).stream(self.prompts(prompt, settings))

    def chat(self, **options: Unpack[Options]) -> Chat:
        """Begin a conversation that remembers its turns, and whose members keep their caches between them."""
        return Chat(self, options)

    def settings(self, **options: Unpack[Options]) -> Settings:
        """Return the checked settings of a call."""
        return self.defaults.with_options(options)

    def prompts(self, prompt: Prompt, settings: Settings) -> Prompts:
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
        return Prompts(tuple(prompts), text.encode(errors="replace"))

    def writer(self, settings: Settings, sessions: Sequence[Session] | None = None) -> Writer:
        """Return what writes replies by these settings, with new sessions or given ones."""
        drawable = self._symbols
        if settings.ignore_end:
            drawable = [np.where(symbols == self.unit.end, -1, symbols) for symbols in drawable]
        members = [
            Member(one.engine, one.name, settings.for_member(one.sampling), symbols)
            for one, symbols in zip(self.members, drawable, strict=True)
        ]
        chosen = strategy(settings, self.weights, [one.sampling for one in self.members])
        return Writer(self, settings, members, chosen, sessions or [one.engine.session() for one in self.members])


@dataclass
class Writer:
    """An ensemble set up for one kind of reply."""

    ensemble: Ensemble
    settings: Settings
    members: Sequence[Member]
    strategy: Strategy
    sessions: Sequence[Session]

    def begin(self, prompts: Prompts) -> Writing:
        """Begin a sequence behind the members' prompts."""
        route = self.ensemble.router.begin(Context(prompts.text, lambda: bits_per_byte(self.sessions, prompts)))
        return Writing(self.members, self.ensemble.unit, prompts.ids, self.sessions, route)

    def choose(self, writing: Writing, noise: Noise) -> Choice:
        """Find the next symbol of a sequence; its state is not changed."""
        weights = writing.route(writing.state)
        return run(self.strategy(Step(weights, noise, writing.views)), writing.answer)

    def stream(self, prompts: Prompts) -> Stream:
        """Begin a reply."""
        return Stream(self, prompts)


def bits_per_byte(sessions: Sequence[Session], prompts: Prompts) -> Floats:
    """Return how well each member predicts its own prompt, template included, in bits per byte of what was asked."""
    bits = [-session.token_logprobs(ids).sum() / np.log(2) for session, ids in zip(sessions, prompts.ids, strict=True)]
    return np.array(bits) / max(len(prompts.text), 1)


class Stream(Iterator[Token]):
    """A reply while it is written. After the last token, `completion` holds the whole of it."""

    def __init__(self, writer: Writer, prompts: Prompts) -> None:
        self._writer = writer
        self._prompts = prompts
        self._tokens: list[Token] = []
        self._finish_reason: FinishReason = "length"
        self._start = self._first = self._end = time.perf_counter()
        self._before = [(len(s.work.log), s.work.tokens, s.work.seconds) for s in writer.sessions]
        self._iterator = self._write()

    def __next__(self) -> Token:
        token = next(self._iterator)
        self._tokens.append(token)
        return token

    def finish(self) -> Completion:
        """Write the rest and return the whole reply."""
        for _ in self:
            pass
        return self.completion

    @property
    def completion(self) -> Completion:
        """The reply so far; the whole of it once the iteration has ended."""
        text = "".join(one.text for one in self._tokens)
        return Completion(text, tuple(self._tokens), self._finish_reason, self._writer.settings.seed, self._usage())

    def _write(self) -> Iterator[Token]:
        writer, settings = self._writer, self._writer.settings
        unit = writer.ensemble.unit
        writing = writer.begin(self._prompts)
        stops = () if settings.raw else {stop for one in writer.members for stop in one.engine.stops}
        text = TextStream([*settings.stop, *stops])
        room = _Room(writer.members, self._prompts.ids)
        for position in range(settings.max_tokens):
            if room.full(writing):
                break
            choice = writer.choose(writing, Noise(settings.seed, settings.sequence, position))
            self._end = time.perf_counter()
            if position == 0:
                self._first = self._end
            if choice.symbol == unit.end:
                self._finish_reason = "stop"
                break
            writing.state.append(choice.symbol)
            data = unit.data(choice.symbol)
            room.written += len(data)
            yield from text.push(Token("", data, writer.members[choice.member].name, choice.logprob))
            if text.stopped:
                self._finish_reason = "stop"
                return
        yield from text.flush()

    def _usage(self) -> Usage:
        members = {}
        for one, prompt, session, before in zip(
            self._writer.members, self._prompts.ids, self._writer.sessions, self._before, strict=True
        ):
            work = session.work
            members[one.name] = MemberUsage(
                prompt_tokens=len(prompt),
                tokens=sum(token.member == one.name for token in self._tokens),
                forwards=len(work.log) - before[0],
                forward_tokens=work.tokens - before[1],
                forward_seconds=work.seconds - before[2],
            )
        size = sum(len(token.data) for token in self._tokens)
        seconds, first = self._end - self._start, self._first - self._start
        return Usage(len(self._tokens), size, seconds, first, members)


class _Room:
    """Whether every member's context can take one more token. A reply ends where the first of them is full."""

    def __init__(self, members: Sequence[Member], prompts: Sequence[Ids]) -> None:
        self._left = [one.engine.context_length - len(prompt) for one, prompt in zip(members, prompts, strict=True)]
        self._limits = [one.engine.context_length for one in members]
        self.written = 0

    def full(self, writing: Writing) -> bool:
        """Count tokens only when the bytes written, which are never fewer, might not fit."""
        return any(
            self.written >= left and len(writing.state.ids(i)) > limit
            for i, (left, limit) in enumerate(zip(self._left, self._limits, strict=True))
        )


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
        prompts = self._ensemble.prompts([*self.messages, Message("user", text)], settings)
        stream = self._ensemble.writer(settings, self._sessions).stream(prompts)
        self._turn += 1
        self.messages.append(Message("user", text))
        return ChatStream(stream, self.messages)


class ChatStream(Iterator[Token]):
    """A reply of a conversation; what has been read of it is the last message of the history."""

    def __init__(self, stream: Stream, messages: list[Message]) -> None:
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
    if name != "piece":
        reason = conflict(vocabularies)
        if reason is None:
            return TokenUnit(vocabularies)
        if name == "token":
            raise UnsupportedError(f"these members share no vocabulary: {reason}", "use --unit piece")
    return PieceUnit(vocabularies, [one.encoder for one in engines])
