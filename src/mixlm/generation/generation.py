"""The loop that writes a reply.

until an end:  weights ← route(state);  choices ← strategy(state, weights, noise);  state ← choices;  emit their text
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mixlm.core.detokenize import StreamingDetokenizer
from mixlm.core.options import GenerationOptions
from mixlm.core.rng import Noise
from mixlm.engines.base import Request, Response, Session
from mixlm.errors import EngineError, GenerationInterruptedError, MixlmError
from mixlm.generation.ensemble_logprobs import ensemble_logprobs
from mixlm.generation.member import Member
from mixlm.generation.prompt_logprobs import prompt_tokens
from mixlm.generation.sequence import Choice, MemberError, SequenceState, SpeculationStats, Strategy, drive
from mixlm.routing import FixedRouter, PromptContext, Router
from mixlm.types import Completion, FinishReason, Floats, Ids, MemberUsage, Token, TopLogprob, Usage
from mixlm.units.base import Unit


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as each member reads it, int64 ids, and as its author wrote it, UTF-8."""

    ids: tuple[Ids, ...]
    text: bytes


@dataclass
class GenerationContext:
    """An ensemble set up for one kind of reply, and a session for each member. heaviest: whom `single` takes."""

    unit: Unit
    router: Router
    settings: GenerationOptions
    members: Sequence[Member]
    strategy: Strategy
    sessions: Sequence[Session]
    speculation: SpeculationStats
    heaviest_member: int = 0

    @property
    def scoring_router(self) -> Router:
        """What weighs the members where they are asked about a given text."""
        if self.settings.method != "single":
            return self.router
        return FixedRouter(np.eye(len(self.members))[self.heaviest_member])

    def begin_sequence(self, prompts: EncodedPrompt) -> SequenceState:
        """Begin a sequence behind the members' prompts."""
        route = self.router.begin(PromptContext(prompts.text, lambda: bits_per_byte(self.sessions, prompts)))
        return SequenceState(self.members, self.unit, prompts.ids, self.sessions, route)

    def decode_step(self, writing: SequenceState, noise: Noise, max_symbols: int = 1) -> list[Choice]:
        """Find what follows in a sequence, 1 to `most` symbols; its state is not changed."""
        return drive(writing.decode_step(self.strategy, noise, max_symbols), writing.answer)

    def start(self, prompts: EncodedPrompt) -> Generation:
        """Begin a reply."""
        return Generation(self, prompts)


def bits_per_byte(sessions: Sequence[Session], prompts: EncodedPrompt) -> Floats:
    """Return how well each member predicts its own prompt, template included, in bits per byte of what was asked."""
    bits = [-session.token_logprobs(ids).sum() / np.log(2) for session, ids in zip(sessions, prompts.ids, strict=True)]
    return np.array(bits) / max(len(prompts.text), 1)


