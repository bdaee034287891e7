"""`mixture` in the unit `byte`: one coin a byte, and the byte from that member's exact distribution.

A member's distribution over the next byte need not be known to be sampled. A cover of the text is a sequence of tokens
that spell it, the last of which may reach beyond it. A cover sampled with its probability given the text either reaches
beyond it, and its next byte is the sample; or it ends with the text, and a token sampled after it has the byte. The
token's further bytes, and further tokens, are accepted as long as the coins fall on the same member. Then they are
dropped, and the next member samples a cover anew: nothing but the text is kept. They may also be dropped at any moment
that says nothing of what comes next, but not, for example, where a token ends: what would be sampled anew there is less
likely to end. They are dropped after whitespace, so that a text can be read word by word.

Covers are sampled without knowing all of them. Forwards run at boundaries after the last forced boundary, where most
probability is pending first, and each refines the groups that covers fall into: by where the last token begins, and by
whether it ends with the text. What is pending at boundaries that have not run bounds what they can add. As soon as the
uniform number that picks a group picks the same one whatever they add, no more forwards are needed. The token is then
sampled from its group, whose distribution is known. Mostly that takes one forward a token.

A member's truncation may leave no cover of a text that others wrote. Then it respells the text from the last forced
boundary: at each boundary it samples among the tokens that agree with the text, the others masked before truncation,
until one reaches its end. A text that its tokens cannot spell ends on a boundary. Of an engine that reports its most
likely tokens, those that agree are requested again.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple, cast

import numpy as np

from mixlm.core.options import GenerationOptions
from mixlm.core.rng import Noise
from mixlm.core.sampling import top_logprobs
from mixlm.decoding import StrategyContext
from mixlm.engines.requests import LogitsRequest
from mixlm.errors import UnsupportedError
from mixlm.generation.dispatch import RequestFlow
from mixlm.generation.member import MemberView
from mixlm.generation.sequence import Choice, DecodeStep, Flow, Strategy
from mixlm.types import Candidates, TopLogprobs
from mixlm.units.byte import BoundaryOutput, ByteState, RankedDistribution
from mixlm.units.word import WHITESPACE

MAX_BYTES = 32  # of one member that are chosen at once
_STOPS = frozenset(WHITESPACE)


def build(options: GenerationOptions, context: StrategyContext) -> Strategy:
    """Return the strategy; it has no options."""
    return byte_mixture


def byte_mixture(step: DecodeStep) -> Flow:
    """Toss a coin for each byte, and sample it from that member."""
    z = step.noise.coin(step.weights)
    sampler = _CoverSampler(z, step.views[z])
    cover = yield from sampler.sample_cover(step.noise)
    choices: list[Choice] = []
    while True:
        for choice in sampler.sample_bytes(cover, step.noise):
            choices.append(choice)
            if choice.symbol in _STOPS or len(choices) == MAX_BYTES or choice.symbol == sampler.end:
                return choices
            following = yield from step.following(choice.symbol)
            if following is None or following.noise.coin(following.weights) != z:
                return choices
            step = following
        sampler = _CoverSampler(z, step.views[z])
        cover = yield from sampler.cover_at_end()


class _Cover(NamedTuple):
    """A group of covers: where their last token begins, and the span of the distribution there that it is from."""

    offset: int
    distribution: RankedDistribution
    span: slice


class _Group(NamedTuple):
    """A group of covers and its weight; the covers end with the text where `cover` is None."""

    weight: float
    cover: _Cover | None


class _CoverSampler:
    """Samples one member's covers of the text as it is now. end: the symbol of end-of-text."""

    def __init__(self, member: int, view: MemberView) -> None:
        self._member = member
        self._view = view
        self._state = cast(ByteState, view.state)
        self._index = self._state.prefix_indexes[member]
        self._length = len(self._state)
        self.end = self._index.end

    def sample_cover(self, noise: Noise) -> RequestFlow[_Cover]:
        """Sample a group of covers; one that ends with the text becomes all tokens after it."""
        cover: _Cover | None = None
        if self._length:
            group = yield from self._sample_group(noise.next_round().uniform())
            cover = group.cover if group is not None else (yield from self._respell(noise.next_round()))
        return (yield from self.cover_at_end()) if cover is None else cover

    def cover_at_end(self) -> RequestFlow[_Cover]:
        """Return all tokens after a text that ends with a token."""
        distribution = (yield from self._output(self._length)).distribution
        return _Cover(self._length, distribution, slice(0, distribution.ranks.size))

    def sample_bytes(self, cover: _Cover, noise: Noise) -> list[Choice]:
        """Sample a token of a cover, and return the bytes that it adds to the text.

        Each has its log-probability given the cover's offset; end-of-text is one choice.
        """
        distribution, span = cover.distribution, cover.span
        if span.start == span.stop:
            raise UnsupportedError(f"{self._view.member.name} cannot continue the text as json_schema or tools allow")
        index = span.start + noise.sample(distribution.symbols[span], distribution.logprobs[span])
        if distribution.symbols[index] == self.end:
            return [Choice(self.end, self._member, float(distribution.logprobs[index]))]
        token = self._index.token_bytes(int(distribution.ranks[index]))
        choices = []
        mass = distribution.mass(span)
        for length in range(self._length - cover.offset, len(token)):
            alternatives = self._top_bytes(distribution, span, length)
            span = distribution.span(*self._index.with_prefix(token[: length + 1]))
            narrower = distribution.mass(span)
            logprob = min(float(np.log(narrower / mass)), 0.0)
            choices.append(Choice(token[length], self._member, logprob, alternatives))
            mass = narrower
        return choices

    def _top_bytes(self, distribution: RankedDistribution, span: slice, length: int) -> TopLogprobs:
        """Return the most likely bytes after the first `length` of a token, given that it is in a span."""
        count = self._view.member.top_logprobs
        if count == 0:
            return ()
        mass: defaultdict[int, float] = defaultdict(float)
        for index in range(span.start, span.stop):
            is_end = distribution.symbols[index] == self.end
            token = b"" if is_end else self._index.token_bytes(int(distribution.ranks[index]))
            if is_end or len(token) > length:
                mass[self.end if is_end else token[length]] += float(np.exp(distribution.logprobs[index]))
        symbols, masses = np.array(list(mass)), np.array(list(mass.values()))
        return top_logprobs(Candidates(symbols, np.log(masses / distribution.mass(span))), count)

    def _output(self, offset: int) -> RequestFlow[BoundaryOutput]:
        """Return the member's output at a boundary, from a forward if it is not known."""
        output = self._state.cached_output(self._member, offset)
        if output is None:
            ids = self._state.ids_at(self._member, offset)
            text = self._state.substring(0, offset)
            distribution = self._view.bind_distribution(ids, text)
            [[logits]] = yield [LogitsRequest(self._member, ids, allowed=self._view.allowed_ids(text))]
            ranked = RankedDistribution.from_candidates(self._index, distribution(logits))
            output = BoundaryOutput(logits.copy(), ranked)
            self._state.cache_output(self._member, offset, output)
        return output

    def _sample_group(self, uniform: float) -> RequestFlow[_Group | None]:
        """Return the group of covers that a number in (0, 1] picks; None where there is none."""
        groups: list[_Group] = []
        start = self._state.forced_boundary(self._member)
        pending = defaultdict(float, {start: 1.0})  # probability of covers by the boundary that they have reached
        runs = 0
        while pending:
            if (picked := _picked_group(groups, uniform, sum(pending.values()))) is not None:
                return picked
            # From left to right each boundary runs once; by probability, one may get more of it later.
            in_order = runs > self._length - start
            offset = min(pending) if in_order else max(pending, key=lambda offset: (pending[offset], -offset))
            runs += 1
            mass = pending.pop(offset)
            distribution = (yield from self._output(offset)).distribution
            rest = self._state.substring(offset)
            for length, rank in self._index.prefixes_of(rest):
                probability = mass * distribution.mass(distribution.span(rank, rank + 1))
                if probability > 0 and length < len(rest):
                    pending[offset + length] += probability
                elif probability > 0:
                    groups.append(_Group(probability, None))
            extensions = distribution.span(*self._index.extensions_of(rest))
            if (probability := mass * distribution.mass(extensions)) > 0:
                groups.append(_Group(probability, _Cover(offset, distribution, extensions)))
            if not groups:
                # Only their ratios count, and a long text that nobody expects has very little probability.
                total = sum(pending.values())
                for offset in pending:
                    pending[offset] /= total
        return _picked_group(groups, uniform, 0.0)

    def _respell(self, noise: Noise) -> RequestFlow[_Cover | None]:
        """Spell the text from its last forced boundary, a token at a time; return the group that reaches beyond it."""
        offset = self._state.forced_boundary(self._member)
        while offset < self._length:
            output = yield from self._output(offset)
            rest = self._state.substring(offset)
            prefixes = {rank: length for length, rank in self._index.prefixes_of(rest)}
            extensions = self._index.extensions_of(rest)
            agreeing = self._index.symbols([*prefixes, *range(*extensions)])
            mask = np.isin(self._view.member.symbols, agreeing)
            ids, text = self._state.ids_at(self._member, offset), self._state.substring(0, offset)
            among = yield from self._view.distribution_among(mask, output.logits, ids, text)
            distribution = RankedDistribution.from_candidates(self._index, among)
            if not distribution.ranks.size:
                return None
            rank = int(distribution.ranks[noise.sample(distribution.symbols, distribution.logprobs)])
            if rank not in prefixes:
                return _Cover(offset, distribution, distribution.span(*extensions))
            offset += prefixes[rank]
            noise = noise.next_round()
        return None


def _picked_group(groups: list[_Group], uniform: float, pending: float) -> _Group | None:
    """Return the group that a number in (0, 1] picks, whatever further groups of the weight `pending` there are."""
    if not groups:
        return None
    edges = np.cumsum([group.weight for group in groups])
    first, last = np.searchsorted(edges, [uniform * edges[-1], uniform * (edges[-1] + pending)])
    return groups[first] if first == last else None
