"""Requests of many sessions on one engine: in as few forward passes as possible, or one thread a session."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

from mixlm.engines.base import Session
from mixlm.engines.requests import Forward, ForwardRequest, Request, Response, RunAheadHint, to_response
from mixlm.types import Ids, Logits, LogitsRow, TopKFilter


class SequenceInput(NamedTuple):
    """One sequence's input to a forward pass: the ids behind its KV cache, and how many of the last positions count.

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


class _BatchItem(NamedTuple):
    """A request's position, all its ids, and what has to run for it."""

    position: int
    ids: Ids
    input: SequenceInput


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
    outputs: dict[int, SequenceOutput] = {}
    while waiting:
        # A session with several requests serves them one after the other.
        first = {id(requests[index][0]): index for index in reversed(waiting)}
        current = sorted(first.values())
        waiting = [index for index in waiting if index not in set(current)]
        items = []
        for index in current:
            session, request = requests[index]
            if request.hidden:
                session.keep_hidden()
            cached = session.rollback(request.ids, request.last)
            if cached is None:
                outputs[index] = session.last_logits
            else:
                rest = SequenceInput(
                    session, request.ids[cached:], request.last, request.top_k_filter, request.run_ahead
                )
                items.append(_BatchItem(index, request.ids, rest))
        for item, output in zip(items, _run_items(items, run, max_tokens), strict=True):
            outputs[item.position] = output
        for index in current:
            session, request = requests[index]
            responses[index] = to_response(request, outputs[index], session.hidden_states)
    return responses


def _run_items(items: Sequence[_BatchItem], run: RunBatch, max_tokens: int) -> list[SequenceOutput]:
    outputs: list[SequenceOutput] = []
    try:
        while len(outputs) < len(items):
            batch = _first_batch(items[len(outputs) :], max_tokens)
            start = time.perf_counter()
            batch_outputs = run([item.input for item in batch])
            seconds_per_token = (time.perf_counter() - start) / sum(len(item.input.ids) for item in batch)
            for item, output in zip(batch, batch_outputs, strict=True):
                count = len(item.input.ids)
                # A copy: a view would keep the logits of the whole batch in memory.
                rows = output.copy() if len(batch) > 1 else output
                forward = Forward(count, len(item.ids) - count, seconds_per_token * count, len(batch))
                item.input.session.record(item.ids, None if isinstance(rows, list) else rows, forward)
                outputs.append(rows)
    except BaseException:
        for item in items[len(outputs) :]:
            item.input.session.reset()
        raise
    return outputs


def _first_batch(items: Sequence[_BatchItem], max_tokens: int) -> Sequence[_BatchItem]:
    """Return the first items that fit into one forward pass, at least one; a session that has run ahead is alone."""
    total = 0
    for count, item in enumerate(items):
        total += len(item.input.ids)
        alone = item.input.session.has_run_ahead or items[0].input.session.has_run_ahead
        if count and (total > max_tokens or alone):
            return items[:count]
    return items
