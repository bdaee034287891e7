"""The generation loop.

until an end:  weights ← route(text);  symbols ← strategy(weights, noise);  text ← text + symbols;  emit tokens
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mixlm.core.detokenize import StreamingDetokenizer
from mixlm.core.options import GenerationOptions
from mixlm.core.rng import Noise
from mixlm.engines.base import Session
from mixlm.engines.requests import Request, Response
from mixlm.errors import EngineError, GenerationInterruptedError, MixlmError, RequestRefusedError
from mixlm.generation.dispatch import Dispatcher, MemberError, RequestFlow, drive
from mixlm.generation.member import Member, address
from mixlm.generation.prompt import EncodedPrompt
from mixlm.generation.sequence import Choice, SequenceState, SpeculationStats, Strategy
from mixlm.routing.base import CheckedRoute, FixedRouter, PromptContext, Router, observed_by
from mixlm.tokenization.tool_calls import CALL_BEGIN
from mixlm.types import (
    Completion,
    FinishReason,
    Floats,
    MemberUsage,
    Token,
    ToolCall,
    TopLogprob,
    Usage,
    colored_html,
)
from mixlm.units.base import Unit

if TYPE_CHECKING:
    from mixlm.generation.target import RuleTarget

_CALL_BEGIN = CALL_BEGIN.encode()


@dataclass(frozen=True)
class GenerationContext:
    """What sequences with one set of options are generated with.

    heaviest_member: the one that `single` uses. opening_members: those of the first `min_tokens` symbols, which do not
    sample end-of-text. target: what a combination rule makes of the members; None for the average. keeps_sessions:
    whether the sessions go on with another sequence when a generation ends.
    """

    unit: Unit
    router: Router
    settings: GenerationOptions
    members: Sequence[Member]
    strategy: Strategy
    sessions: Sequence[Session]
    speculation: SpeculationStats
    heaviest_member: int = 0
    opening_members: Sequence[Member] = ()
    target: RuleTarget | None = None
    dispatcher: Dispatcher = field(default_factory=Dispatcher)
    keeps_sessions: bool = False

    @property
    def scoring_router(self) -> Router:
        """What weighs the members where a given text is scored."""
        if self.settings.method != "single":
            return self.router
        return FixedRouter(np.eye(len(self.members))[self.heaviest_member])

    def begin_sequence(self, prompt: EncodedPrompt, bits: Callable[[], Floats] | None = None) -> SequenceState:
        """Return the sequence that begins after the members' prompts. bits: in place of `bits_per_byte`."""
        context = PromptContext(prompt.text, bits or (lambda: bits_per_byte(self.sessions, prompt)))
        # `single` takes no weights: a router that observes a member would run it for nothing.
        router = self.router if observed_by(self.router) is None else self.scoring_router
        route = CheckedRoute(router, context, len(self.members))
        unavailable = None
        if self.settings.on_failure == "drop":
            from mixlm.generation.unavailable import UnavailableMembers

            unavailable = UnavailableMembers(self.members)
        members = self.opening_members or self.members
        return SequenceState(members, self.unit, prompt.ids, self.sessions, route, unavailable)

    def decode_step(self, sequence: SequenceState, noise: Noise, max_symbols: int = 1) -> list[Choice]:
        """Return the next 1 to `max_symbols` symbols of a sequence, which is not changed."""
        return drive(sequence.decode_step(self.strategy, noise, max_symbols), self.respond)

    def respond(self, requests: Sequence[Request]) -> list[Response]:
        """Return the responses to requests. Raises MemberError for the first engine that failed."""
        return self.dispatcher.respond(address(requests, self.members, self.sessions))

    def start(self, prompt: EncodedPrompt) -> Generation:
        """Return the generation of a completion; it runs when it is iterated over."""
        return Generation(self, prompt)

    def refused(self, error: MixlmError) -> Generation:
        """Return a generation that an error ended before it began."""
        generation = self.start(EncodedPrompt((np.zeros(0, dtype=np.int64),) * len(self.members), b""))
        generation.fail(error)
        return generation


def bits_per_byte(sessions: Sequence[Session], prompt: EncodedPrompt) -> Floats:
    """Return how well each member predicts its own prompt, template included, in bits per byte of the prompt's text."""
    bits = [-session.token_logprobs(ids).sum() / np.log(2) for session, ids in zip(sessions, prompt.ids, strict=True)]
    return np.array(bits) / max(len(prompt.text), 1)


class _BitsNeeded(BaseException):
    """A router has asked for the prompt's bits per byte. No router's `except Exception` catches it."""


def _begin_sequence(context: GenerationContext, prompt: EncodedPrompt) -> RequestFlow[SequenceState]:
    """Begin a sequence, with requests where the router needs the prompt's bits per byte; it is then asked again."""

    def not_yet() -> Floats:
        raise _BitsNeeded

    try:
        return context.begin_sequence(prompt, not_yet)
    except _BitsNeeded:
        from mixlm.generation.prompt_logprobs import member_prompt_bits

        bits = yield from member_prompt_bits(context.members, context.sessions, prompt.ids)
        return context.begin_sequence(prompt, lambda: bits / max(len(prompt.text), 1))