class Generation(Iterator[Token]):
    """A reply while it is written. After the last token, `completion` holds the whole of it.

    Iterating over it asks its members' engines itself. What writes many replies at once takes the `questions` of each
    in their place, and hands the answers to `resume`; the tokens written since are then `ready`.
    """

    def __init__(self, writer: GenerationContext, prompts: EncodedPrompt) -> None:
        self.sessions = writer.sessions
        self.members = writer.members
        self.ready: deque[Token] = deque()
        self._writer = writer
        self._prompts = prompts
        self._tokens: list[Token] = []
        self._told: tuple[Token, ...] = ()
        self._end_token: Token | None = None
        self._finish_reason: FinishReason = "length"
        self._start = self._first = self._end = time.perf_counter()
        self._before = [(len(s.stats.forwards), s.stats.tokens, s.stats.seconds) for s in writer.sessions]
        self._writing: SequenceState | None = None
        self._flow = self._write()
        self._questions: list[Request] | None = None
        self.finished = False
        self.error: MixlmError | None = None

    def __next__(self) -> Token:
        while not self.ready:
            try:
                questions = self.requests()
                if self._writing is None or self.finished:
                    raise StopIteration
                self.resume(self._writing.answer(questions))
            except MemberError as error:
                self.continue_without(error)
        return self.ready.popleft()

    def requests(self) -> list[Request]:
        """Return what the reply waits for. Empty when it is finished."""
        if self._questions is None and not self.finished:
            self._advance(None)
        return self._questions or []

    def resume(self, replies: list[Response]) -> None:
        """Go on with the answers to `questions`, in their order."""
        self._advance(replies)

    def continue_without(self, error: MemberError) -> None:
        """Go on without the member that failed, if that was chosen and others are left. What was asked is void.

        Raises ReplyCutError, which carries what was written, where the reply ends here.
        """
        writing, reason = self._writing, error.message
        if (
            self._writer.settings.on_failure == "drop"
            and writing is not None
            and error.member not in writing.unavailable
        ):
            writing.unavailable.exclude(error.member, error)
            try:
                return self._advance(error)
            except EngineError as last:
                reason = f"{reason}; {last.message}"
        self._finish_reason = "error"
        name = self.members[error.member].name
        cut = GenerationInterruptedError(
            f"{name} failed in the middle of a reply: {reason}", error.hint, self.completion
        )
        self.fail(cut)
        raise cut from error

    def fail(self, error: MixlmError) -> None:
        """End the reply as far as it was written."""
        self._flow.close()
        self._questions, self.finished, self.error = None, True, error

    def close(self) -> None:
        """End the reply as far as it was written."""
        self._flow.close()
        self._questions, self.finished = None, True

    def release(self) -> None:
        """End the reply and free the members' caches. What was written, and its figures, stay."""
        self.close()
        for session in self.sessions:
            session.reset()

    def finish(self) -> Completion:
        """Write the rest and return the whole reply."""
        for _ in self:
            pass
        return self.completion

    @property
    def completion(self) -> Completion:
        """The reply so far; the whole of it once it is finished."""
        text = "".join(one.text for one in self._tokens)
        return Completion(
            text,
            tuple(self._tokens),
            self._finish_reason,
            self._writer.settings.seed,
            self._usage(),
            self._told,
            self._end_token,
        )

    def _advance(self, replies: list[Response] | MemberError | None) -> None:
        # Whatever is raised in here ends the reply as far as it was written.
        self._questions, self.finished = None, True
        try:
            if isinstance(replies, MemberError):
                self._questions = self._flow.throw(replies)
            else:
                self._questions = next(self._flow) if replies is None else self._flow.send(replies)
        except StopIteration:
            return
        self.finished = False

    def _write(self) -> Generator[list[Request], list[Response], None]:
        writer, settings = self._writer, self._writer.settings
        writing = self._writing = writer.begin_sequence(self._prompts)
        # What a schema holds a reply to says where it ends.
        bare = settings.raw or settings.json_schema is not None
        stops = () if bare else {stop for one in writer.members for stop in one.engine.stops}
        text = StreamingDetokenizer([*settings.stop, *stops])
        if settings.score_prompt:
            given = (self._prompts.ids, self._prompts.text)
            self._told = yield from prompt_tokens(writer.members, writer.unit, writer.scoring_router, given)
        position = 0
        while position < settings.max_tokens and not writing.full:
            noise = Noise(settings.seed, settings.sequence, position)
            choices = yield from self._choices(writing, noise, settings.max_tokens - position)
            self._end = time.perf_counter()
            if position == 0:
                self._first = self._end
            for choice in choices:
                if choice.symbol == writer.unit.end:
                    self._finish_reason = "stop"
                    self._end_token = self._token(choice)
                    self._emit(text.flush())
                    return
                writing.append(choice)
                self._emit(text.push(self._token(choice)))
                if text.stopped:
                    self._finish_reason = "stop"
                    return
            position += len(choices)
            writing.unavailable.count(len(choices))
        self._emit(text.flush())

    def _choices(
        self, writing: SequenceState, noise: Noise, most: int
    ) -> Generator[list[Request], list[Response], list[Choice]]:
        """Choose what follows, anew where a member is left out meanwhile: of the first try, nothing is written."""
        writing.unavailable.retry()
        while True:
            try:
                choices = yield from writing.decode_step(self._writer.strategy, noise, most)
                if self._writer.settings.wants_ensemble_logprobs:
                    choices = yield from writing.decode_step(ensemble_logprobs(choices), noise, len(choices))
                return choices
            except MemberError:
                continue

    def _token(self, choice: Choice) -> Token:
        """Return what was chosen as a token whose text is not known yet."""
        unit = self._writer.unit
        others = tuple(
            TopLogprob(b"" if symbol == unit.end else unit.symbol_bytes(symbol), logprob)
            for symbol, logprob in choice.top_logprobs
        )
        data = b"" if choice.symbol == unit.end else unit.symbol_bytes(choice.symbol)
        return Token("", data, self.members[choice.member].name, choice.logprob, others)

    def _emit(self, tokens: Sequence[Token]) -> None:
        self._tokens += tokens
        self.ready += tokens

    def _usage(self) -> Usage:
        members: dict[str, MemberUsage] = {}
        parts = zip(self._writer.members, self._prompts.ids, self.sessions, self._before, strict=True)
        for at, (one, prompt, session, before) in enumerate(parts):
            work = session.stats
            absent = 0 if self._writing is None else self._writing.unavailable.positions[at]
            members[one.name] = MemberUsage(
                prompt_tokens=len(prompt),
                tokens=sum(token.member == one.name for token in self._tokens),
                forwards=len(work.forwards) - before[0],
                forward_tokens=work.tokens - before[1],
                forward_seconds=work.seconds - before[2],
                dropped=absent,
            )
        size = sum(len(token.data) for token in self._tokens)
        seconds, first = self._end - self._start, self._first - self._start
        tally = self._writer.speculation
        return Usage(len(self._tokens), size, seconds, first, members, tally.drafted, tally.accepted, tally.plan)
