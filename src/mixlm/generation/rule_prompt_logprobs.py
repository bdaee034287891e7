"""Log-probabilities of a given text's tokens under a combination rule, in the unit `token`.

Members that share a vocabulary have the same tokens of a text, so each of these has the probability `C(u | before)`.
Members are read without sampling options. A raw prompt's tokens are scored here (`echo`, `score_prompt`); texts and
answers in `mixlm.scoring.rule_scores`, by the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mixlm.core.combinations.base import Combination
from mixlm.core.sampling import softmax
from mixlm.engines.requests import LogitsRequest
from mixlm.errors import UnsupportedError
from mixlm.generation.dispatch import RequestFlow
from mixlm.generation.member import Member
from mixlm.generation.prompt_logprobs import ScoredPrompt, symbol_logprobs
from mixlm.tokenization.segments import first_tokens, segment_logprobs, segment_strings
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Floats, Ids, Logits, Token, TopLogprob
from mixlm.units.base import Unit

# Positions that are combined between two steps of other sequences: one of a large vocabulary takes 30 ms.
POSITIONS = 4


@dataclass(frozen=True)
class GivenText:
    """A text in the tokens of the members that take part in a rule, in the order of its rows.

    members: their indices. symbols: the unit's symbol of each of their ids, int64 (vocab,). size: how many symbols
    there are. ids: each one's prefix and the text, int64 (n,). begins: where the text begins in these.
    """

    members: Sequence[int]
    symbols: Sequence[Ids]
    size: int
    ids: Sequence[Ids]
    begins: Sequence[int]

    def targets(self, readers: Sequence[tuple[str, Vocabulary]]) -> Ids:
        """Return the symbol of each of the text's tokens, int64 (n,).

        Args:
            readers: The members' names and vocabularies.

        Raises:
            UnsupportedError: The members do not have the same tokens.
        """
        texts = [ids[begin:] for ids, begin in zip(self.ids, self.begins, strict=True)]
        targets = [symbols[text] for symbols, text in zip(self.symbols, texts, strict=True)]
        first = targets[0]
        for reader, text, other in zip(readers, texts, targets, strict=True):
            length = min(len(first), len(other))
            differing = np.flatnonzero(first[:length] != other[:length])
            if differing.size or len(first) != len(other):
                place = int(differing[0]) if differing.size else length
                own, others = _token_name(readers[0], texts[0], place), _token_name(reader, text, place)
                raise _not_shared(f"{readers[0][0]} has {own} where {reader[0]} has {others}")
        if (first < 0).any():
            raise _not_shared(f"not all have {_token_name(readers[0], texts[0], int(np.argmax(first < 0)))}")
        return first

    def read(self, places: range, positions: int, take: Callable[[int, Floats], bool]) -> RequestFlow[None]:
        """Run the members on the text, some positions at a time.

        Args:
            places: The tokens of the text in front of which they are read, by index.
            positions: How many at a time.
            take: Called with each place and the members' distributions there, float64 (members, symbols); returns
                whether to go on.
        """
        for start in range(places.start, places.stop, positions):
            end = min(start + positions, places.stop)
            responses = yield [
                LogitsRequest(member, ids[: begin + end - 1], end - start)
                for member, ids, begin in zip(self.members, self.ids, self.begins, strict=True)
            ]
            for place in range(start, end):
                rows = zip(responses, self.symbols, strict=True)
                probs = [symbol_probabilities(logits[place - start], symbols, self.size) for logits, symbols in rows]
                if not take(place, np.array(probs)):
                    return


def _token_name(reader: tuple[str, Vocabulary], ids: Ids, place: int) -> str:
    return repr(reader[1].name(int(ids[place]))) if place < len(ids) else "no further token"


def _not_shared(reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"under a rule, a text has a log-probability where members have the same tokens of it, and {reason}",
        "take it out of the text, or use mixlm score with --unit piece",
    )


def rule_prompt_tokens(
    rule: Combination,
    taking_part: tuple[Sequence[int], Floats],
    members: Sequence[Member],
    unit: Unit,
    prompts: tuple[Sequence[Ids], bytes],
) -> RequestFlow[tuple[Token, ...]]:
    """Score a raw prompt under a rule, and return its tokens; as `prompt_logprobs.prompt_tokens`.

    Args:
        rule: The rule.
        taking_part: The members that do, in the order of the rule's rows, and their weights, float64 (rows,).
        members: All members.
        unit: The unit, whose members share a vocabulary.
        prompts: Each member's ids, and the text.

    Raises:
        UnsupportedError: The members do not have the same tokens of it.
    """
    (rows, weights), (ids, text) = taking_part, prompts
    scored = [ScoredPrompt.of(members[i], ids[i], text) for i in rows]
    begins = [prompt.first for prompt in scored]
    given = GivenText(rows, [unit.symbols(i) for i in rows], unit.end + 1, [prompt.ids for prompt in scored], begins)
    targets = given.targets([(members[i].name, members[i].engine.vocabulary) for i in rows])
    first, count = scored[0], members[0].top_logprobs
    tops: dict[int, tuple[TopLogprob, ...]] = {}

    def take(place: int, probs: Floats) -> bool:
        combined = rule.combine(probs, weights)
        with np.errstate(divide="ignore"):
            first.logprobs[place] = np.log(combined[targets[place]])
        if count:
            tops[place] = symbol_logprobs(unit, combined, count)
        return True

    begin = max(0, *(1 - begin for begin in begins))  # nothing is in front of the first id
    yield from given.read(range(begin, len(targets)), POSITIONS, take)
    ends = first.ends[first.ends > 0]  # a space that a tokenizer adds is no segment
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    name = members[rows[0]].name
    return tuple(
        Token(string, text[start:stop], name, float(logprob), tops.get(number, ()))
        for string, start, stop, logprob, number in zip(
            segment_strings(text, starts, ends),
            starts,
            ends,
            segment_logprobs(first.logprobs, first.ends, ends),
            first_tokens(first.ends, ends).tolist(),
            strict=True,
        )
    )


def symbol_probabilities(logits: Logits, symbols: Ids, size: int) -> Floats:
    """Return a member's distribution over the unit's symbols, float64 (size,).

    Args:
        logits: (vocab,).
        symbols: The symbol of each id, int64 (vocab,); -1 for those that are never sampled.
        size: How many symbols there are.
    """
    tokens = np.flatnonzero(symbols >= 0)
    return np.bincount(symbols[tokens], weights=softmax(logits[tokens]), minlength=size).astype(np.float64, copy=False)
