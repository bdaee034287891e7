"""Log-probabilities of a raw prompt's tokens under a combination rule (`echo`, `score_prompt`), in the unit `token`.

Members that share a vocabulary have the same tokens of a text, so each of these has the probability `C(u | before)`.
Members are read without sampling options, as `mixlm.scoring.rule_scores` reads them.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from mixlm.core.combinations.base import Combination
from mixlm.core.sampling import softmax
from mixlm.engines.requests import LogitsRequest, Request, Response
from mixlm.generation import prompt_logprobs
from mixlm.generation.member import Member
from mixlm.generation.prompt_logprobs import ScoredPrompt, symbol_logprobs
from mixlm.tokenization.segments import common_boundaries, first_tokens, segment_logprobs, segment_strings
from mixlm.types import Floats, Ids, Logits, Token
from mixlm.units.base import Unit


def rule_prompt_tokens(
    rule: Combination,
    taking_part: tuple[Sequence[int], Floats],
    members: Sequence[Member],
    unit: Unit,
    prompts: tuple[Sequence[Ids], bytes],
) -> Generator[list[Request], list[Response], tuple[Token, ...]]:
    """Score a raw prompt under a rule, and return its tokens; as `prompt_logprobs.prompt_tokens`.

    Args:
        rule: The rule.
        taking_part: The members that do, in the order of the rule's rows, and their weights, float64 (rows,).
        members: All members.
        unit: The unit, whose members share a vocabulary.
        prompts: Each member's ids, and the text.
    """
    (rows, weights), (ids, text) = taking_part, prompts
    scored = [ScoredPrompt.of(members[i], ids[i], text) for i in rows]
    symbols = [unit.symbols(i) for i in rows]
    first = scored[0]
    common = common_boundaries([prompt.ends for prompt in scored])
    common = common[common > 0]
    firsts = set(first_tokens(first.ends, common).tolist())
    tops = {}
    begin = max(1 - prompt.first for prompt in scored)  # nothing is in front of the first id
    size = prompt_logprobs.ROWS
    for start in range(max(begin, 0), len(first.ends), size):
        end = min(start + size, len(first.ends))
        requests: list[Request] = [
            LogitsRequest(i, prompt.ids[: prompt.first + end - 1], end - start)
            for i, prompt in zip(rows, scored, strict=True)
        ]
        responses = yield requests
        for number in range(start, end):
            parts = zip(responses, symbols, strict=True)
            probs = [symbol_probabilities(logits[number - start], own, unit.end + 1) for logits, own in parts]
            combined = rule.combine(np.array(probs), weights)
            target = symbols[0][first.ids[first.first + number]]
            with np.errstate(divide="ignore"):
                first.logprobs[number] = np.log(combined[target])
            if number in firsts:
                tops[number] = symbol_logprobs(unit, combined, members[0].top_logprobs)
    starts = np.concatenate([[0], common[:-1]]).astype(np.int64)
    logprobs = segment_logprobs(first.logprobs, first.ends, common)
    begins = first_tokens(first.ends, common).tolist()
    return tuple(
        Token(string, text[start:stop], members[rows[0]].name, float(logprob), tops.get(number, ()))
        for string, start, stop, logprob, number in zip(
            segment_strings(text, starts, common), starts, common, logprobs, begins, strict=True
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
    distribution = np.zeros(size)
    np.add.at(distribution, symbols[tokens], softmax(logits[tokens]))
    return distribution
