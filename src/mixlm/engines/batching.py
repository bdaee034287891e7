"""Answers to many sessions of one engine: with as few forwards as they fit in, or in threads that wait for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

from mixlm.engines.base import Forward, LogitsRequest, Request, Response, RunAheadHint, SampleRequest, Session
from mixlm.types import Ids, Logits, LogitsRow, TopKFilter


class Part(NamedTuple):
    """What a session lacks for a question: ids behind its cache, how many of the last positions are asked for.

    cut: what of their logits is needed, None for all. ahead: what is probably asked next.
    """

    session: Session
    ids: Ids
    last: int
    cut: TopKFilter | None = None
    ahead: RunAheadHint | None = None


Found = Logits | list[LogitsRow]  # float32 (last, vocab); or `last` rows, where the part has a cut
Run = Callable[[Sequence[Part]], Sequence[Found]]


def respond_in_threads(
    threads: ThreadPoolExecutor,
    answered: Callable[[Sequence[tuple[Session, Request]]], list[Response]],
    requests: Sequence[tuple[Session, Request]],
) -> list[Response]:
    """Answer the questions of different sessions in threads, those of one session in turn; in the order of requests."""
    by_session: dict[int, list[int]] = {}
    for at, (session, _) in enumerate(requests):
        by_session.setdefault(id(session), []).append(at)
    if len(by_session) == 1:
        return answered(requests)
    replies: list[Response] = [None] * len(requests)
    parts = [[requests[at] for at in places] for places in by_session.values()]
    futures = [threads.submit(answered, part) for part in parts]
    wait(futures)  # also those beside one that failed: their sessions must not be asked again before they are done
    for places, future in zip(by_session.values(), futures, strict=True):
        for at, reply in zip(places, future.result(), strict=True):
            replies[at] = reply
    return replies


class _Question(NamedTuple):
    at: int
    ids: Ids
    part: Part


def respond_batched(requests: Sequence[tuple[Session, Request]], run: Run, most: int) -> list[Response]:
    """Answer in the order of the requests. most: tokens of one forward, unless a single question has more."""
    replies: list[Response] = [None] * len(requests)
    waiting = list(range(len(requests)))
    while waiting:
        # A session that is asked several things at once answers them one after the other.
        first = {id(requests[at][0]): at for at in reversed(waiting)}
        now = sorted(first.values())
        waiting = [at for at in waiting if at not in set(now)]
        questions = []
        for at in now:
            session, request = requests[at]
            last = request.last if isinstance(request, LogitsRequest) else 1
            keep = session.rollback(request.ids, last)
            if keep is None:
                replies[at] = session.last_logits
            else:
                cut = request.top_k_filter if isinstance(request, LogitsRequest | SampleRequest) else None
                ahead = request.run_ahead if isinstance(request, SampleRequest) else None
                questions.append(_Question(at, request.ids, Part(session, request.ids[keep:], last, cut, ahead)))
        for question, logits in zip(questions, _run(questions, run, most), strict=True):
            replies[question.at] = logits
        for at in now:
            request = requests[at][1]
            if isinstance(request, SampleRequest):
                replies[at] = request.sample(replies[at][0])
    return replies


def _run(questions: Sequence[_Question], run: Run, most: int) -> list[Found]:
    out: list[Found] = []
    try:
        while len(out) < len(questions):
            batch = _fitting(questions[len(out) :], most)
            start = time.perf_counter()
            found = run([one.part for one in batch])
            per_token = (time.perf_counter() - start) / sum(len(one.part.ids) for one in batch)
            for one, logits in zip(batch, found, strict=True):
                count = len(one.part.ids)
                # A copy: a view would keep the logits of the whole batch in memory.
                own = logits.copy() if len(batch) > 1 else logits
                forward = Forward(count, len(one.ids) - count, per_token * count, len(batch))
                one.part.session.record(one.ids, None if isinstance(own, list) else own, forward)
                out.append(own)
    except BaseException:
        for one in questions[len(out) :]:
            one.part.session.reset()
        raise
    return out


def _fitting(questions: Sequence[_Question], most: int) -> Sequence[_Question]:
    """Return the first questions that fit into one forward; at least one, and no more where its answer may be there."""
    total = 0
    for count, one in enumerate(questions):
        total += len(one.part.ids)
        if count and (total > most or one.part.session.has_run_ahead or questions[0].part.session.has_run_ahead):
            return questions[:count]
    return questions
