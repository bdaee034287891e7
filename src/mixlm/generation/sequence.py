"""What strategies are made of: one position of one sequence, and the driver that carries their questions to engines.

A strategy is a generator without input or output of its own: it yields questions for members, is sent the replies, and
returns what was chosen: one symbol, or several where it can tell more at once. Whatever drives it (one sequence, many,
a server, a test with numbers) runs the same code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from mixlm.core.rng import Noise
from mixlm.core.sampling import TokenHistory, top_logprobs
from mixlm.engines.base import Request, Response, SampleResponse, Session
from mixlm.errors import EngineError, UnsupportedError
from mixlm.generation.member import Member
from mixlm.generation.unavailable import UnavailableMembers
from mixlm.routing import Route
from mixlm.types import Candidates, Floats, Ids, LogitsRow, TopKFilter, TopLogprobs
from mixlm.units.base import TextState, Unit


@dataclass(slots=True)
class SpeculationStats:
    """What became of guesses. chosen: what a strategy that chooses among others is using."""

    drafted: int = 0
    accepted: int = 0
    plan: str | None = None


class Choice(NamedTuple):
    """What a strategy chose for one position: a shared symbol, the member that wrote it, its log-probability.

    likeliest: the likeliest symbols of the law it is from and their log-probabilities, where they were asked for.
    """

    symbol: int
    member: int
    logprob: float
    top_logprobs: TopLogprobs = ()


Flow = Generator[list[Request], list[Response], list[Choice]]


class MemberView:
    """One member's view of one sequence. member: the part of it that is the same for every sequence."""

    def __init__(self, member: Member, index: int, state: TextState) -> None:
        self.member = member
        self._index = index
        self._state = state
        self._matcher = None if member.grammar is None else member.grammar.matcher()

    @property
    def state(self) -> TextState:
        """The sequence's state, to be looked at: `Step.push` is what changes it."""
        return self._state

    def ids(self) -> Ids:
        """Return what the member reads now: `τ_i(s)`, int64 (n,)."""
        return self._state.ids(self._index)

    def symbol(self, token: int) -> int:
        """Return the shared symbol of one of the member's ids; -1 for one it may not draw."""
        return int(self.member.symbols[token])

    @property
    def top_k_filter(self) -> TopKFilter | None:
        """What of the member's logits its law depends on, None for all of them."""
        return self.member.transform.top_k_filter if self._matcher is None else None

    @property
    def stuck(self) -> bool:
        """Whether the member has no token that keeps the text what it is held to."""
        if self._matcher is None or not self.member.may_be_stuck:
            return False
        allowed = self._matcher.allowed(self._state.tail(sys.maxsize))
        return allowed is not None and not (allowed & (self.member.symbols >= 0)).any()

    def distribution(self, logits: LogitsRow) -> Candidates:
        """Return the member's distribution over symbols from its logits for `ids`: (vocab,), or what `cut` leaves."""
        return self.bind_distribution()(logits)

    def bind_distribution(self, ids: Ids | None = None, text: bytes | None = None) -> Callable[[LogitsRow], Candidates]:
        """Return `law` for the text as it stands now, for logits that are known only when the text has grown.

        ids, text: what the member reads and what has been written, where that is not the text but a beginning of it.
        """
        history, matcher = self._history(ids), self._matcher
        if matcher is None:
            return (
                self.member.distribution
                if history is None
                else lambda logits: self.member.distribution(logits, history)
            )
        written = self._state.tail(sys.maxsize) if text is None else text
        return lambda logits: self.member.distribution(logits, history, matcher.allowed(written))

    def token_distribution(self, logits: LogitsRow) -> Candidates:
        """Return the member's distribution over its own ids from its logits for `ids`: `A_i p_i`."""
        allowed = None if self._matcher is None else self._matcher.allowed(self._state.tail(sys.maxsize))
        return self.member.transform(logits, self._history(), allowed)

    def _history(self, ids: Ids | None = None) -> TokenHistory | None:
        """Return the tokens so far where the member's options look at them."""
        if not self.member.transform.sampling.has_penalties:
            return None
        ids, prompt = self.ids() if ids is None else ids, self._state.prompt_length(self._index)
        return TokenHistory.from_tokens(ids[:prompt], ids[prompt:])

    def sampler(self, noise: Noise) -> Callable[[LogitsRow], SampleResponse]:
        """Return the function that draws a symbol from the member's logits with the noise of this position."""
        law = self.bind_distribution()

        def choose(logits: LogitsRow) -> SampleResponse:
            return self.sample(law(logits), noise)

        return choose

    def sample(self, law: Candidates, noise: Noise) -> SampleResponse:
        """Draw a symbol from a law of the member's. Raises UnsupportedError for an empty one."""
        if not law.ids.size:
            raise UnsupportedError(f"{self.member.name} gives no probability to anything that json_schema allows here")
        at = noise.sample(law.ids, law.logprobs)
        return SampleResponse(int(law.ids[at]), float(law.logprobs[at]), top_logprobs(law, self.member.top_logprobs))


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One position of one sequence, as a strategy sees it. weights: float64 (members,), summing to 1.

    most: symbols that it may choose, of this position and those behind it.
    push: writes a symbol down as if it had been chosen, and returns the step behind it; None where the reply may not go
    on. Views then read the longer text. What a strategy has pushed is taken back when it is done. absent: members that
    stopped answering and are left out; their weight is 0.
    """

    weights: Floats
    noise: Noise
    views: Sequence[MemberView]
    push: Callable[[int], DecodeStep | None]
    max_symbols: int = 1
    unavailable: Container[int] = ()

    def top_logprobs(self, law: Candidates) -> TopLogprobs:
        """Return the likeliest symbols of a law, as many as are told."""
        return top_logprobs(law, self.views[0].member.top_logprobs)


Strategy = Callable[[DecodeStep], Flow]


class MemberError(EngineError):
    """A member's engine failed while it was asked."""

    def __init__(self, member: int, error: EngineError) -> None:
        super().__init__(error.message, error.hint)
        self.member = member


