"""One member's scores of given texts: the log-probability of each of its own tokens, and what a router observes of it.

Short texts are scored several at a time. Answers to one question, which follow one another, have their prompt in
common: it runs once, and the answers one by one after it, beside those to other questions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
import numpy.typing as npt

from mixlm.binding import LoadedMember
from mixlm.engines import Engine
from mixlm.engines.base import Session
from mixlm.engines.requests import LogitsRequest
from mixlm.engines.topk_only import TopKOnlySession
from mixlm.routing.base import Observation, Observes
from mixlm.routing.observation import ObservedStates, observation
from mixlm.scoring import cache
from mixlm.scoring.passages import Passage
from mixlm.scoring.scores import Scores, concatenate
from mixlm.terminal import Progress
from mixlm.types import Floats, Ids

_PROMPTS = 8  # that run together, with their answers
_SHORTEST_PROMPT = 8  # tokens; a shorter one is not worth sharing
_POSITIONS = 128  # whose logits are in memory at once

EncodedPassage = tuple[Ids, npt.NDArray[np.int64]]  # all ids of a passage, and where the scored ones end in bytes


def member_scores(
    member: LoadedMember,
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

    def compute() -> cache.Arrays:
        start = time.perf_counter()
        logprobs: list[Floats] = []
        bits: list[float] = []
        for passage, (prompt, own) in zip(passages, _logprobs(member.engine, passages, encoded), strict=True):
            logprobs.append(own)
            bits.append(prompt_bits(prompt, passage.prompt))
            if progress is not None and len(bits) < len(passages):
                progress(member.name, len(bits), len(passages))
        seconds = np.array(time.perf_counter() - start)
        return {"logprobs": np.concatenate(logprobs), "prompt_bits": np.array(bits), "seconds": seconds}

    starts = [
        np.concatenate([[0], bounds if passage.scores_end else bounds[:-1]])
        for passage, (_, bounds) in zip(passages, encoded, strict=True)
    ]
    lengths = {"logprobs": sum(map(len, starts)), "prompt_bits": len(passages)}
    known = cache.cached(["tokens"], member.engine, model, _key(passages, encoded), compute, lengths)
    if progress is not None:
        progress(member.name, len(passages), len(passages))
    logprobs = np.split(known["logprobs"], np.cumsum([len(own) for own in starts])[:-1])
    parts = [
        Scores.of_passage((member.engine.name,), "token", passage, own, values[:, None], bits)
        for passage, own, values, bits in zip(passages, starts, logprobs, known["prompt_bits"], strict=True)
    ]
    return replace(concatenate(parts), seconds=float(known["seconds"]))


def observed_states(
    member: LoadedMember,
    observes: Observes,
    passages: Sequence[Passage],
    encoded: Sequence[EncodedPassage],
    model: str | None = None,
    progress: Progress | None = None,
) -> ObservedStates:
    """Return what is observed in front of each scored token of passages, and of an end that is scored.

    It is one more pass of the member. observes: what is observed; the rest as for `member_scores`.
    """

    def compute() -> cache.Arrays:
        parts = []
        for passage, (ids, bounds) in zip(passages, encoded, strict=True):
            length, session = len(ids) - len(bounds), member.engine.session()
            parts.append(passage_states(session, observes, ids, length, member.name, end=passage.scores_end))
            if progress is not None:
                progress(f"observing {member.name}", len(parts), len(passages))
        return ObservedStates.concatenate(parts).arrays()

    what = ["observed", observes.top_k, observes.hidden]
    following = [
        np.append(ids[len(ids) - len(bounds) :], [-1] * passage.scores_end)
        for passage, (ids, bounds) in zip(passages, encoded, strict=True)
    ]
    lengths = dict.fromkeys(("ids", "logprobs"), sum(map(len, following)))
    known = cache.cached(what, member.engine, model, _key(passages, encoded), compute, lengths)
    return ObservedStates(member.name, **known, following=np.concatenate(following).astype(np.int64))


def passage_states(
    session: Session, observes: Observes, ids: Ids, first: int, name: str, *, end: bool = False
) -> ObservedStates:
    """Return what is observed after each prefix of ids, from `first` tokens on; with `end` after all of them too."""
    if observes.hidden:
        session.keep_hidden()
    stop = len(ids) + end
    observations: list[Observation] = []
    masses: list[float] = []
    weighed = observes.top_k > 0 and not isinstance(session, TopKOnlySession)  # whose probabilities are not known
    for start in range(first, stop, _POSITIONS):
        count = min(_POSITIONS, stop - start)
        rows = session.logits(ids[: start + count - 1], last=count)
        hidden = session.hidden_states if observes.hidden else None
        states = [None] * count if hidden is None else hidden[-count:].copy()
        for row, state in zip(rows, states, strict=True):
            seen = observation(row, observes, state)
            observations.append(seen)
            if weighed:
                likely = row[seen.ids[seen.ids >= 0]]
                masses.append(float(np.exp(likely - session.log_normalizers(row[None])).sum()))
    return replace(ObservedStates.of(name, observations), mass=np.array(masses) if weighed else None)


def _key(passages: Sequence[Passage], encoded: Sequence[EncodedPassage]) -> Iterator[bytes]:
    """Yield what scores depend on, beside the model: the texts, a member's ids of them, and what of these is scored."""
    for passage, (ids, bounds) in zip(passages, encoded, strict=True):
        yield from (ids.tobytes(), bounds.tobytes(), passage.prompt, b"ends" if passage.scores_end else b"")


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
    """Yield groups of passages, those of a group after one prompt; several together where all of them are short."""
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


def _end_logprob(engine: Engine, session: Session, ids: Ids) -> float:
    """Return the natural log-probability that a text ends after ids."""
    ends = sorted(engine.vocabulary.end_ids)
    if not ends:
        return -math.inf
    if engine.top_k_limit is not None:  # it scores one token after another, and gives no whole distribution
        return float(np.logaddexp.reduce([session.token_logprobs(np.append(ids, end))[-1] for end in ends]))
    values = session.logits(ids)[0].astype(np.float64)
    return float(np.logaddexp.reduce(values[ends]) - np.logaddexp.reduce(values))


def prompt_bits(logprobs: Floats, prompt: bytes) -> float:
    """Return bits per byte of a prompt from the log-probabilities of a member's tokens of it, (n,).

    Without a prompt it is 0, whatever tokens begin the text.
    """
    return float(-logprobs.sum() / np.log(2) / len(prompt)) if prompt else 0.0
