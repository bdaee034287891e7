"""`mixture` in the unit `word`: draw a member at the end of each word, and let it write the next.

At a place in the text, the member whose word it is draws from its own law. A symbol that goes on with the word is
written. A symbol that begins a word says that the word has ended: a coin is drawn for the next. Where it falls on the
same member, the symbol stands, for given that it begins a word it follows that member's law of such symbols. Where it
falls on another, that one draws from its own law given that a word begins; with noise of its own, since to have seen
the first member's draw says something about the first noise.

The symbols that a member's truncation leaves may all go on with the word. Then those that do not begin one are masked
before truncation. Where a model gives none of them any probability, the symbol of the first member stands.

Done in this order, a word costs a forward more than its symbols where it changes the member: the one in which the first
member finds that its word has ended. So it is mostly left for later. The coin is known before anybody runs; where it
falls on another member and the word has probably ended, that one goes on at once. The first member draws for that place
in the next forward in which it is asked anyway, which covers all it has missed. With the noise a function of the place,
it draws what it would have drawn before. If that begins a word, nothing was lost; if not, what was written behind the
place is dropped, and the text goes on with what was drawn. Either way it is the same text.

Whether a word has ended is guessed twice. Before the next member runs, from how often words ended behind the same
symbol in this reply; then from what it gives itself to beginnings of words, for it reads the same text. To be wrong
costs what is written until the first member is asked again; to be too careful costs a forward.

Symbols are chosen as soon as no end in front of them is in doubt. What was drawn behind them is kept with the state,
and found there when it is written again; so a doubt costs no forward by being carried on.

A member that stopped answering, or that has no token with which a text held to a schema can go on, has no word to end:
the next one drawn writes as it would without it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from mixlm.core.rng import Noise
from mixlm.decoding.drafts import prefix_groups
from mixlm.engines.base import LogitsRequest, Request, Response, SampleResponse
from mixlm.generation.sequence import Choice, DecodeStep, Flow, MemberView, Strategy
from mixlm.types import Candidates, Ids, LogitsRow, TopKFilter
from mixlm.units.word import WHITESPACE, WordState

LONGEST = 16  # symbols written behind an end that is in doubt
_SYMBOLS = 1.4  # of a word


def word_mixture(longest: int = LONGEST) -> Strategy:
    """Return the strategy that draws from the member whose word it is, and from the next one where the word has ended.

    longest: how many symbols are written at most before an end in front of them is looked at; 1 looks at each at once.
    """
    ends = _Ends()

    def strategy(step: DecodeStep) -> Flow:
        return (yield from _Block(cast(WordState, step.views[0].state), ends, longest).write(step))

    return strategy


class _Ends:
    """How often words ended behind each symbol.

    Every reply learns anew, so that what it runs, and with it the last digits, do not depend on other replies.
    """

    def __init__(self) -> None:
        self._behind: dict[int, tuple[int, int]] = {}
        self._all = (8.0, 10.0)  # behind any symbol; to begin with, most symbols are the last of their word

    def behind(self, symbol: int) -> float:
        """Return how likely a word has ended behind a symbol."""
        ended, seen = self._behind.get(symbol, (0, 0))
        return (ended + 2 * self._all[0] / self._all[1]) / (seen + 2)

    def learn(self, symbol: int, ended: bool) -> None:
        """Take down whether a word had ended behind a symbol."""
        before, seen = self._behind.get(symbol, (0, 0))
        self._behind[symbol] = before + ended, seen + 1
        self._all = self._all[0] + ended, self._all[1] + 1


class _Check(NamedTuple):
    """A word's end that is in doubt: whose word, what it read there and how it draws, and what begins a word there."""

    member: int
    ids: Ids
    choose: Callable[[LogitsRow], SampleResponse]
    noise: Noise
    before: bytes
    begins: Callable[[Ids], npt.NDArray[np.bool_]]
    last: int
    cut: TopKFilter | None


@dataclass(slots=True, eq=False)
class _Place:
    """A symbol that is written, and the doubt whether a word had ended in front of it."""

    choice: Choice
    check: _Check | None = None


class _NotEndedError(Exception):
    """A word had not ended that was thought to. What was written behind has been dropped."""


