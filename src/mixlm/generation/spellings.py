"""Rules that were published for tokens as their tokenizers spell them: `gac`, and `unite` between vocabularies.

gac (Yu et al., "Breaking the Ceiling of the LLM Community by Treating Token Generation as a Classification for
Ensembling", Findings of EMNLP 2024, arXiv 2406.12585): each vocabulary is mapped into the union of all token strings,
the mapped probabilities are averaged by weight, and the most likely string is the next token.

Two tokens are the same only where their tokenizers spell them alike, apart from the signs for a space and a line end.
So "é" of a byte-level tokenizer, spelled "Ã©", and "é" of SentencePiece are two, a byte token and the character of
that byte are two, and every model's end-of-text is its own. The library's own target distribution pools all of these.
A sample from the plain average is the same text either way; with truncation, temperature or the most likely, it is
not.

unite (Yao et al., "Determine-Then-Ensemble", ICLR 2025, arXiv 2410.03777): the rule `union-top-k`, in which a token
that a member's vocabulary lacks has the probability of the first token that the member spells it with. Here tokens are
joined by their bytes, all ends of text are one, and the average is by weight, where the paper's is plain.

Three things differ from the published code, since they would spoil the text: control tokens stay masked, a string
stands for the bytes of the first member that spells a token so, and members keep their own canonical tokens for the
text, where that code encodes each chosen token alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from mixlm.core.combinations.after import transformed
from mixlm.core.combinations.base import Aligned, Combination
from mixlm.core.mixing import mix, pool
from mixlm.core.sampling import largest_indices
from mixlm.errors import TokenizerError
from mixlm.generation.member import Member
from mixlm.generation.sequence import DecodeStep
from mixlm.generation.target import RuleTarget, support
from mixlm.tokenization.vocabulary import SPACE, Vocabulary
from mixlm.types import Candidates, Floats, Ids, LogitsRow, Sampling


class StringTarget(RuleTarget):
    """The distribution of a rule over the union of the members' token strings."""

    combines_symbols = False
    _members: Sequence[Member] = ()

    def distribution(
        self, step: DecodeStep, member: int, *, normalize: bool = True
    ) -> Callable[[LogitsRow], Candidates]:
        """Return a member's function from logits to its distribution over strings."""
        self._number_strings([view.member for view in step.views])
        tokens, strings = step.views[member].bind_distribution(of_tokens=True), self._strings_of[member]

        def distribution(logits: LogitsRow) -> Candidates:
            ids, logprobs = tokens(logits)
            return pool(strings[ids], logprobs) if ids.size else Candidates(ids, logprobs)

        return distribution

    def symbol(self, step: DecodeStep, combined: int) -> int:
        """Return the symbol that a string stands for."""
        return int(self._symbols[combined])

    def in_symbols(self, step: DecodeStep, distribution: Candidates) -> Candidates:
        """Return a distribution over strings as one over the symbols that they stand for."""
        return pool(self._symbols[distribution.ids], distribution.logprobs)

    def _number_strings(self, members: Sequence[Member]) -> None:
        """Number the strings of each member's ids, and find the symbol that each stands for."""
        if members == self._members:  # others where a generation goes on with other options of theirs
            return
        self._members, self._strings_of = members, []
        numbers: dict[str, int] = {}
        symbols: list[int] = []
        for member in members:
            strings = np.full(len(member.symbols), -1, dtype=np.int64)
            spellings = token_strings(member.engine.vocabulary)
            for i in np.flatnonzero(member.symbols >= 0).tolist():
                number = strings[i] = numbers.setdefault(spellings[i], len(numbers))
                if number == len(symbols):
                    symbols.append(int(member.symbols[i]))
            self._strings_of.append(strings)
        self._symbols = np.array(symbols, dtype=np.int64)


