"""Exact scores of given text in the units `word` and `byte`: each member's token matches, summed over tokenizations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np

from mixlm.engines.base import Engine
from mixlm.ensemble import Ensemble
from mixlm.scoring import cache
from mixlm.scoring.marginals import TokenMatches, byte_logprobs, match_tokens, word_logprobs
from mixlm.scoring.member_scores import prompt_bits
from mixlm.scoring.passages import Passage
from mixlm.scoring.scores import Scores, concatenate
from mixlm.terminal import Progress
from mixlm.types import Ids


def marginal_scores(
    ensemble: Ensemble,
    passages: Sequence[Passage],
    identities: Sequence[str | None] | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score passages by the distribution of `word` or `byte`.

    In `byte` a segment is a byte, and the mixture's probability is exact for any weights. In `word` it is a word; two
    words that a token of some member could lie across are one segment, which depends on the ensemble's weights and so
    cannot be scored for a router's (`marginals`). Arguments as for `score`; token matches are cached by passage and
    member.

    Raises:
        UnsupportedError: An engine does not return every token's probability.
        PromptTooLongError: A passage does not fit a context.
    """
    start = time.perf_counter()
    total = sum(len(passage.data) + 1 for passage in passages)
    known: dict[tuple[int, int, bytes], tuple[TokenMatches, float]] = {}
    table: list[list[tuple[TokenMatches, float]]] = [[] for _ in passages]
    for i, member in enumerate(ensemble.members):
        model, done = identities[i] if identities else None, 0
        for number, passage in enumerate(passages):
            # Members that share a model score alike, unless their templates differ.
            prefix = passage.prefixes[i]
            key = (id(member.engine), number, prefix.tobytes())
            if key not in known:

                def report(offsets: int, done: int = done, name: str = member.name) -> None:
                    if progress is not None:
                        progress(name, done + offsets, total)

                bits = 0.0
                if passage.prompt:
                    bits = prompt_bits(member.engine.session().token_logprobs(prefix), passage.prompt)
                known[key] = cached_matches(member.engine, prefix, passage.data, model, report), bits
            table[number].append(known[key])
            done += len(passage.data) + 1
            if progress is not None:
                progress(member.name, done, total)
    parts = [_passage_scores(ensemble, passage, row) for passage, row in zip(passages, table, strict=True)]
    return replace(concatenate(parts), seconds=time.perf_counter() - start)


def _passage_scores(ensemble: Ensemble, passage: Passage, row: Sequence[tuple[TokenMatches, float]]) -> Scores:
    """Return the scores of one passage. row: each member's matches, and bits per byte of the prompt."""
    matches, bits = zip(*row, strict=True)
    end = passage.scores_end
    if ensemble.unit.traits.counts_bytes:
        starts = np.arange(len(passage.data) + end)
        logprobs = np.column_stack([byte_logprobs(own, end=end) for own in matches])
    else:
        starts, logprobs = word_logprobs(matches, passage.data, ensemble.weights, end=end)
    return Scores.of_passage(ensemble.names, ensemble.unit.name, passage, starts, logprobs, np.array(bits))


def cached_matches(
    engine: Engine, prefix: Ids, data: bytes, model: str | None, progress: Callable[[int], None] | None = None
) -> TokenMatches:
    """Return what `match_tokens` does, from the cache where it is known. model: the model's identity, None for none."""

    def match() -> cache.Arrays:
        return asdict(match_tokens(engine, prefix, data, progress))

    return TokenMatches(**cache.cached(["matches"], engine, model, [prefix.tobytes(), data], match))
