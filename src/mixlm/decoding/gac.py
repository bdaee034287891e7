"""The rule `gac`, for comparison: the average over the union of the members' token strings.

Yu et al., "Breaking the Ceiling of the LLM Community by Treating Token Generation as a Classification for Ensembling"
(Findings of EMNLP 2024, arXiv 2406.12585): each vocabulary is mapped into the union of all token strings, the mapped
probabilities are averaged by weight, and the most likely string is the next token.

Two tokens are one only where their tokenizers spell them alike, the signs for a space and a line end aside. So "é" of a
byte-level tokenizer, spelled "Ã©", and "é" of SentencePiece are two, a byte token and the character of that byte are
two, and every model's end-of-text is one of its own. The library's own law pools all of these. What is drawn from the
plain average is the same text either way; what is truncated, tempered or picked as most likely is not.

Three things are not taken over from the published code, since they would spoil the text: control tokens stay masked,
a string stands for the bytes of the first member that spells a token so, and members go on reading the text in their
own canonical tokens, where that code encodes each chosen token alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixlm.core.mixing import mix, pool, responsibilities
from mixlm.decoding.conventional import pick
from mixlm.engines.base import LogitsRequest
from mixlm.generation.member import Member
from mixlm.generation.sequence import Choice, DecodeStep, Flow, Strategy
from mixlm.tokenization.vocabulary import SPACE, Vocabulary
from mixlm.types import Ids, Sampling


def gac(after: Sampling) -> Strategy:
    """Return the strategy. after: temperature and truncation of the average; temperature 0 is the published choice."""
    unions: list[_Union] = []

    def strategy(step: DecodeStep) -> Flow:
        if not unions:
            unions.append(_Union([view.member for view in step.views]))
        union = unions[0]
        asked = [i for i, weight in enumerate(step.weights) if weight > 0]
        replies = yield [LogitsRequest(i, step.views[i].ids()) for i in asked]
        parts = []
        for i, logits in zip(asked, replies, strict=True):
            ids, logprobs = step.views[i].token_distribution(logits[0])
            parts.append((float(step.weights[i]), pool(union.cells[i][ids], logprobs)))
        law, at = pick(step.noise, mix(parts), after)
        cell = int(law.ids[at])
        author = asked[int(np.argmax(responsibilities(cell, parts)))]
        named = tuple((int(union.symbols[one]), logprob) for one, logprob in step.top_logprobs(law))
        return [Choice(int(union.symbols[cell]), author, float(law.logprobs[at]), named)]

    return strategy


class _Union:
    """The union of the members' token strings. cells: the number of each id's string, for each member, int64 (vocab,).

    symbols: the shared symbol that each string stands for, int64 (strings,).
    """

    def __init__(self, members: Sequence[Member]) -> None:
        table: dict[str, int] = {}
        stands: list[int] = []
        self.cells: list[Ids] = []
        for one in members:
            cells = np.full(len(one.symbols), -1, dtype=np.int64)
            spell = strings(one.engine.vocabulary)
            for i in np.flatnonzero(one.symbols >= 0).tolist():
                cell = cells[i] = table.setdefault(spell[i], len(table))
                if cell == len(stands):
                    stands.append(int(one.symbols[i]))
            self.cells.append(cells)
        self.symbols = np.array(stands, dtype=np.int64)


def strings(vocabulary: Vocabulary) -> list[str]:
    """Return each id's string in the union: its spelling, with the tokenizer's signs for a space and a line end read.

    Which signs it uses is told as in the published code: by which of them more tokens begin with.
    """
    names = [vocabulary.name(i) for i in range(vocabulary.size)]
    if sum(one.startswith("Ġ") for one in names) > sum(one.startswith(SPACE) for one in names):
        return [one.replace("Ġ", " ").replace("Ċ", "\n") for one in names]
    return [one.replace(SPACE, " ") if one.startswith(SPACE) else one for one in names]