class SequenceState:
    """One text being written: its state, each member's session and view, and the route that weighs them."""

    def __init__(
        self,
        members: Sequence[Member],
        unit: Unit,
        prompts: Sequence[Ids],
        sessions: Sequence[Session],
        route: Route,
    ) -> None:
        self.members = members
        self.sessions = sessions
        self.route = route
        self.state = unit.initial_state(prompts)
        self.unavailable = UnavailableMembers([one.engine.alive for one in members], [one.name for one in members])
        self._threads: ThreadPoolExecutor | None = None
        self.views = [MemberView(member, i, self.state) for i, member in enumerate(members)]
        self._end = unit.end
        self._room = ContextBudget(members, prompts)
        self._unit = unit

    @property
    def full(self) -> bool:
        """Whether some member's context has no room for another token: the reply ends here, whoever is drawn."""
        return self._room.full(self.state)

    def append(self, choice: Choice) -> None:
        """Add a chosen symbol that is not end-of-text."""
        self.state.append(choice.symbol)
        self._room.written += len(self._unit.symbol_bytes(choice.symbol))

    def decode_step(self, strategy: Strategy, noise: Noise, max_symbols: int = 1) -> Flow:
        """Let a strategy choose what follows, 1 to `most` symbols. The state is as before when it is done."""
        pushed: list[int] = []

        def step(at: Noise) -> DecodeStep:
            weights = self._able(self.unavailable.weights(self.route(self.state)))
            return DecodeStep(weights, at, self.views, partial(push, at), max_symbols - len(pushed), self.unavailable)

        def push(at: Noise, symbol: int) -> DecodeStep | None:
            if symbol == self._end or len(pushed) + 1 >= max_symbols:
                return None
            pushed.append(symbol)
            self.append(Choice(symbol, 0, 0.0))
            return None if self.full else step(at.at(at.position + 1))

        try:
            return (yield from strategy(step(noise)))
        finally:
            self.state.rollback(len(pushed))
            self._room.written -= sum(len(self._unit.symbol_bytes(one)) for one in pushed)

    def _able(self, weights: Floats) -> Floats:
        """Return weights (members,) without those of members that cannot go on with the text, renormalised.

        Whether one can is a matter of the text and its vocabulary, not of what it finds likely. Raises UnsupportedError
        where none can.
        """
        stuck = [i for i, view in enumerate(self.views) if weights[i] > 0 and view.stuck]
        if not stuck or self._unit.name == "byte":
            return weights
        kept = weights.copy()
        kept[stuck] = 0.0
        if kept.sum() == 0:
            raise UnsupportedError("no member has a token that keeps the reply what json_schema allows")
        kept /= kept.sum()
        return kept

    def answer(self, requests: Sequence[Request]) -> list[Response]:
        """Hand each engine all that is asked of it in one call; return the replies in the order of the requests.

        Engines on devices of their own work at once. On one device they would only share it, so they work in turn.
        """
        asked: dict[int, list[int]] = {}
        for at, request in enumerate(requests):
            asked.setdefault(self.members[request.member].engine.batch_key, []).append(at)
        calls = [partial(self._ask, places, requests) for places in asked.values()]
        engines = [self.members[requests[places[0]].member].engine for places in asked.values()]
        if len(calls) > 1 and len({engine.device for engine in engines}) == len(calls):
            # The threads live as long as the sequence: starting them for each token would cost more than they save.
            self._threads = self._threads or ThreadPoolExecutor(len(self.members))
            answers = [future.result() for future in [self._threads.submit(call) for call in calls]]
        else:
            answers = [call() for call in calls]
        replies: list[Response] = [None] * len(requests)
        for places, found in zip(asked.values(), answers, strict=True):
            for at, reply in zip(places, found, strict=True):
                replies[at] = reply
        return replies

    def _ask(self, places: Sequence[int], requests: Sequence[Request]) -> list[Response]:
        engine = self.members[requests[places[0]].member].engine
        try:
            return engine.respond([(self.sessions[requests[at].member], requests[at]) for at in places])
        except EngineError as error:
            raise MemberError(requests[places[0]].member, error) from error


class ContextBudget:
    """Whether every member's context can take one more token. A reply ends where the first of them is full."""

    def __init__(self, members: Sequence[Member], prompts: Sequence[Ids]) -> None:
        self._limits = [one.engine.context_length for one in members]
        self._left = [limit - len(prompt) for limit, prompt in zip(self._limits, prompts, strict=True)]
        self.written = 0

    def full(self, state: TextState) -> bool:
        """Count tokens only when the bytes written, which are never fewer, might not fit."""
        return any(
            self.written >= left and len(state.ids(i)) > limit
            for i, (left, limit) in enumerate(zip(self._left, self._limits, strict=True))
        )


def drive(flow: Flow, dispatch: Callable[[list[Request]], list[Response]]) -> list[Choice]:
    """Carry a strategy's questions to `answer` and back until it has chosen."""
    try:
        requests = next(flow)
        while True:
            requests = flow.send(dispatch(requests))
    except StopIteration as done:
        choices: list[Choice] = done.value
        return choices
