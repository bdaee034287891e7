"""`mixture` in the unit `word`: toss a coin at the end of each word; the sampled member writes the next.

At a position, the owner of the current word samples from its own distribution. A symbol that continues the word is
written. A symbol that begins a word says that the word has ended: a coin is tossed for the next. Where it falls on the
same member, the symbol is kept, for given that it begins a word it follows that member's distribution of such symbols.
Where it falls on another, that one samples from its own distribution given that a word begins; with noise of its own,
since the first member's sample says something about the first noise.

The symbols that a member's truncation leaves may all continue the word. Then those that do not begin one are masked
before truncation. Where a model gives none of them any probability, the symbol of the first member is kept.

In this order, a word costs one forward more than its symbols where the member changes: the one in which the first
member finds that its word has ended. So that is mostly postponed. The coin is known before anybody runs; where it falls
on another member and the word has probably ended, that one continues at once. The first member samples at that position
in the next forward that it is requested anyway, which covers all it has missed. With the noise a function of the
position, it samples what it would have sampled before. If that begins a word, nothing was lost; if not, what was
written after the position is dropped, and the text continues with the sample. Either way it is the same text.

Whether a word has ended is predicted twice. Before the next member runs, from how often words ended after the same
symbol in this text; then from the probability that it gives itself to beginnings of words, for it has the same text. A
wrong prediction costs what is written until the first member runs again; too much caution costs a forward.

Symbols are chosen as soon as no end in front of them is unverified. What was sampled after them is cached with the
state, and found there when it is written again; so an unverified end costs no forward by being carried on.

A member that stopped answering, or that a grammar leaves no token, has no word to end: the next one writes as it would
without it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from mixlm.core.options import GenerationOptions
from mixlm.core.rng import Noise
from mixlm.core.sampling import log_softmax
from mixlm.decoding import StrategyContext
from mixlm.decoding.blocks import join_requests
from mixlm.engines.requests import LogitsRequest, SampleResponse
from mixlm.generation.dispatch import RequestFlow
from mixlm.generation.member import MemberView
from mixlm.generation.sequence import Choice, DecodeStep, Flow, Strategy
from mixlm.types import Candidates, Ids, LogitsRow, TopKFilter
from mixlm.units.word import WHITESPACE, WordState

MAX_UNVERIFIED = 16  # symbols written after an unverified end
_SYMBOLS_PER_WORD = 1.4


def build(options: GenerationOptions, context: StrategyContext) -> Strategy:
    """Return the strategy; it has no options."""
    return word_mixture()


def word_mixture(max_unverified: int = MAX_UNVERIFIED) -> Strategy:
    """Return the strategy.

    Args:
        max_unverified: Symbols written at most before the end in front of them is verified; 1 verifies each at once.
    """
    statistics = _EndStatistics()

    def strategy(step: DecodeStep) -> Flow:
        block = _Block(cast(WordState, step.views[0].state), statistics, max_unverified)
        return (yield from block.write(step))

    return strategy


class _EndStatistics:
    """How often words ended after each symbol.

    Every sequence begins anew, so that what it runs, and with it the last digits, do not depend on other sequences.
    """

    def __init__(self) -> None:
        self._by_symbol: dict[int, tuple[int, int]] = {}
        self._total = (8.0, 10.0)  # after any symbol; to begin with, most symbols are the last of their word

    def probability(self, symbol: int) -> float:
        """Return how likely a word has ended after a symbol."""
        ended, seen = self._by_symbol.get(symbol, (0, 0))
        return (ended + 2 * self._total[0] / self._total[1]) / (seen + 2)

    def record(self, symbol: int, ended: bool) -> None:
        """Record whether a word had ended after a symbol."""
        before, seen = self._by_symbol.get(symbol, (0, 0))
        self._by_symbol[symbol] = before + ended, seen + 1
        self._total = self._total[0] + ended, self._total[1] + 1


class _UnverifiedEnd(NamedTuple):
    """An end of a word that its owner has not sampled yet: the owner's request, and what it takes to sample there."""

    request: LogitsRequest
    sample: Callable[[LogitsRow], SampleResponse]
    noise: Noise
    before: bytes
    begins_word: Callable[[Ids], npt.NDArray[np.bool_]]
    last_symbol: int