class Generation(Iterator[Token]):
    """A completion in progress: an iterator over its tokens. After the last token, `completion` is complete.

    Iteration calls the engines. A scheduler of many generations does that in its place: it reads the `requests` of
    each, and hands the responses to `resume`; the tokens written since are then `ready`.

    >>> generation = ensemble.stream("The sky is", max_tokens=20)    # doctest: +SKIP
    >>> for token in generation:                                     # doctest: +SKIP
    ...     print(token.text, end="")
    >>> generation.completion.usage.tokens_per_second                # doctest: +SKIP
    """

    def __init__(self, context: GenerationContext, prompt: EncodedPrompt) -> None:
        self.sessions = context.sessions
        self.members = context.members
        self.ready: deque[Token] = deque()
        self.finished = False
        self.error: MixlmError | None = None
        self._context = context
        self._prompt = prompt
        self._tokens: list[Token] = []
        self._prompt_tokens: tuple[Token, ...] = ()
        self._end_token: Token | None = None
        self._stop_string: str | None = None
        self._finish_reason: FinishReason = "length"
        self._start_time = self._first_time = self._last_time = time.perf_counter()
        self._initial = [
            (len(s.stats.forwards), s.stats.tokens, s.stats.seconds, s.stats.cached_tokens) for s in context.sessions
        ]
        self._sequence: SequenceState | None = None
        self._flow = self._run()
        self._requests: list[Request] | None = None

    def __repr__(self) -> str:
        text = "".join(token.text for token in self._tokens)
        state = "failed" if self.error else "finished" if self.finished else "in progress"
        tokens = f"{len(self._tokens)} token{'' if len(self._tokens) == 1 else 's'}"
        return f"<Generation {state}: {tokens}, {text[:60]!r}{'…' if len(text) > 60 else ''}>"

    def _repr_html_(self) -> str:
        """Return the text so far for a notebook, each token in its member's colour."""
        return colored_html(self._tokens, [member.name for member in self.members])

    def __next__(self) -> Token:
        while not self.ready:
            try:
                requests = self.requests()
                if self.finished:
                    if not self._context.keeps_sessions:
                        self.release()
                    raise StopIteration
                self.resume(self._context.respond(requests))
            except MemberError as error:
                self.continue_without(error)
        return self.ready.popleft()

    def requests(self) -> list[Request]:
        """Return the requests that it waits for; none when it is finished."""
        if self._requests is None and not self.finished:
            self._advance(None)
        return self._requests or []

    def resume(self, responses: list[Response]) -> None:
        """Continue with the responses to `requests`, in their order."""
        self._advance(responses)

    def continue_without(self, error: MemberError) -> None:
        """Continue without the member that failed, where the options say so and others are left.

        One that refuses a request has not stopped answering.

        Pending requests are void.

        Raises:
            GenerationInterruptedError: The generation ends here; the error carries its completion.
        """
        sequence, reason = self._sequence, error.message
        unavailable = None if sequence is None else sequence.unavailable
        is_gone = not isinstance(error.__cause__, RequestRefusedError)
        if unavailable is not None and is_gone and error.member not in unavailable:
            unavailable.exclude(error.member, error)
            try:
                return self._advance(error)
            except EngineError as last:
                reason = f"{reason}; {last.message}"
        self._finish_reason = "error"
        name = self.members[error.member].name
        message = f"{name} failed in the middle of a generation: {reason}"
        interrupted = GenerationInterruptedError(message, error.hint, self.completion)
        self.fail(interrupted)
        raise interrupted from error

    def fail(self, error: MixlmError) -> None:
        """End it with an error; the completion holds what was written."""
        self.close()
        self.error = error

    def close(self) -> None:
        """End it; the completion holds what was written."""
        self._flow.close()
        self._requests, self.finished = None, True

    def release(self) -> None:
        """End it and free the members' KV caches. The completion stays."""
        self.close()
        for session in self.sessions:
            session.close()

    def finish(self) -> Completion:
        """Generate the rest and return the completion."""
        for _ in self:
            pass
        return self.completion

    @property
    def completion(self) -> Completion:
        """The completion so far."""
        return Completion(
            "".join(token.text for token in self._tokens),
            tuple(self._tokens),
            self._finish_reason,
            self._context.settings.seed,
            self._usage(),
            self._prompt_tokens,
            self._end_token,
            self._tool_calls(),
            self._stop_string,
        )

    def _tool_calls(self) -> tuple[ToolCall, ...]:
        """Return the calls in the text so far."""
        tools = self._context.settings.callable_tools
        if not tools:
            return ()
        from mixlm.tokenization.call_parser import split_calls

        return split_calls("".join(token.text for token in self._tokens), [tool.name for tool in tools])[1]

    def _advance(self, outcome: list[Response] | MemberError | None) -> None:
        """Run until the next requests, or the end. outcome: of the last requests; None to begin."""
        # Whatever is raised in here ends the generation.
        self._requests, self.finished = None, True
        try:
            if isinstance(outcome, MemberError):
                self._requests = self._flow.throw(outcome)
            else:
                self._requests = next(self._flow) if outcome is None else self._flow.send(outcome)
        except StopIteration:
            return
        self.finished = False

    def _run(self) -> RequestFlow[None]:
        context, options = self._context, self._context.settings
        sequence = self._sequence = yield from _begin_sequence(context, self._prompt)
        if options.score_prompt:
            self._prompt_tokens = yield from self._score_prompt()
        detokenizer = StreamingDetokenizer(self._stop_strings())
        position = 0
        while position < options.max_tokens and not sequence.full:
            noise = Noise(options.seed, options.sequence, position)
            if position == options.min_tokens > 0:
                sequence.use_members(context.members)
            limit = options.min_tokens if position < options.min_tokens else options.max_tokens
            choices = yield from self._decode_step(sequence, noise, min(limit, options.max_tokens) - position)
            self._last_time = time.perf_counter()
            if position == 0:
                self._first_time = self._last_time
            for choice in choices:
                if choice.symbol == context.unit.end:
                    self._finish_reason = "stop"
                    self._end_token = self._token(choice)
                    self._emit(detokenizer.flush())
                    return
                sequence.state.append(choice.symbol)
                token = self._token(choice)
                if options.callable_tools and _CALL_BEGIN in sequence.state.tail(len(_CALL_BEGIN) + len(token.data)):
                    detokenizer.stops = []  # they are for text, and would cut the arguments of a call
                self._emit(detokenizer.push(token, may_stop=position >= options.min_tokens))
                if detokenizer.found is not None:
                    self._finish_reason, self._stop_string = "stop", detokenizer.found
                    return
            position += len(choices)
            if sequence.unavailable is not None:
                sequence.unavailable.count(len(choices))
        self._emit(detokenizer.flush())

    def _decode_step(self, sequence: SequenceState, noise: Noise, max_symbols: int) -> RequestFlow[list[Choice]]:
        """Choose the next symbols; again where a member is excluded meanwhile, for nothing of the first try counts."""
        if sequence.unavailable is not None:
            sequence.unavailable.retry()
        while True:
            try:
                choices = yield from sequence.decode_step(self._context.strategy, noise, max_symbols)
                if self._context.settings.wants_ensemble_logprobs:
                    from mixlm.generation.next_distribution import ensemble_logprobs
                    from mixlm.generation.target import average_target

                    repeat = ensemble_logprobs(choices, self._context.target or average_target())
                    choices = yield from sequence.decode_step(repeat, noise, len(choices))
                return choices
            except MemberError:
                continue

    def _score_prompt(self) -> RequestFlow[tuple[Token, ...]]:
        from mixlm.generation.prompt_logprobs import prompt_tokens, rule_prompt_tokens

        context, target, router = self._context, self._context.target, self._context.scoring_router
        if context.settings.rule is None or target is None:
            return (yield from prompt_tokens(context.members, context.sessions, context.unit, router, self._prompt))
        assert isinstance(router, FixedRouter)
        taking_part = target.rows(router.weights)
        return (yield from rule_prompt_tokens(target.scored, taking_part, context.members, context.unit, self._prompt))

    def _stop_strings(self) -> list[str]:
        """Return the strings that end the text; those of chat templates not where a schema says where it ends."""
        options = self._context.settings
        language = options.language
        if language is not None and language.json_schema is False:
            return []  # calls alone
        if options.raw or (language is not None and language.json_schema is not None):
            return [*options.stop]
        return [*options.stop, *{stop for member in self.members for stop in member.engine.stops}]

    def _token(self, choice: Choice) -> Token:
        """Return a choice as a token whose text is not known yet."""
        data, name = self._context.unit.symbol_bytes, self.members[choice.member].name
        top_logprobs = tuple(TopLogprob(data(symbol), logprob) for symbol, logprob in choice.top_logprobs)
        return Token("", data(choice.symbol), name, choice.logprob, top_logprobs)

    def _emit(self, tokens: Sequence[Token]) -> None:
        self._tokens += tokens
        self.ready += tokens

    def _usage(self) -> Usage:
        unavailable = None if self._sequence is None else self._sequence.unavailable
        members: dict[str, MemberUsage] = {}
        for i, (member, (forwards, tokens, seconds, cached)) in enumerate(
            zip(self.members, self._initial, strict=True)
        ):
            stats = self.sessions[i].stats
            members[member.name] = MemberUsage(
                prompt_tokens=len(self._prompt.ids[i]),
                tokens=sum(token.member == member.name for token in self._tokens),
                forwards=len(stats.forwards) - forwards,
                forward_tokens=stats.tokens - tokens,
                forward_seconds=stats.seconds - seconds,
                dropped=0 if unavailable is None else unavailable.positions[i],
                cached_tokens=min(stats.cached_tokens - cached, len(self._prompt.ids[i])),
            )
        speculation = self._context.speculation
        return Usage(
            len(self._tokens),
            sum(len(token.data) for token in self._tokens),
            self._last_time - self._start_time,
            self._first_time - self._start_time,
            members,
            speculation.drafted,
            speculation.accepted,
            speculation.plan,
        )
