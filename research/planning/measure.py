"""Costs of an ensemble's members as they are: forwards of one and several sequences, and mixlm's own work."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from mixlm.engines.base import Engine, Session
from mixlm.engines.requests import LogitsRequest
from mixlm.ensemble import Ensemble
from mixlm.types import Ids
from research.planning.costs import MemberCost, PlanCosts, RouterCost

_AT_ONCE = (1, 2, 4, 8, 16, 32)
_TOKENS = (2, 4, 8, 16, 32)
_TEXT = " One morning the river had risen over the fields, and nobody knew how far the road went."


def measure(
    ensemble: Ensemble, *, max_batch: int = 16, repeats: int = 3, progress: Callable[[str], None] | None = None
) -> PlanCosts:
    """Measure what runs of each member cost, with up to `max_batch` sequences at once, and what mixlm adds to each.

    Takes about a hundred forwards of each member. Members that are engines of one device take turns on it in a plan;
    such as are behind servers have machines of their own.
    """
    devices = [str(member.engine.device) for member in ensemble.members]
    options = _options(ensemble)
    writes = [member.samples_itself for member in ensemble.context(ensemble.settings(**options)).members]
    members = {}
    weights = ensemble.weights.tolist()
    for spec, device, weight, runs in zip(ensemble.members, devices, weights, writes, strict=True):
        if progress is not None:
            progress(f"measuring {spec.name}")
        shared = devices.count(device) > 1
        forward, sequence, token = fitted(_timed(spec.engine, max_batch, repeats))
        members[spec.name] = MemberCost(
            weight=weight,
            forward=forward,
            sequence=sequence,
            token=token,
            slots=max_batch,
            runs=runs,
            device=device if shared else None,
        )
    if progress is not None:
        progress("measuring mixlm")
    return PlanCosts(members=members, router=_router(ensemble, options, members))


def _options(ensemble: Ensemble) -> dict[str, Any]:
    """Return the options of a completion that any engine can write."""
    partial = any(member.engine.top_k_limit is not None for member in ensemble.members)
    return {"ignore_end": True, "seed": 1, **({"top_k": 10} if partial else {})}


def fitted(timed: Sequence[tuple[int, int, float]]) -> tuple[float, float, float]:
    """Fit forward + sequence·(n - 1) + token·(tokens - n) to (n, tokens, seconds), by least relative squares.

    Costs below 0, which noise makes of small ones, are taken for 0.
    """
    rows = np.array([[1.0, n - 1, tokens - n] for n, tokens, _ in timed])
    seconds = np.array([duration for _, _, duration in timed])
    from scipy.optimize import nnls

    solution, _ = nnls(rows / seconds[:, None], np.ones(len(seconds)))
    forward, sequence, token = (float(cost) for cost in solution)
    return forward, sequence, token


def _timed(engine: Engine, max_batch: int, repeats: int) -> list[tuple[int, int, float]]:
    """Return (sequences, tokens, seconds): each the median of `repeats`."""
    text = engine.encoder.encode((_TEXT * 40).encode()).ids
    ids = np.array(text, dtype=np.int64)
    start = min(48, engine.context_length // 4)
    timings = []
    sessions = [engine.session() for _ in range(max_batch)]
    reach = [start + i for i in range(max_batch)]  # no two sequences are alike

    def run(batch: Sequence[int], tokens: int) -> float:
        requests: list[tuple[Session, LogitsRequest]] = []
        for i in batch:
            reach[i] += tokens
            requests.append((sessions[i], LogitsRequest(0, _turned(ids, i)[: reach[i]])))
        before, processor = time.perf_counter(), time.process_time()
        engine.respond(requests)
        seconds, used = time.perf_counter() - before, time.process_time() - processor
        # What this process did for a server's member is not the server's; for others it is the forward itself.
        return max(seconds - used, seconds / 10) if engine.asynchronous else seconds

    run(range(max_batch), 1)
    for n in [size for size in _AT_ONCE if size <= max_batch]:
        timings.append((n, n, median(run(range(n), 1) for _ in range(repeats))))
    for tokens in _TOKENS:
        if max(reach) + repeats * tokens < min(engine.context_length, len(ids)):
            timings.append((1, tokens, median(run([0], tokens) for _ in range(repeats))))
    for session in sessions:
        session.reset()
    return timings


def _turned(ids: Ids, by: int) -> Ids:
    return np.roll(ids, -by * 7)


def _router(
    ensemble: Ensemble, options: dict[str, Any], members: Mapping[str, MemberCost], tokens: int = 48
) -> RouterCost:
    """Measure one completion: the time outside forwards or, with servers, of this process; per run."""
    served = all(member.engine.asynchronous for member in ensemble.members)
    stream = ensemble.stream("Tell a story.", max_tokens=tokens, **options)
    first = next(stream)
    start, processor = time.perf_counter(), time.process_time()
    before = sum(session.stats.seconds for session in stream.sessions)
    written = [first.member, *(token.member for token in stream)]
    used, seconds = time.process_time() - processor, time.perf_counter() - start
    outside = seconds - sum(session.stats.seconds for session in stream.sessions) + before
    # The first run was over when the clock was started.
    runs = sum(last != now or not members[now].runs for last, now in pairwise(written))
    return RouterCost(seconds=(used if served else max(outside, 0.0)) / max(runs, 1))