class _Block:
    """Symbols behind a text of which nothing is in doubt."""

    def __init__(self, state: WordState, ends: _Ends, longest: int) -> None:
        self._state = state
        self._ends = ends
        self._longest = longest
        self._places: list[_Place] = []

    def write(self, step: DecodeStep) -> Flow:
        """Write on until something is certain; return that."""
        self._state.evict_stale_samples()
        here: DecodeStep | None = step
        try:
            while here is not None and len(self._places) < self._longest:
                self._places.append((yield from self._next(here)))
                if certain := self._certain():
                    return certain
                here = here.push(self._places[-1].choice.symbol)
        except _NotEndedError:
            pass
        while not (certain := self._certain()):
            oldest = self._places[0].check
            assert oldest is not None
            with suppress(_NotEndedError):
                yield from self._asked(oldest.member, cut=oldest.cut)
        return certain

    def _certain(self) -> list[Choice]:
        """Return the symbols in front of the first doubt."""
        doubtful = (at for at, one in enumerate(self._places) if one.check is not None)
        return [one.choice for one in self._places[: next(doubtful, len(self._places))]]

    def _next(self, here: DecodeStep) -> Generator[list[Request], list[Response], _Place]:
        """Write one symbol."""
        state, views, turn = self._state, here.views, here.noise.next_round()
        coin = here.noise.coin(here.weights)
        z = coin if state.owner is None or self._left_out(here, state.owner) else state.owner
        own = self._known(z, here.noise)
        if own is None and z != coin:
            anew = self._known(coin, turn) or (yield from self._ahead(here, coin, z, turn))
            if anew is not None:
                return _Place(Choice(anew.symbol, coin, anew.logprob, anew.top_logprobs), self._check(here, z))
        if own is None:
            logits = yield from self._asked(z, views[z].ids(), views[z].top_k_filter)
            own = self._note(z, here.noise, views[z].sampler(here.noise)(logits))
            if state.last_symbol is not None:
                self._ends.learn(state.last_symbol, self._begins(own))
        if z == coin or not self._begins(own):
            return _Place(Choice(own.symbol, z, own.logprob, own.top_logprobs))
        anew = self._known(coin, turn)
        if anew is None:
            logits = yield from self._asked(coin, views[coin].ids())
            anew, _ = _beginning(views[coin], turn, logits)
        if anew is None:
            return _Place(Choice(own.symbol, z, own.logprob, own.top_logprobs))
        return _Place(Choice(anew.symbol, coin, anew.logprob, anew.top_logprobs))

    def _left_out(self, here: DecodeStep, member: int) -> bool:
        return member in here.unavailable or here.views[member].stuck

    def _ahead(
        self, here: DecodeStep, coin: int, z: int, turn: Noise
    ) -> Generator[list[Request], list[Response], SampleResponse | None]:
        """Let the next member begin a word, unless the last one should first be asked whether its word has ended."""
        if not self._may_have_ended(here.views[z]):
            return None
        logits = yield from self._asked(coin, here.views[coin].ids())
        anew, mass = _beginning(here.views[coin], turn, logits)
        if anew is None:
            return None
        self._note(coin, turn, anew)
        at_risk = min(self._longest - len(self._places), _SYMBOLS / max(float(here.weights[z]), 1e-9))
        return anew if (1 - mass) * at_risk <= mass else None

    def _may_have_ended(self, view: MemberView) -> bool:
        """Whether to let the next member go first.

        An engine that tells its likeliest tokens only is asked for each place by itself: there is nothing to save.
        """
        last = self._state.last_symbol
        assert last is not None
        return (
            self._longest > 1
            and view.member.engine.top_k_limit is None
            and self._state.tail(1) not in WHITESPACE
            and self._ends.behind(last) > 0.5
        )

    def _check(self, here: DecodeStep, z: int) -> _Check:
        view, state = here.views[z], self._state
        assert state.last_symbol is not None
        ids, choose = view.ids().copy(), view.sampler(here.noise)  # a copy: the state goes on changing
        return _Check(
            z, ids, choose, here.noise, state.text(), state.word_start_marker(), state.last_symbol, view.top_k_filter
        )

    def _asked(
        self, member: int, ids: Ids | None = None, cut: TopKFilter | None = None
    ) -> Generator[list[Request], list[Response], LogitsRow]:
        """Let a member say where its words ended, and return its logits behind `ids`, in the same forward.

        cut: what of the logits is needed. Raises _NotEndedError at the first word that had not ended.
        """
        doubts = [one for one in self._places if one.check is not None and one.check.member == member]
        texts = [one.check.ids for one in doubts if one.check is not None] + ([] if ids is None else [ids])
        row: LogitsRow = np.zeros(0, dtype=np.float32)
        for group in prefix_groups(texts):
            first, longest = len(texts[group[0]]), texts[group[-1]]
            [logits] = yield [LogitsRequest(member, longest, len(longest) - first + 1, cut)]
            for number in group:
                row = logits[len(texts[number]) - first]
                if number < len(doubts):
                    self._settle(doubts[number], row)
        return row

    def _settle(self, place: _Place, logits: LogitsRow) -> None:
        """Draw what the last member says of the end of its word. Where it goes on with it, the text ends there."""
        check = place.check
        assert check is not None
        own = check.choose(logits)
        self._state.cache_sample(check.member, check.noise, check.before, own)
        ended = bool(check.begins(np.array([own.symbol]))[0])
        self._ends.learn(check.last, ended)
        place.check = None
        if not ended:
            place.choice = Choice(own.symbol, check.member, own.logprob, own.top_logprobs)
            del self._places[self._places.index(place) + 1 :]
            raise _NotEndedError

    def _begins(self, drawn: SampleResponse) -> bool:
        return bool(self._state.word_start_marker()(np.array([drawn.symbol]))[0])

    def _known(self, member: int, noise: Noise) -> SampleResponse | None:
        found = self._state.cached_sample(member, noise)
        return None if found is None else SampleResponse(*found)

    def _note(self, member: int, noise: Noise, drawn: SampleResponse) -> SampleResponse:
        self._state.cache_sample(member, noise, self._state.text(), drawn)
        return drawn


def _beginning(view: MemberView, noise: Noise, logits: LogitsRow) -> tuple[SampleResponse | None, float]:
    """Draw a symbol that begins a word from a member's logits (vocab,), if there is one.

    Also returns what the member gives to such symbols where it is not made to begin a word.
    """
    law, begins = view.bind_distribution(), cast(WordState, view.state).word_start_marker()
    symbols, logprobs = law(logits)
    kept = begins(symbols)
    mass = float(np.exp(logprobs[kept]).sum())
    if not kept.any():
        allowed = (view.member.symbols >= 0) & begins(view.member.symbols)
        masked = np.where(allowed, logits, -np.inf)
        if not np.isfinite(masked).any():
            return None, 0.0
        symbols, logprobs = law(masked)
        kept = np.isfinite(logprobs)
        if not kept.any():
            return None, 0.0
    symbols, logprobs = symbols[kept], logprobs[kept]
    top = logprobs.max()
    logprobs = logprobs - top - np.log(np.exp(logprobs - top).sum())
    return view.sample(Candidates(symbols, logprobs), noise), mass
