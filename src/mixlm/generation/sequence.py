"""One sequence, and one decode step of it.

A strategy is a generator without I/O: it yields requests for members, is sent their responses, and returns the symbols
it chose: one, or several where it can decide more at once. The same code runs for one sequence, for many, in a server
and in a test with numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from mixlm.core.rng import Noise
from mixlm.core.sampling import top_logprobs
from mixlm.engines.base import Session
from mixlm.engines.requests import LogitsAndHidden, LogitsRequest
from mixlm.errors import EngineError, UnsupportedError
from mixlm.generation.dispatch import RequestFlow
from mixlm.generation.member import Member, MemberView
from mixlm.routing.base import CheckedRoute, Observation, ObservedRow
from mixlm.types import Candidates, Floats, Ids, LogitsRow, TopLogprobs
from mixlm.units.base import Unit

if TYPE_CHECKING:
    from mixlm.generation.unavailable import UnavailableMembers


@dataclass(slots=True)
class SpeculationStats:
    """How many drafts were verified and accepted. plan: what a strategy that picks among others uses now."""

    drafted: int = 0
    accepted: int = 0
    plan: str | None = None


class Choice(NamedTuple):
    """What a strategy chose for one position: a shared symbol, the member that wrote it, its log-probability.

    top_logprobs: the most likely symbols of the distribution it is from, as many as were requested.
    """

    symbol: int
    member: int
    logprob: float
    top_logprobs: TopLogprobs = ()


Flow = RequestFlow[list[Choice]]


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One position of one sequence, as a strategy sees it.

    Args:
        weights: float64 (members,), summing to 1.
        noise: That of the position.
        views: Each member's view of the sequence.
        following: Appends a symbol for the time of this decode step, so that views see the longer text, and returns the
            step at the next position; None where the text ends there. It requests what the router observes there. The
            symbols are removed when the strategy is done.
        max_symbols: Symbols that it may choose, of this position and the next ones.
        unavailable: Members that stopped answering; their weight is 0.
        observed: The member that the router observes, with its logits here; None for a router of the text alone.
    """

    weights: Floats
    noise: Noise
    views: Sequence[MemberView]
    following: Callable[[int], RequestFlow[DecodeStep | None]]
    max_symbols: int = 1
    unavailable: Container[int] = ()
    observed: ObservedRow | None = None

    def observed_row(self, member: int) -> LogitsRow | None:
        """Return a member's logits where the router has observed them at this position; they need no request.

        None where they may lack some that are needed: what the grammar allows, or, of an engine that reports its
        likeliest tokens, more of these, or their probabilities in the whole vocabulary.
        """
        if self.observed is None or self.observed.member != member or self.views[member].is_restricted:
            return None
        limit, needed = self.views[member].member.engine.top_k_limit, self.views[member].top_k_filter
        if limit is not None and (needed is None or needed.normalized or needed.k > limit):
            return None
        return self.observed.row

    def top_logprobs(self, distribution: Candidates) -> TopLogprobs:
        """Return the most likely symbols of a distribution, as many as were requested."""
        return top_logprobs(distribution, self.views[0].member.top_logprobs)


Strategy = Callable[[DecodeStep], Flow]


class SequenceState:
    """One sequence being generated: its text, each member's session and view of it, and the route that weighs them.

    unavailable: where failed members are excluded, which of them; None where a failure ends the sequence.
    """

    def __init__(
        self,
        members: Sequence[Member],
        unit: Unit,
        prompts: Sequence[Ids],
        sessions: Sequence[Session],
        route: CheckedRoute,
        unavailable: UnavailableMembers | None = None,
    ) -> None:
        self.sessions = sessions
        self.route = route
        self.unavailable = unavailable
        self.state = unit.initial_state(prompts)
        self._unit = unit
        self.use_members(members)

    @property
    def full(self) -> bool:
        """Whether some member's context has no room for another token: the text ends here, whatever the coin.

        Tokens are counted only when the bytes, never fewer, might not fit.
        """
        limits = enumerate(member.engine.context_length for member in self.members)
        return any(
            self.state.prompt_length(i) + len(self.state) >= limit and len(self.state.ids(i)) > limit
            for i, limit in limits
        )

    def use_members(self, members: Sequence[Member]) -> None:
        """Begin, or go on with other options of the members: with the same engines, and other transforms."""
        self.members = members
        self.views = [MemberView(member, i, self.state) for i, member in enumerate(members)]

    def decode_step(self, strategy: Strategy, noise: Noise, max_symbols: int = 1) -> Flow:
        """Let a strategy choose the next 1 to `max_symbols` symbols; the sequence itself is not changed.

        weights ← route(text);  symbols ← strategy(weights, noise), which requests what it needs of members. Where the
        router observes a member, that member's logits come first, and the weights depend on them.
        """
        pushed: list[int] = []

        def step(at_position: Noise) -> RequestFlow[DecodeStep]:
            observed, seen = yield from self._observe()
            weights = self.route(self.state, seen)
            if self.unavailable is not None:
                weights = self.unavailable.weights(weights)
            return DecodeStep(
                self._without_stuck(weights),
                at_position,
                self.views,
                partial(following, at_position),
                max_symbols - len(pushed),
                () if self.unavailable is None else self.unavailable,
                observed,
            )

        def following(at_position: Noise, symbol: int) -> RequestFlow[DecodeStep | None]:
            if symbol == self._unit.end or len(pushed) + 1 >= max_symbols:
                return None
            pushed.append(symbol)
            self.state.append(symbol)
            return None if self.full else (yield from step(at_position.at(at_position.position + 1)))

        try:
            return (yield from strategy((yield from step(noise))))
        finally:
            self.state.rollback(len(pushed))

    def _observe(self) -> RequestFlow[tuple[ObservedRow | None, Observation | None]]:
        """Return the logits of the member that the router observes, and what the route gets of them."""
        observes = self.route.observes
        if observes is None:
            return None, None
        member = observes.member
        if self.unavailable is not None and member in self.unavailable:
            raise EngineError(
                f"the router observes {self.members[member].name}, which has stopped answering",
                "without it no weights are defined; check its server",
            )
        [response] = yield [LogitsRequest(member, self.views[member].ids(), hidden=observes.hidden)]
        rows, hidden = response if isinstance(response, LogitsAndHidden) else (response, None)
        from mixlm.routing.observation import observation

        seen = observation(rows[0], observes, None if hidden is None else hidden[0])
        return ObservedRow(member, rows[0]), seen

    def _without_stuck(self, weights: Floats) -> Floats:
        """Return weights (members,) without those of members that the grammar leaves no token, renormalised.

        That depends on the text and the vocabulary, not on probabilities. Raises UnsupportedError where all are stuck.
        """
        stuck = [i for i, view in enumerate(self.views) if weights[i] > 0 and view.stuck]
        if not stuck or self._unit.traits.counts_bytes:
            return weights
        remaining = without(weights, stuck)
        if remaining is None:
            raise UnsupportedError("no member has a token that continues the text as json_schema or tools allow")
        return remaining


def without(weights: Floats, members: Sequence[int]) -> Floats | None:
    """Return weights, (members,), without those of some members, renormalised; None where none is left."""
    remaining = weights.copy()
    remaining[list(members)] = 0.0
    total = remaining.sum()
    return remaining / total if total > 0 else None
