"""What a run of tokens costs outside the engine that computes them: in vLLM in this process, and behind its server.

python scripts/run_overhead.py MODEL [--url URL] [--runs N] [--dtype NAME]

In this process: the time of a run as the ensemble sees it, less what vLLM's engine spends in its steps meanwhile.
Behind a server, whose steps are not seen: less what the steps of the same runs took in this process. There vLLM reads
what fills no block of its cache again, and in a session it does not, so sessions come out a little too well.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from mixlm.engines import EngineSpec, load
from mixlm.engines.base import Engine, Run
from mixlm.records import Sampling

LENGTHS = (1, 2, 4, 8, 16)
FOREIGN = 3  # tokens of other members between two runs
SAMPLING = Sampling()


@contextmanager
def stepped() -> Iterator[list[float]]:
    """Note the time that vLLM's engine spends in steps, in this process."""
    from vllm.v1.engine.core_client import InprocClient  # noqa: PLC0415 - vLLM reads its settings when it is imported

    seconds, output = [], InprocClient.get_output

    def timed(self):
        start = time.perf_counter()
        try:
            return output(self)
        finally:
            seconds.append(time.perf_counter() - start)

    InprocClient.get_output = timed
    try:
        yield seconds
    finally:
        InprocClient.get_output = output


def texts(engine: Engine, runs: int, length: int) -> Iterator[tuple[float, int]]:
    """Write runs of one length into a text, with foreign tokens between them; the time of each."""
    rng = np.random.default_rng(0)
    drawable = np.flatnonzero([bool(one) for one in engine.vocabulary.tokens])
    banned = np.flatnonzero([not one for one in engine.vocabulary.tokens])
    session, ids = engine.session(), rng.choice(drawable, size=64)
    for number in range(runs):
        if len(ids) > 320:
            ids = ids[:64]
        run = Run(0, ids, length, SAMPLING, banned, number)
        start = time.perf_counter()
        written = session.write(run)
        yield time.perf_counter() - start, len(written.ids)
        ids = np.concatenate([ids, written.ids, rng.choice(drawable, size=FOREIGN)])


def figures(values: list[float]) -> str:
    return f"{1000 * statistics.median(values):6.2f} ms (best {1000 * min(values):.2f})"


def inside(engine: Engine, runs: int) -> dict[int, float]:
    """Print what is spent in this process, and return the median seconds of the steps of a run, by its length."""
    found = {}
    with stepped() as steps:
        for length in LENGTHS:
            outside, computing, each = [], [], []
            for seconds, count in texts(engine, runs, length):
                if count == length:
                    outside.append(seconds - sum(steps))
                    computing.append(sum(steps))
                    each.append(seconds / count)
                steps.clear()
            found[length] = statistics.median(computing[2:])
            print(f"in this process, {length:2d} tokens: outside {figures(outside[2:])}, a token {figures(each[2:])}")
    return found


def behind(engine: Engine, runs: int, path: str, steps: dict[int, float]) -> None:
    """Print what is spent on the way to a server and in it, steps aside."""
    for length in LENGTHS:
        whole = [seconds for seconds, count in texts(engine, runs, length) if count == length][2:]
        outside, each = [one - steps[length] for one in whole], [one / length for one in whole]
        print(f"{path}, {length:2d} tokens: outside {figures(outside)}, a token {figures(each)}")


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("model")
    options.add_argument("--url")
    options.add_argument("--runs", type=int, default=40)
    options.add_argument("--dtype", default="auto")
    given = options.parse_args()
    steps = inside(load(EngineSpec(given.model, "", given.dtype, engine="vllm", context=1024)), given.runs)
    if given.url is None:
        return
    engine = load(EngineSpec(given.url, "", tokenizer=given.model))
    print(engine.details)
    if engine.line is not None:
        behind(engine, given.runs, "sessions", steps)
        engine.line = None
    behind(engine, given.runs, "completions", steps)


if __name__ == "__main__":
    main()