@dataclass(slots=True, eq=False)
class _WrittenSymbol:
    """A symbol that is written, and the end of a word in front of it, if that is unverified."""

    choice: Choice
    end: _UnverifiedEnd | None = None

    @classmethod
    def of(cls, member: int, sample: SampleResponse, end: _UnverifiedEnd | None = None) -> _WrittenSymbol:
        return cls(Choice(sample.symbol, member, sample.logprob, sample.top_logprobs), end)


class _WordContinuesError(Exception):
    """A word continues that was predicted to have ended. What was written after it has been dropped."""


class _Block:
    """Symbols written after a text of which nothing is unverified."""

    def __init__(self, state: WordState, statistics: _EndStatistics, max_unverified: int) -> None:
        self._state = state
        self._statistics = statistics
        self._max_unverified = max_unverified
        self._written: list[_WrittenSymbol] = []

    def write(self, step: DecodeStep) -> Flow:
        """Write until some symbols are verified; return those."""
        self._state.evict_stale_samples()
        current: DecodeStep | None = step
        try:
            while current is not None and len(self._written) < self._max_unverified:
                self._written.append((yield from self._next_symbol(current)))
                if verified := self._verified():
                    return verified
                current = yield from current.following(self._written[-1].choice.symbol)
        except _WordContinuesError:
            pass
        while not (verified := self._verified()):
            oldest = self._written[0].end
            assert oldest is not None
            with suppress(_WordContinuesError):
                yield from self._run(oldest.request.member, top_k_filter=oldest.request.top_k_filter)
        return verified

    def _verified(self) -> list[Choice]:
        """Return the symbols in front of the first unverified end."""
        unverified = (index for index, symbol in enumerate(self._written) if symbol.end is not None)
        return [symbol.choice for symbol in self._written[: next(unverified, len(self._written))]]

    def _next_symbol(self, step: DecodeStep) -> RequestFlow[_WrittenSymbol]:
        """Write one symbol."""
        state, views, second_noise = self._state, step.views, step.noise.next_round()
        coin = step.noise.coin(step.weights)
        owner = coin if state.owner is None or _cannot_write(step, state.owner) else state.owner
        sample = self._cached_sample(owner, step.noise)
        if sample is None and owner != coin:
            first = self._cached_sample(coin, second_noise) or (
                yield from self._begin_unverified(step, coin, owner, second_noise)
            )
            if first is not None:
                return _WrittenSymbol.of(coin, first, self._unverified_end(step, owner))
        if sample is None:
            logits = yield from self._run(owner, views[owner], views[owner].top_k_filter)
            sample = self._cache(owner, step.noise, views[owner].sampler(step.noise)(logits))
            if state.last_symbol is not None:
                self._statistics.record(state.last_symbol, self._begins_word(sample))
        if owner == coin or not self._begins_word(sample):
            return _WrittenSymbol.of(owner, sample)
        first = self._cached_sample(coin, second_noise)
        if first is None:
            logits = yield from self._run(coin, views[coin])
            first, _ = yield from _sample_first(views[coin], second_noise, logits)
        return _WrittenSymbol.of(owner, sample) if first is None else _WrittenSymbol.of(coin, first)

    def _begin_unverified(
        self, step: DecodeStep, coin: int, owner: int, noise: Noise
    ) -> RequestFlow[SampleResponse | None]:
        """Let the next member begin a word, unless the owner should be asked first whether its word has ended.

        An engine that reports its top tokens only runs each position by itself: there is no forward to save.
        """
        assert self._state.last_symbol is not None
        saves_forwards = self._max_unverified > 1 and step.views[owner].member.engine.top_k_limit is None
        if not saves_forwards or self._state.tail(1) in WHITESPACE:
            return None
        if self._statistics.probability(self._state.last_symbol) <= 0.5:
            return None
        logits = yield from self._run(coin, step.views[coin])
        first, mass = yield from _sample_first(step.views[coin], noise, logits)
        if first is None:
            return None
        self._cache(coin, noise, first)
        symbols_until_owner = _SYMBOLS_PER_WORD / max(float(step.weights[owner]), 1e-9)
        at_risk = min(self._max_unverified - len(self._written), symbols_until_owner)
        return first if (1 - mass) * at_risk <= mass else None

    def _unverified_end(self, step: DecodeStep, owner: int) -> _UnverifiedEnd:
        view, state = step.views[owner], self._state
        assert state.last_symbol is not None
        request = view.logits_request()
        request = replace(request, ids=request.ids.copy())  # the state goes on changing
        sampler, begins_word = view.sampler(step.noise), state.word_start_marker()
        return _UnverifiedEnd(request, sampler, step.noise, state.substring(), begins_word, state.last_symbol)

    def _run(
        self, member: int, view: MemberView | None = None, top_k_filter: TopKFilter | None = None
    ) -> RequestFlow[LogitsRow]:
        """Verify a member's ends, and return its logits for the text as it is now, in the same forward.

        Args:
            view: The member's; None to verify only.
            top_k_filter: The part of the logits that is needed.

        Raises:
            _WordContinuesError: A word had not ended; the first such.
        """
        ends = [(symbol, symbol.end.request) for symbol in self._written if symbol.end is not None]
        unverified = [symbol for symbol, request in ends if request.member == member]
        requests = [request for _, request in ends if request.member == member]
        if view is not None:
            requests.append(view.logits_request())
        logits: LogitsRow = np.zeros(0, dtype=np.float32)
        for request, rows in join_requests(dict(enumerate(requests))):
            [response] = yield [replace(request, top_k_filter=top_k_filter)]
            for index, row in rows.items():
                logits = response[row]
                if index < len(unverified):
                    self._verify(unverified[index], logits)
        return logits

    def _verify(self, symbol: _WrittenSymbol, logits: LogitsRow) -> None:
        """Sample the owner at an end of its word. Where it continues the word, the text is cut there."""
        end = symbol.end
        assert end is not None
        sample, owner = end.sample(logits), end.request.member
        self._state.cache_sample(owner, end.noise, end.before, sample)
        ended = bool(end.begins_word(np.array([sample.symbol]))[0])
        self._statistics.record(end.last_symbol, ended)
        symbol.end = None
        if not ended:
            symbol.choice = _WrittenSymbol.of(owner, sample).choice
            del self._written[self._written.index(symbol) + 1 :]
            raise _WordContinuesError

    def _begins_word(self, sample: SampleResponse) -> bool:
        return bool(self._state.word_start_marker()(np.array([sample.symbol]))[0])

    def _cached_sample(self, member: int, noise: Noise) -> SampleResponse | None:
        return cast("SampleResponse | None", self._state.cached_sample(member, noise))

    def _cache(self, member: int, noise: Noise, sample: SampleResponse) -> SampleResponse:
        self._state.cache_sample(member, noise, self._state.substring(), sample)
        return sample


def _cannot_write(step: DecodeStep, member: int) -> bool:
    return member in step.unavailable or step.views[member].stuck


def _sample_first(
    view: MemberView, noise: Noise, logits: LogitsRow
) -> RequestFlow[tuple[SampleResponse | None, float]]:
    """Sample a symbol that begins a word from a member's logits (vocab,), if there is one.

    Also returns the probability of such symbols where the member is not made to begin a word. Where its truncation
    leaves none, an engine that reports its most likely tokens is asked for those among the symbols that do.
    """
    begins_word = cast(WordState, view.state).word_start_marker()
    symbols, logprobs = view.distribution(logits)
    kept = begins_word(symbols)
    mass = float(np.exp(logprobs[kept]).sum())
    if not kept.any():
        allowed = (view.member.symbols >= 0) & begins_word(view.member.symbols)
        symbols, logprobs = yield from view.distribution_among(allowed, logits)
        kept = np.isfinite(logprobs)
        if not kept.any():
            return None, 0.0
    return view.sample(Candidates(symbols[kept], log_softmax(logprobs[kept])), noise), mass