class SpelledTarget(RuleTarget):
    """The distribution of `unite` between members with different vocabularies.

    A member's part depends on what the others have among their most likely tokens, and may hold one probability several
    times, so nothing is certain before all members have run.

    Args:
        rule: The rule `union-top-k`.
        sampling: Its top_k is the k of the union; the rest applies to the average.
    """

    has_bounds = False
    _members: Sequence[Member] = ()

    def __init__(self, rule: Combination, sampling: Sampling) -> None:
        super().__init__(rule)
        self._sampling = sampling

    def distribution(
        self, step: DecodeStep, member: int, *, normalize: bool = True
    ) -> Callable[[LogitsRow], Candidates]:
        """Return a member's function from logits to its distribution."""
        members = [view.member for view in step.views]
        if members != self._members:
            self._members = members
            self._vocabularies = [frozenset(member.symbols[member.symbols >= 0].tolist()) for member in members]
            self._first_symbols: list[dict[int, int]] = [{} for _ in members]
        return super().distribution(step, member)

    def combine(
        self,
        members: Sequence[int],
        parts: Sequence[Candidates],
        weights: Floats,
        aligned: Callable[[], Aligned] | None = None,
    ) -> Candidates:
        """Return the average of the parts, each normalised over the union."""
        k = self._sampling.top_k
        union = np.unique(np.concatenate([part.ids[largest_indices(part.logprobs, k)] for part in parts]))
        average = mix(
            [
                (float(weight), _over_union(union, part, self._symbols_for(member, union)))
                for member, weight, part in zip(members, weights, parts, strict=True)
            ]
        )
        return support(average.ids, transformed(np.exp(average.logprobs), replace(self._sampling, top_k=0)))

    def _symbols_for(self, member: int, symbols: Ids) -> Ids:
        """Return the symbols themselves where the member has them, else the first of its spelling, or -1 for none."""
        vocabulary, first_symbols = self._vocabularies[member], self._first_symbols[member]
        for symbol in symbols.tolist():
            if symbol not in vocabulary and symbol not in first_symbols:
                first_symbols[symbol] = self._first_symbol(self._members[member], self._bytes(symbol))
        return np.array([u if u in vocabulary else first_symbols[u] for u in symbols.tolist()], dtype=np.int64)

    def _bytes(self, symbol: int) -> bytes:
        """Return the bytes of a symbol that some member has; none for end-of-text."""
        owner = self._members[next(i for i, vocabulary in enumerate(self._vocabularies) if symbol in vocabulary)]
        return owner.engine.vocabulary.tokens[int(np.flatnonzero(owner.symbols == symbol)[0])]

    def _first_symbol(self, member: Member, data: bytes) -> int:
        try:
            ids = member.engine.encoder.encode(data).ids
        except TokenizerError:  # the vocabulary cannot spell it at all
            return -1
        return int(member.symbols[ids[0]]) if ids else -1


def token_strings(vocabulary: Vocabulary) -> list[str]:
    """Return each id's string in the union: its spelling, with the tokenizer's signs for a space and a line end read.

    The signs are recognised as in the published code: by which of them more tokens begin with.
    """
    names = [vocabulary.name(i) for i in range(vocabulary.size)]
    if sum(name.startswith("Ġ") for name in names) > sum(name.startswith(SPACE) for name in names):
        return [name.replace("Ġ", " ").replace("Ċ", "\n") for name in names]
    return [name.replace(SPACE, " ") if name.startswith(SPACE) else name for name in names]


def _over_union(union: Ids, distribution: Candidates, symbols: Ids) -> Candidates:
    """Return a member's distribution over the union. symbols: whose probability each symbol of the union has."""
    size = max(int(distribution.ids.max()), int(symbols.max())) + 2
    table = np.full(size, -np.inf)  # the last entry is for -1: no probability
    table[distribution.ids] = distribution.logprobs
    logprobs: Floats = table[symbols]
    return Candidates(union, logprobs - np.logaddexp.reduce(logprobs))
