"""The rule `unite`, for comparison: the average over the union of the members' top k.

Yao et al., "Determine-Then-Ensemble: Necessity of Top-k Union for Large Language Model Ensembling" (ICLR 2025, arXiv
2410.03777): the k most likely tokens of every member are joined; each member's probabilities of the joined tokens are
normalised over them, whether or not they are in its own top k; a token that a member's vocabulary lacks has the
probability of the first token that the member spells it with; the average's most likely token is next. k is 10 there.

A member's part so depends on what the others have in their top k, and a token it ranks low can win. The library's own
law truncates each member by itself, which is why it has a form that runs one member and this rule has none. Here tokens
are joined by their bytes, all ends of text are one, and the average is by weight, where the paper's is plain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mixlm.core.mixing import mix, responsibilities
from mixlm.core.sampling import largest_indices
from mixlm.decoding.conventional import pick
from mixlm.engines.base import LogitsRequest
from mixlm.errors import TokenizerError
from mixlm.generation.member import Member
from mixlm.generation.sequence import Choice, DecodeStep, Flow, Strategy
from mixlm.types import Candidates, Floats, Ids, Sampling


def unite(after: Sampling) -> Strategy:
    """Return the strategy. after: top_k is the k of the union; the rest is applied to the average.

    Temperature 0 is the published choice.
    """
    spellings: list[_Spelling] = []

    def strategy(step: DecodeStep) -> Flow:
        if not spellings:
            spellings.append(_Spelling([view.member for view in step.views]))
        asked = [i for i, weight in enumerate(step.weights) if weight > 0]
        replies = yield [LogitsRequest(i, step.views[i].ids()) for i in asked]
        laws = {i: step.views[i].distribution(logits[0]) for i, logits in zip(asked, replies, strict=True)}
        union = np.unique(
            np.concatenate([one.ids[largest_indices(one.logprobs, after.top_k)] for one in laws.values()])
        )
        parts = [(float(step.weights[i]), _over(union, law, spellings[0].read_by(i, union))) for i, law in laws.items()]
        law, at = pick(step.noise, mix(parts), replace(after, top_k=0))
        symbol = int(law.ids[at])
        author = asked[int(np.argmax(responsibilities(symbol, parts)))]
        return [Choice(symbol, author, float(law.logprobs[at]), step.top_logprobs(law))]

    return strategy


def _over(union: Ids, law: Candidates, read: Ids) -> Candidates:
    """Return a member's distribution over the union. read: the symbol whose probability each of its symbols has."""
    known = np.full(max(int(law.ids.max()), int(read.max())) + 2, -np.inf)  # the last is for -1: no probability
    known[law.ids] = law.logprobs
    found: Floats = known[read]
    return Candidates(union, found - np.logaddexp.reduce(found))


class _Spelling:
    """How members spell symbols that their vocabularies lack."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self._has = [frozenset(one.symbols[one.symbols >= 0].tolist()) for one in members]
        self._known: list[dict[int, int]] = [{} for _ in members]

    def read_by(self, member: int, symbols: Ids) -> Ids:
        """Return the symbols themselves where the member has them, else the one its spelling begins with, or -1."""
        has, known = self._has[member], self._known[member]
        out = []
        for symbol in symbols.tolist():
            if symbol not in has and symbol not in known:
                known[symbol] = self._first(member, self._data(symbol))
            out.append(symbol if symbol in has else known[symbol])
        return np.array(out, dtype=np.int64)

    def _data(self, symbol: int) -> bytes:
        """Return the bytes of a symbol that some member has; none for end-of-text."""
        owner = next(one for one, has in zip(self._members, self._has, strict=True) if symbol in has)
        return owner.engine.vocabulary.tokens[int(np.flatnonzero(owner.symbols == symbol)[0])]

    def _first(self, member: int, data: bytes) -> int:
        one = self._members[member]
        try:
            ids = one.engine.encoder.encode(data).ids
        except TokenizerError:  # a vocabulary that cannot spell it at all
            return -1
        return int(one.symbols[ids[0]]) if ids else -1
