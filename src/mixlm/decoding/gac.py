"""The rule `gac`, for comparison: the average over the union of the members' token strings.

Yu et al., "Breaking the Ceiling of the LLM Community by Treating Token Generation as a Classification for Ensembling"
(Findings of EMNLP 2024, arXiv 2406.12585): each vocabulary is mapped into the union of all token strings, the mapped
probabilities are averaged by weight, and the most likely string is the next token.

Two tokens are the same only where their tokenizers spell them alike, apart from the signs for a space and a line end.
So "é" of a byte-level tokenizer, spelled "Ã©", and "é" of SentencePiece are two, a byte token and the character of that
byte are two, and every model's end-of-text is its own. The library's own target distribution pools all of these. A
sample from the plain average is the same text either way; with truncation, temperature or the most likely, it is not.

Three things differ from the published code, since they would spoil the text: control tokens stay masked, a string
stands for the bytes of the first member that spells a token so, and members keep their own canonical tokens for the
text, where that code encodes each chosen token alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixlm.core.mixing import mix, pool, responsibilities
from mixlm.core.options import GenerationOptions
from mixlm.decoding import StrategyContext
from mixlm.decoding.conventional import common_sampling, sample_mixed
from mixlm.engines.requests import LogitsRequest
from mixlm.generation.member import Member
from mixlm.generation.sequence import Choice, DecodeStep, Flow, Strategy
from mixlm.tokenization.vocabulary import SPACE, Vocabulary
from mixlm.types import Ids, Sampling


def build(options: GenerationOptions, context: StrategyContext) -> Strategy:
    """Return the strategy with the sampling options that all members share."""
    return gac(common_sampling(options, context))


def gac(sampling: Sampling) -> Strategy:
    """Return the strategy. sampling: applied to the average; temperature 0 is the published choice."""
    unions: list[_StringUnion] = []

    def strategy(step: DecodeStep) -> Flow:
        if not unions:
            unions.append(_StringUnion([view.member for view in step.views]))
        union = unions[0]
        members = step.weighted_members
        responses = yield [LogitsRequest(i, step.views[i].ids()) for i in members]
        parts = []
        for i, rows in zip(members, responses, strict=True):
            ids, logprobs = step.views[i].token_distribution(rows[0])
            parts.append((float(step.weights[i]), pool(union.strings_of[i][ids], logprobs)))
        average, index = sample_mixed(step.noise, mix(parts), sampling)
        string = int(average.ids[index])
        top_contributor = members[int(np.argmax(responsibilities(string, parts)))]
        top_logprobs = tuple((int(union.symbols[top]), logprob) for top, logprob in step.top_logprobs(average))
        return [Choice(int(union.symbols[string]), top_contributor, float(average.logprobs[index]), top_logprobs)]

    return strategy


class _StringUnion:
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
