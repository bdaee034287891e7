"""`mixture` in the unit `byte`: draw a member for each byte, and the byte from that member's exact law.

A member's law of the next byte need not be known to be drawn from. A cover of the text, drawn with its probability
given the text, has a last token that reaches beyond it, and its next byte is the one; or it ends with the text, and a
token drawn behind it has the byte. The token's further bytes, and further tokens, stand as long as the coins fall on
the same member. Then they are forgotten, and whoever is drawn next draws a cover anew: nothing but the text is kept.
They may also be given up at any moment that says nothing of what comes next, but not, for one, where a token ends: what
would be drawn anew there is less likely to end. They are after whitespace, so that a text can be read word by word.

Covers are drawn without knowing all of them. Forwards are made at boundaries behind the last seam, where most
probability waits first, and each tells more of the groups that covers fall into: by the place where the last token
begins, and by whether it ends with the text. What waits at boundaries not looked at is a bound of what they can add. As
soon as the number that picks a group picks the same one whatever the rest adds, there is nothing left to ask. The token
is then drawn from its group, whose law is known. Mostly that takes no forward but one for each token.

A member's truncation may leave no cover of a text that others wrote. Then it writes the text over from the last seam:
at each boundary it draws among the tokens that agree with the text, the others masked before truncation, until one
reaches its end. A text that its tokens cannot spell ends on a boundary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator
from typing import NamedTuple, cast

import numpy as np

from mixlm.core.rng import Noise
from mixlm.core.sampling import top_logprobs
from mixlm.engines.base import LogitsRequest, Request, Response
from mixlm.errors import UnsupportedError
from mixlm.generation.sequence import Choice, DecodeStep, Flow, MemberView, Strategy
from mixlm.types import Candidates, TopLogprobs
from mixlm.units.byte import BoundaryOutput, ByteState, RankedDistribution
from mixlm.units.word import WHITESPACE

LONGEST = 32  # bytes of one member that are chosen at once
_STOPS = frozenset(WHITESPACE)


def byte_mixture(member: int | None = None) -> Strategy:
    """Return the strategy that draws a member for each byte by its weight, or takes the given one always."""

    def coin(step: DecodeStep) -> int:
        return step.noise.coin(step.weights) if member is None else member

    def strategy(step: DecodeStep) -> Flow:
        z = coin(step)
        reading = _Reading(z, step.views[z])
        cover = yield from reading.cover(step.noise)
        choices: list[Choice] = []
        while True:
            for choice in reading.revealed(cover, step.noise):
                choices.append(choice)
                if choice.symbol in _STOPS or len(choices) == LONGEST or choice.symbol == reading.end:
                    return choices
                here = step.push(choice.symbol)
                if here is None or coin(here) != z:
                    return choices
                step = here
            reading = _Reading(z, step.views[z])
            cover = yield from reading.boundary()

    return strategy


class _Cover(NamedTuple):
    """A group of covers: where their last token begins, and the span of the law there that it is drawn from."""

    place: int
    law: RankedDistribution
    span: slice


class _Group(NamedTuple):
    """A group of covers and its weight; it ends with the text where `cover` is None."""

    weight: float
    cover: _Cover | None


class _Reading:
    """One member's reading of the text, as it stands when the member is drawn."""

    def __init__(self, member: int, view: MemberView) -> None:
        self._member = member
        self._view = view
        self._state = cast(ByteState, view.state)
        self._lexicon = self._state.prefix_indexes[member]
        self._length = len(self._state)
        self.end = self._lexicon.end

    def cover(self, noise: Noise) -> Generator[list[Request], list[Response], _Cover]:
        """Draw a group of covers; one that ends with the text becomes all tokens behind it."""
        drawn: _Cover | None = None
        if self._length:
            groups, picked = yield from self._likely(noise.next_round().uniform())
            if picked is None:
                drawn = yield from self._written_over(noise.next_round())
            else:
                drawn = groups[picked].cover
        return (yield from self.boundary()) if drawn is None else drawn

    def boundary(self) -> Generator[list[Request], list[Response], _Cover]:
        """Return all tokens behind a text that a token ends with."""
        law = (yield from self._known(self._length)).distribution
        return _Cover(self._length, law, slice(0, law.ranks.size))

    def revealed(self, cover: _Cover, noise: Noise) -> list[Choice]:
        """Draw a token, and return the bytes it adds, each with its log-probability behind the cover's place.

        One choice of end-of-text, if that is drawn.
        """
        law, span = cover.law, cover.span
        if span.start == span.stop:
            raise UnsupportedError(f"{self._view.member.name} cannot go on with what json_schema allows here")
        at = span.start + noise.sample(law.symbols[span], law.logprobs[span])
        if law.symbols[at] == self.end:
            return [Choice(self.end, self._member, float(law.logprobs[at]))]
        data = self._lexicon.token_bytes(int(law.ranks[at]))
        out = []
        mass = law.mass(span)
        for length in range(self._length - cover.place, len(data)):
            told = self._likeliest_bytes(law, span, length)
            span = law.span(*self._lexicon.with_prefix(data[: length + 1]))
            narrower = law.mass(span)
            out.append(Choice(data[length], self._member, min(float(np.log(narrower / mass)), 0.0), told))
            mass = narrower
        return out

    def _likeliest_bytes(self, law: RankedDistribution, span: slice, length: int) -> TopLogprobs:
        """Return the likeliest bytes behind the first `length` of a token, given that it stands in a span of a law."""
        count = self._view.member.top_logprobs
        if count == 0:
            return ()
        mass: defaultdict[int, float] = defaultdict(float)
        for at in range(span.start, span.stop):
            ended = law.symbols[at] == self.end
            data = b"" if ended else self._lexicon.token_bytes(int(law.ranks[at]))
            if ended or len(data) > length:
                mass[self.end if ended else data[length]] += float(np.exp(law.logprobs[at]))
        symbols, masses = np.array(list(mass)), np.array(list(mass.values()))
        return top_logprobs(Candidates(symbols, np.log(masses / law.mass(span))), count)

    def _known(self, place: int) -> Generator[list[Request], list[Response], BoundaryOutput]:
        """Return what the member says behind a place, from a forward if it has not been asked yet."""
        known = self._state.cached_output(self._member, place)
        if known is None:
            ids = self._state.ids_at(self._member, place)
            law = self._view.bind_distribution(ids, self._state.substring(0, place))
            [logits] = yield [LogitsRequest(self._member, ids)]
            known = BoundaryOutput(
                logits[0].copy(), law, RankedDistribution.from_candidates(self._lexicon, law(logits[0]))
            )
            self._state.cache_output(self._member, place, known)
        return known

    def _likely(self, u: float) -> Generator[list[Request], list[Response], tuple[list[_Group], int | None]]:
        """Return groups of covers and which of them the number u picks; None where no cover has any probability."""
        groups: list[_Group] = []
        seam = self._state.forced_boundary(self._member)
        waiting = defaultdict(float, {seam: 1.0})
        looks = 0
        while waiting:
            picked = _picked(groups, u, sum(waiting.values()))
            if picked is not None:
                return groups, picked
            # From left to right each place is looked at once; by probability, a place may get more of it later.
            left = looks > self._length - seam
            place = min(waiting) if left else max(waiting, key=lambda one: (waiting[one], -one))
            looks += 1
            mass = waiting.pop(place)
            law = (yield from self._known(place)).distribution
            rest = self._state.substring(place)
            for length, rank in self._lexicon.prefixes_of(rest):
                probability = mass * law.mass(law.span(rank, rank + 1))
                if probability > 0 and length < len(rest):
                    waiting[place + length] += probability
                elif probability > 0:
                    groups.append(_Group(probability, None))
            beyond = law.span(*self._lexicon.extensions_of(rest))
            if (probability := mass * law.mass(beyond)) > 0:
                groups.append(_Group(probability, _Cover(place, law, beyond)))
            if not groups:
                # Only their proportions count, and a long text that nobody expects has very little probability.
                total = sum(waiting.values())
                for one in waiting:
                    waiting[one] /= total
        return groups, _picked(groups, u, 0.0)

    def _written_over(self, noise: Noise) -> Generator[list[Request], list[Response], _Cover | None]:
        """Write the text over from its last seam, a token at a time; return what then reaches beyond it."""
        place = self._state.forced_boundary(self._member)
        while place < self._length:
            known = yield from self._known(place)
            rest = self._state.substring(place)
            shorter = {rank: length for length, rank in self._lexicon.prefixes_of(rest)}
            beyond = self._lexicon.extensions_of(rest)
            agree = self._lexicon.symbols([*shorter, *range(*beyond)])
            masked = np.where(np.isin(self._view.member.symbols, agree), known.logits, -np.inf)
            if not np.isfinite(masked).any():
                return None
            law = RankedDistribution.from_candidates(self._lexicon, known.transform(masked))
            if not law.ranks.size:
                return None
            rank = int(law.ranks[noise.sample(law.symbols, law.logprobs)])
            if rank not in shorter:
                return _Cover(place, law, law.span(*beyond))
            place += shorter[rank]
            noise = noise.next_round()
        return None


def _picked(groups: list[_Group], u: float, more: float) -> int | None:
    """Return the group that u in (0, 1] picks, whatever further groups of at most the weight `more` there are."""
    edges = np.cumsum([one.weight for one in groups])
    if not groups:
        return None
    least, most = np.searchsorted(edges, [u * edges[-1], u * (edges[-1] + more)])
    return int(least) if least == most else None
