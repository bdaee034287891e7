"""What a run of tokens costs beside its tokens: in vLLM in this process, and behind its server.

python -m research.scripts.run_overhead MODEL [--url URL] [--runs N] [--dtype NAME]

A further token of a run costs (T(16) - T(1)) / 15, and a run beside its tokens what T(1) has more; that is with the
engine's own work of catching up with foreign tokens. In this process it is also seen what a run of one token takes
outside vLLM's steps. Medians, and the best of N: other programs may use the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mixlm.engines import EngineSpec, load
from mixlm.engines.base import Engine
from mixlm.engines.remote.engine import RemoteEngine
from mixlm.engines.requests import GenerateRequest
from mixlm.types import Sampling
from research.scripts.measuring import timed_calls

LENGTHS = (1, 2, 4, 8, 16)
FOREIGN = 3  # tokens of other members between two runs
SAMPLING = Sampling()


def texts(engine: Engine, runs: int, length: int) -> Iterator[tuple[float, int]]:
    """Write runs of one length into a text, with foreign tokens between them; the time of each."""
    rng = np.random.default_rng(0)
    drawable = np.flatnonzero([bool(token) for token in engine.vocabulary.tokens])
    banned = np.flatnonzero([not token for token in engine.vocabulary.tokens])
    session, ids = engine.session(), rng.choice(drawable, size=64)
    for number in range(runs):
        if len(ids) > 320:
            ids = ids[:64]
        run = GenerateRequest(0, ids, length, SAMPLING, banned, number)
        start = time.perf_counter()
        written = session.generate(run)
        yield time.perf_counter() - start, len(written.ids)
        ids = np.concatenate([ids, written.ids, rng.choice(drawable, size=FOREIGN)])


def show(path: str, times: dict[int, list[float]]) -> None:
    """Print what a run costs beside its tokens, and a token of runs of several lengths."""
    first, last = LENGTHS[0], LENGTHS[-1]
    for name, best in (("median", statistics.median), ("best", min)):
        whole = {length: 1000 * best(seconds[2:]) for length, seconds in times.items()}
        further = (whole[last] - whole[first]) / (last - first)
        each = ", ".join(f"{length}: {whole[length] / length:.2f}" for length in LENGTHS)
        print(f"{path}, {name}: a run beside its tokens {whole[first] - further:.2f} ms; ms a token in runs of {each}")


def measured(engine: Engine, runs: int) -> dict[int, list[float]]:
    """Return the seconds of whole runs, by their length. Those that ended early are left out."""
    return {
        length: [seconds for seconds, count in texts(engine, runs, length) if count == length] for length in LENGTHS
    }


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("model")
    options.add_argument("--url")
    options.add_argument("--runs", type=int, default=40)
    options.add_argument("--dtype", default="auto")
    arguments = options.parse_args()
    if arguments.url is None:
        engine = load(EngineSpec(arguments.model, "", arguments.dtype, engine="vllm", context=512))
        show("in this process", measured(engine, arguments.runs))
        from vllm.v1.engine.core_client import InprocClient  # vLLM reads its settings when it is imported

        outside = []
        with timed_calls(InprocClient, "get_output") as steps:
            for seconds, _ in texts(engine, arguments.runs, 1):
                outside.append(1000 * (seconds - sum(steps)))
                steps.clear()
        print(f"outside vLLM's steps, one token: {statistics.median(outside):.2f} ms, best {min(outside):.2f}")
        return
    remote = RemoteEngine(EngineSpec(arguments.url, ""), Path(arguments.model))
    server = remote.replicas[0].server
    assert server is not None
    if server.sessions is not None:
        show("sessions", measured(remote, arguments.runs))
        server.sessions = None
    show("completions", measured(remote, arguments.runs))


if __name__ == "__main__":
    main()
