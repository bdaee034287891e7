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
from mixlm.generation.member import Member, MemberView
from mixlm.generation.sequence import DecodeStep
from mixlm.generation.target import RuleTarget, support
from mixlm.tokenization.vocabulary import SPACE, Vocabulary
from mixlm.types import Candidates, Floats, Ids, LogitsRow, Sampling


class StringTarget(RuleTarget):
    """The distribution of a rule over token strings."""

    combines_symbols = False

    def __init__(self, rule: Combination) -> None:
        super().__init__(rule)
        self._member: Member | None = None
        self._union: StringUnion | None = None

    def distribution(
        self, step: DecodeStep, member: int, *, normalize: bool = True
    ) -> Callable[[LogitsRow], Candidates]:
        """Return a member's function from logits to its distribution over strings."""
        return _over_strings(step.views[member], self._strings(step).strings_of[member])

    def symbol(self, step: DecodeStep, combined: int) -> int:
        """Return the symbol that a string stands for."""
        return int(self._strings(step).symbols[combined])

    def in_symbols(self, step: DecodeStep, distribution: Candidates) -> Candidates:
        """Return a distribution over strings as one over the symbols that they stand for."""
        return pool(self._strings(step).symbols[distribution.ids], distribution.logprobs)

    def _strings(self, step: DecodeStep) -> StringUnion:
        # Members are others where a generation goes on with other options of theirs.
        if self._union is None or self._member is not step.views[0].member:
            self._member = step.views[0].member
            self._union = StringUnion([view.member for view in step.views])
        return self._union


class SpelledTarget(RuleTarget):
    """The distribution of `unite` between members with different vocabularies.

    A member's part depends on what the others have among their most likely tokens, and may hold one probability several
    times, so nothing is certain before all members have run.

    Args:
        rule: The rule `union-top-k`.
        sampling: Its top_k is the k of the union; the rest applies to the average.
    """

    has_bounds = False

    def __init__(self, rule: Combination, sampling: Sampling) -> None:
        super().__init__(rule)
        self._sampling = sampling
        self._member: Member | None = None
        self._spellings: TokenSpellings | None = None

    def distribution(
        self, step: DecodeStep, member: int, *, normalize: bool = True
    ) -> Callable[[LogitsRow], Candidates]:
        """Return a member's function from logits to its distribution."""
        if self._member is not step.views[0].member:
            self._member = step.views[0].member
            self._spellings = TokenSpellings([view.member for view in step.views])
        return super().distribution(step, member)

    def combine(
        self,
        members: Sequence[int],
        parts: Sequence[Candidates],
        weights: Floats,
        aligned: Callable[[], Aligned] | None = None,
    ) -> Candidates:
        """Return the average of the parts, each normalised over the union."""
        assert self._spellings is not None
        k = self._sampling.top_k
        union = np.unique(np.concatenate([part.ids[largest_indices(part.logprobs, k)] for part in parts]))
        symbols_for = self._spellings.symbols_for
        average = mix(
            [
                (float(weight), _over_union(union, part, symbols_for(member, union)))
                for member, weight, part in zip(members, weights, parts, strict=True)
            ]
        )
        return support(average.ids, transformed(np.exp(average.logprobs), replace(self._sampling, top_k=0)))


class StringUnion:
    """The union of the members' token strings.

    strings_of: by member, the number of each id's string, int64 (vocab,). symbols: the shared symbol that each string
    stands for, int64 (strings,).
    """

    def __init__(self, members: Sequence[Member]) -> None:
        numbers: dict[str, int] = {}
        symbols: list[int] = []
        self.strings_of: list[Ids] = []
        for member in members:
            strings = np.full(len(member.symbols), -1, dtype=np.int64)
            spellings = token_strings(member.engine.vocabulary)
            for i in np.flatnonzero(member.symbols >= 0).tolist():
                number = strings[i] = numbers.setdefault(spellings[i], len(numbers))
                if number == len(symbols):
                    symbols.append(int(member.symbols[i]))
            self.strings_of.append(strings)
        self.symbols = np.array(symbols, dtype=np.int64)


def token_strings(vocabulary: Vocabulary) -> list[str]:
    """Return each id's string in the union: its spelling, with the tokenizer's signs for a space and a line end read.

    The signs are recognised as in the published code: by which of them more tokens begin with.
    """
    names = [vocabulary.name(i) for i in range(vocabulary.size)]
    if sum(name.startswith("Ġ") for name in names) > sum(name.startswith(SPACE) for name in names):
        return [name.replace("Ġ", " ").replace("Ċ", "\n") for name in names]
    return [name.replace(SPACE, " ") if name.startswith(SPACE) else name for name in names]


class TokenSpellings:
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


def _over_strings(view: MemberView, strings: Ids) -> Callable[[LogitsRow], Candidates]:
    tokens = view.bind_distribution(of_tokens=True)

    def distribution(logits: LogitsRow) -> Candidates:
        ids, logprobs = tokens(logits)
        if not ids.size:
            return Candidates(ids, logprobs)
        return pool(strings[ids], logprobs)

    return distribution


def _over_union(union: Ids, distribution: Candidates, symbols: Ids) -> Candidates:
    """Return a member's distribution over the union. symbols: whose probability each symbol of the union has."""
    size = max(int(distribution.ids.max()), int(symbols.max())) + 2
    table = np.full(size, -np.inf)  # the last entry is for -1: no probability
    table[distribution.ids] = distribution.logprobs
    logprobs: Floats = table[symbols]
    return Candidates(union, logprobs - np.logaddexp.reduce(logprobs))
