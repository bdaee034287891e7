"""Requests of many sessions on one engine: in as few forward passes as possible, or one thread a session."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

from mixlm.engines.base import Session
from mixlm.engines.requests import Forward, ForwardRequest, Request, Response, RunAheadHint, to_response
from mixlm.types import Ids, Logits, LogitsRow, TopKFilter


class SequenceInput(NamedTuple):
    """One sequence's input to a forward pass: the ids after the cached ones, and how many of the last positions count.

    top_k_filter: which of their logits are needed, None for all. run_ahead: what will probably be requested next.
    """

    session: Session
    ids: Ids
    last: int
    top_k_filter: TopKFilter | None = None
    run_ahead: RunAheadHint | None = None


SequenceOutput = Logits | list[LogitsRow]  # float32 (last, vocab); or `last` rows for an input with a filter
RunBatch = Callable[[Sequence[SequenceInput]], Sequence[SequenceOutput]]


def respond_in_threads(
    threads: ThreadPoolExecutor,
    respond: Callable[[Sequence[tuple[Session, Request]]], list[Response]],
    requests: Sequence[tuple[Session, Request]],
) -> list[Response]:
    """Serve different sessions in threads, and each session's requests in turn. Responses in the order of requests."""
    by_session: dict[int, list[int]] = {}
    for index, (session, _) in enumerate(requests):
        by_session.setdefault(id(session), []).append(index)
    if len(by_session) == 1:
        return respond(requests)
    futures = [threads.submit(respond, [requests[index] for index in group]) for group in by_session.values()]
    wait(futures)  # also those beside one that failed: no session may get a request before it is done
    responses: list[Response] = [None] * len(requests)
    for group, future in zip(by_session.values(), futures, strict=True):
        for index, response in zip(group, future.result(), strict=True):
            responses[index] = response
    return responses


def respond_batched(
    requests: Sequence[tuple[Session, ForwardRequest]], run: RunBatch, max_tokens: int
) -> list[Response]:
    """Serve requests in as few forward passes as possible. Responses in the order of requests.

    Args:
        requests: of any sessions.
        run: runs one forward pass.
        max_tokens: of one forward pass, unless a single request has more.
    """
    responses: list[Response] = [None] * len(requests)
    waiting = list(range(len(requests)))
    while waiting:
        # A session with several requests serves them one after the other.
        first = {id(requests[index][0]): index for index in reversed(waiting)}
        current = sorted(first.values())
        waiting = [index for index in waiting if index not in set(current)]
        outputs: dict[int, SequenceOutput] = {}
        missing: dict[int, SequenceInput] = {}
        for index in current:
            session, request = requests[index]
            if request.hidden:
                session.keep_hidden()
            cached = session.rollback(request.ids, request.last)
            if cached is None:
                outputs[index] = session.last_logits
            else:
                missing[index] = SequenceInput(
                    session, request.ids[cached:], request.last, request.top_k_filter, request.run_ahead
                )
        try:
            while missing:
                batch = _first_batch(missing, max_tokens)
                start = time.perf_counter()
                batch_outputs = run([missing[index] for index in batch])
                seconds = time.perf_counter() - start
                total = sum(len(missing[index].ids) for index in batch)
                for index, output in zip(batch, batch_outputs, strict=True):
                    session, request = requests[index]
                    count = len(missing[index].ids)
                    # A copy: a view would keep the logits of the whole batch in memory.
                    outputs[index] = rows = output.copy() if len(batch) > 1 else output
                    forward = Forward(count, len(request.ids) - count, seconds / total * count, len(batch))
                    session.record(request.ids, None if isinstance(rows, list) else rows, forward)
                    del missing[index]
        except BaseException:
            for rest in missing.values():
                rest.session.reset()
            raise
        for index in current:
            session, request = requests[index]
            responses[index] = to_response(request, outputs[index], session.hidden_states)
    return responses


def _first_batch(inputs: Mapping[int, SequenceInput], max_tokens: int) -> list[int]:
    """Return the first that fit into one forward pass, at least one; a session that has run ahead is alone."""
    batch: list[int] = []
    total, ran_ahead = 0, False
    for index, sequence in inputs.items():
        total += len(sequence.ids)
        ran_ahead = ran_ahead or sequence.session.has_run_ahead
        if batch and (total > max_tokens or ran_ahead):
            break
        batch.append(index)
    return batch
