"""The rule `unite`, for comparison: the average over the union of the members' top k.

Yao et al., "Determine-Then-Ensemble: Necessity of Top-k Union for Large Language Model Ensembling" (ICLR 2025, arXiv
2410.03777): the k most likely tokens of every member are joined; each member's probabilities of the joined tokens are
normalised over them, whether or not they are in its own top k; a token that a member's vocabulary lacks has the
probability of the first token that the member spells it with; the average's most likely token is next. k is 10 there.

A member's part so depends on what the others have in their top k, and a token that it ranks low can win. The library's
own target distribution truncates each member by itself, so it has a form that runs one member, and this rule has none.
Here tokens are joined by their bytes, all ends of text are one, and the average is by weight, where the paper's is
plain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mixlm.core.mixing import mix, responsibilities
from mixlm.core.options import GenerationOptions
from mixlm.core.sampling import largest_indices
from mixlm.decoding import StrategyContext
from mixlm.decoding.conventional import common_sampling, sample_mixed
from mixlm.engines.requests import LogitsRequest
from mixlm.errors import TokenizerError
from mixlm.generation.member import Member
from mixlm.generation.sequence import Choice, DecodeStep, Flow, Strategy
from mixlm.types import Candidates, Floats, Ids, Sampling


def build(options: GenerationOptions, context: StrategyContext) -> Strategy:
    """Return the strategy with the sampling options that all members share."""
    return unite(common_sampling(options, context))


def unite(sampling: Sampling) -> Strategy:
    """Return the strategy. sampling: its top_k is the k of the union; the rest is applied to the average.

    Temperature 0 is the published choice.
    """
    spellings: list[_TokenSpellings] = []

    def strategy(step: DecodeStep) -> Flow:
        if not spellings:
            spellings.append(_TokenSpellings([view.member for view in step.views]))
        members = step.weighted_members
        responses = yield [LogitsRequest(i, step.views[i].ids()) for i in members]
        distributions = [step.views[i].distribution(rows[0]) for i, rows in zip(members, responses, strict=True)]
        union = np.unique(
            np.concatenate([part.ids[largest_indices(part.logprobs, sampling.top_k)] for part in distributions])
        )
        parts = [
            (float(step.weights[i]), _over_union(union, distribution, spellings[0].symbols_for(i, union)))
            for i, distribution in zip(members, distributions, strict=True)
        ]
        average, index = sample_mixed(step.noise, mix(parts), replace(sampling, top_k=0))
        symbol = int(average.ids[index])
        top_contributor = members[int(np.argmax(responsibilities(symbol, parts)))]
        return [Choice(symbol, top_contributor, float(average.logprobs[index]), step.top_logprobs(average))]

    return strategy


def _over_union(union: Ids, distribution: Candidates, symbols: Ids) -> Candidates:
    """Return a member's distribution over the union. symbols: whose probability each symbol of the union has."""
    size = max(int(distribution.ids.max()), int(symbols.max())) + 2
    table = np.full(size, -np.inf)  # the last entry is for -1: no probability
    table[distribution.ids] = distribution.logprobs
    logprobs: Floats = table[symbols]
    return Candidates(union, logprobs - np.logaddexp.reduce(logprobs))


class _TokenSpellings:
    """How members spell symbols that their vocabularies lack."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self._vocabularies = [frozenset(member.symbols[member.symbols >= 0].tolist()) for member in members]
        self._first_symbols: list[dict[int, int]] = [{} for _ in members]

    def symbols_for(self, member: int, symbols: Ids) -> Ids:
        """Return the symbols themselves where the member has them, else the first of its spelling, or -1 for none."""
        vocabulary, first_symbols = self._vocabularies[member], self._first_symbols[member]
        out = []
        for symbol in symbols.tolist():
            if symbol not in vocabulary and symbol not in first_symbols:
                first_symbols[symbol] = self._first_symbol(member, self._bytes(symbol))
            out.append(symbol if symbol in vocabulary else first_symbols[symbol])
        return np.array(out, dtype=np.int64)

    def _bytes(self, symbol: int) -> bytes:
        """Return the bytes of a symbol that some member has; none for end-of-text."""
        owner = next(
            member for member, vocabulary in zip(self._members, self._vocabularies, strict=True) if symbol in vocabulary
        )
        return owner.engine.vocabulary.tokens[int(np.flatnonzero(owner.symbols == symbol)[0])]

    def _first_symbol(self, index: int, data: bytes) -> int:
        member = self._members[index]
        try:
            ids = member.engine.encoder.encode(data).ids
        except TokenizerError:  # the vocabulary cannot spell it at all
            return -1
        return int(member.symbols[ids[0]]) if ids else -1
