"""Exact scores of given text in the units `word` and `byte`: each member's token matches, summed over tokenizations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mixlm.engines.base import Engine
from mixlm.scoring import cache
from mixlm.scoring.marginals import TokenMatches, byte_logprobs, match_tokens, word_logprobs
from mixlm.scoring.passages import Passage
from mixlm.scoring.scores import Scores, concatenate
from mixlm.types import Floats
from mixlm.units.base import Unit


class ScoringMember(NamedTuple):
    """A member that scores a text: its name, its engine, and its model's `identity`; None to cache nothing."""

    name: str
    engine: Engine
    model: str | None


def marginal_scores(
    unit: Unit,
    members: Sequence[ScoringMember],
    weights: Floats,
    passages: Sequence[Passage],
    progress: Callable[[str, int, int], None] | None = None,
) -> Scores:
    """Score passages by the distribution of `word` or `byte`.

    In `byte` a segment is a byte, and the mixture's probability is exact for any weights. In `word` it is a word; two
    words that a token of some member could lie across are one segment, which depends on `weights` and so cannot be
    scored for a router's (`marginals`). Token matches are cached by passage and member where a member's model is given.

    Args:
        unit: The unit.
        members: The members.
        weights: float64 (members,), summing to 1.
        passages: The passages.
        progress: Called with a member's name, the bytes done and their number.

    Raises:
        UnsupportedError: An engine does not return every token's probability.
        PromptTooLongError: A passage does not fit a context.
    """
    start = time.perf_counter()
    total = sum(len(passage.data) + 1 for passage in passages)
    known: dict[tuple[int, int, bytes], tuple[TokenMatches, float]] = {}
    table: list[list[tuple[TokenMatches, float]]] = [[] for _ in passages]
    for i, member in enumerate(members):
        done = 0
        for number, passage in enumerate(passages):
            # Members that share a model score alike, unless their templates differ.
            key = (id(member.engine), number, passage.prefixes[i].tobytes())
            if key not in known:

                def report(offsets: int, done: int = done, name: str = member.name) -> None:
                    if progress is not None:
                        progress(name, done + offsets, total)

                known[key] = cached_matches(member, passage, i, report), _passage_prompt_bits(member, passage, i)
            table[number].append(known[key])
            done += len(passage.data) + 1
            if progress is not None:
                progress(member.name, done, total)
    names = tuple(member.name for member in members)
    parts = [
        _marginal_passage_scores(unit, names, weights, passage, row)
        for passage, row in zip(passages, table, strict=True)
    ]
    return replace(concatenate(parts), seconds=time.perf_counter() - start)


def _marginal_passage_scores(
    unit: Unit, names: tuple[str, ...], weights: Floats, passage: Passage, row: Sequence[tuple[TokenMatches, float]]
) -> Scores:
    """Return the scores of one passage. row: each member's matches, and bits per byte of the prompt."""
    n, end = len(passage.data), passage.scores_end
    if unit.traits.counts_bytes:
        starts = np.arange(n + end)
        logprobs = np.column_stack([byte_logprobs(matches, end=end) for matches, _ in row])
    else:
        starts, logprobs = word_logprobs([matches for matches, _ in row], passage.data, weights, end=end)
    offset = len(passage.prompt)
    return Scores(
        names,
        unit.name,
        passage.prompt + passage.data,
        starts=starts + offset,
        ends=np.minimum(np.append(starts[1:], n), n) + offset,
        passage_starts=np.zeros(len(starts), dtype=np.int64),
        logprobs=logprobs,
        prompt_bits=np.tile([bits for _, bits in row], (len(starts), 1)),
    )


def cached_matches(
    member: ScoringMember, passage: Passage, index: int, progress: Callable[[int], None] | None = None
) -> TokenMatches:
    """Return a member's token matches at every offset of a passage, from the cache where they are known.

    index: the member's. progress: as for `match_tokens`.
    """
    prefix = passage.prefixes[index]
    if member.model is None:
        return match_tokens(member.engine, prefix, passage.data, progress)
    about = ["every place", member.engine.name, dict(member.engine.details), member.model]
    path = cache.path_of(about, [prefix.tobytes(), passage.data])
    if (cached := cache.get(path, TokenMatches.load)) is not None:
        return cached
    matches = match_tokens(member.engine, prefix, passage.data, progress)
    cache.put(matches.save, path)
    return matches


def _passage_prompt_bits(member: ScoringMember, passage: Passage, index: int) -> float:
    if not passage.prompt:
        return 0.0
    return prompt_bits(member.engine.session().token_logprobs(passage.prefixes[index]), passage.prompt)


def prompt_bits(logprobs: Floats, prompt: bytes) -> float:
    """Return bits per byte of a prompt from the log-probabilities of a member's tokens of it, (n,).

    Without a prompt it is 0, whatever tokens begin the text.
    """
    return float(-logprobs.sum() / np.log(2) / len(prompt)) if prompt else 0.0
