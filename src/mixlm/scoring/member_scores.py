"""One member's scores of given texts: the log-probability of each of its own tokens.

Short texts are scored several at a time. Answers to one question, which follow one another, have their prompt in
common: it runs once, and the answers one after the other behind it, beside those to other questions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mixlm.binding import MemberSpec
from mixlm.engines import Engine
from mixlm.engines.base import Session
from mixlm.engines.requests import LogitsRequest
from mixlm.scoring import cache
from mixlm.scoring.marginal_scores import prompt_bits
from mixlm.scoring.observed import EncodedPassage
from mixlm.scoring.passages import PASSAGE_BYTES, Passage
from mixlm.scoring.scores import Scores, concatenate
from mixlm.terminal import Progress
from mixlm.types import Floats, Ids

_PROMPTS = 8  # that run together, with their answers
_SHORTEST_PROMPT = 8  # tokens; a shorter one is not worth sharing
_POSITIONS = 128  # whose logits are in memory at once


def member_scores(
    member: MemberSpec,
    passages: Sequence[Passage],
    encoded: Sequence[EncodedPassage],
    model: str | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Return one member's scores of its own tokens, from the cache where they are known.

    Args:
        member: The member.
        passages: What is scored.
        encoded: The member's ids of each passage.
        model: The model's identity, to cache the scores; None to cache nothing.
        progress: Called with the member's name, the passages done and their number.
    """
    engine = member.engine
    path = _cache_path(engine, model, encoded, passages) if model is not None else None
    if path is not None and (cached := cache.get(path, Scores.load)) is not None:
        if progress is not None:
            progress(member.name, len(passages), len(passages))
        return cached
    start = time.perf_counter()
    parts: list[Scores] = []
    for passage, (_, bounds), (prompt, own) in zip(
        passages, encoded, _logprobs(engine, passages, encoded), strict=True
    ):
        parts.append(_passage_scores(engine.name, passage, bounds, own, prompt_bits(prompt, passage.prompt)))
        if progress is not None:
            progress(member.name, len(parts), len(passages))
    scores = replace(concatenate(parts), seconds=time.perf_counter() - start)
    if path is not None:
        cache.put(scores.save, path)
    return scores


def _logprobs(
    engine: Engine, passages: Sequence[Passage], encoded: Sequence[EncodedPassage]
) -> Iterator[tuple[Floats, Floats]]:
    """Yield the log-probabilities of each passage's prompt, and of its tokens and its end where that is scored."""
    lengths = [len(ids) - len(bounds) for ids, bounds in encoded]
    for groups in _batches(encoded, lengths):
        sessions = [engine.session() for _ in groups]
        prompts: dict[int, Floats] = {}
        out: dict[int, tuple[Floats, Floats]] = {}
        for number in range(max(map(len, groups))):
            step = [(g, group[number]) for g, group in enumerate(groups) if number < len(group)]
            texts = [(sessions[g], encoded[i][0], lengths[i] if number else 1) for g, i in step]
            for (g, i), logprobs in zip(step, _token_logprobs(engine, texts), strict=True):
                ids, bounds = encoded[i]
                prompt = prompts.setdefault(g, logprobs[: lengths[i] - 1])
                own = logprobs[-len(bounds) :]
                if passages[i].scores_end:
                    own = np.append(own, _end_logprob(engine, sessions[g], ids))
                out[i] = prompt, own
        yield from (out[i] for group in groups for i in group)


def _batches(encoded: Sequence[EncodedPassage], lengths: Sequence[int]) -> Iterator[list[list[int]]]:
    """Yield groups of passages, those of a group behind one prompt; several together where all of them are short."""
    prompts = [
        ids[:length].tobytes() if length >= _SHORTEST_PROMPT else number
        for number, ((ids, _), length) in enumerate(zip(encoded, lengths, strict=True))
    ]
    batch: list[list[int]] = []
    for _, numbers in groupby(range(len(encoded)), key=prompts.__getitem__):
        group = list(numbers)
        alone = any(len(encoded[i][0]) > _POSITIONS for i in group)
        if batch and (alone or len(batch) == _PROMPTS):
            yield batch
            batch = []
        batch.append(group)
        if alone:
            yield batch
            batch = []
    if batch:
        yield batch


def _token_logprobs(engine: Engine, texts: Sequence[tuple[Session, Ids, int]]) -> list[Floats]:
    """Return what `Session.token_logprobs` returns of ids, from a first one on: of several sessions, in few passes."""
    if engine.top_k_limit is not None:
        return [session.token_logprobs(ids, first) for session, ids, first in texts]
    out: list[Floats] = []
    while len(out) < len(texts):
        counts = np.cumsum([len(ids) - first + 1 for _, ids, first in texts[len(out) :]])
        batch = texts[len(out) :][: int(np.searchsorted(counts, _POSITIONS, side="right"))]
        if not batch:
            session, ids, first = texts[len(out)]
            out.append(session.token_logprobs(ids, first))
            continue
        requests = [(session, LogitsRequest(0, ids, last=len(ids) - first + 1)) for session, ids, first in batch]
        for (session, ids, first), logits in zip(batch, engine.respond(requests), strict=True):
            targets = ids[first:]
            out.append(logits[np.arange(len(targets)), targets] - session.log_normalizers(logits[: len(targets)]))
    return out


def _passage_scores(
    name: str, passage: Passage, bounds: npt.NDArray[np.int64], logprobs: npt.NDArray[np.float64], bits: float
) -> Scores:
    """Return the scores of one passage.

    bounds: where its tokens end, in bytes. logprobs: of its tokens, and of its end where that is scored. bits: of its
    prompt, per byte.
    """
    starts, ends = np.concatenate([[0], bounds[:-1]]), bounds
    if passage.scores_end:
        starts, ends = np.append(starts, bounds[-1]), np.append(ends, bounds[-1])
    return Scores(
        (name,),
        "token",
        passage.prompt + passage.data,
        starts=starts + len(passage.prompt),
        ends=ends + len(passage.prompt),
        passage_starts=np.zeros(len(ends), dtype=np.int64),
        logprobs=logprobs[:, None],
        prompt_bits=np.full((len(ends), 1), bits),
    )


def _end_logprob(engine: Engine, session: Session, ids: Ids) -> float:
    """Return the natural log-probability that a text ends after ids."""
    ends = sorted(engine.vocabulary.end_ids)
    if not ends:
        return -math.inf
    if engine.top_k_limit is not None:  # it scores one token after another, and gives no whole distribution
        return float(np.logaddexp.reduce([session.token_logprobs(np.append(ids, end))[-1] for end in ends]))
    values = session.logits(ids)[0].astype(np.float64)
    return float(np.logaddexp.reduce(values[ends]) - np.logaddexp.reduce(values))


def _cache_path(
    engine: Engine,
    model: str,
    encoded: Sequence[EncodedPassage],
    passages: Sequence[Passage],
) -> Path:
    """Return a cache file for a member's scores of these passages: a hash of the model, the text and its split."""
    parts = [
        part
        for (ids, _), passage in zip(encoded, passages, strict=True)
        for part in (ids.tobytes(), passage.prompt, passage.data, b"ends" if passage.scores_end else b"")
    ]
    return cache.path_of([PASSAGE_BYTES, engine.name, dict(engine.details), model], parts)
