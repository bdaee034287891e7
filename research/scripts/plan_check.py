"""What `python -m research.planning` predicts beside what two real servers of llama.cpp then do, at several rates.

python -m research.scripts.plan_check [--models A,B] [--rates R,R] [--replies N] [--tokens N]
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np

from mixlm.binding import LoadedMember
from mixlm.engines import EngineSpec, load
from mixlm.ensemble import Ensemble
from mixlm.generation.scheduler import Scheduler
from mixlm.models.gguf import find_gguf
from research.planning.costs import PlanCosts
from research.planning.measure import measure
from research.planning.plan import expected
from research.planning.simulation import Workload, quantiles
from research.scripts.server_speed import started

AT_ONCE = 16


def seen(ensemble: Ensemble, rate: float, count: int, tokens: int, turn: int):
    """Let completions arrive at random times; return tokens/s, and seconds to first and last tokens of each."""
    come = np.cumsum(np.random.default_rng(turn).exponential(1 / rate, count))
    scheduler, coming, arrival, ends = Scheduler(AT_ONCE), 0, {}, {}
    first: dict = {}
    wrote = []
    start = time.perf_counter()
    while len(ends) < count:
        now = time.perf_counter() - start
        while coming < count and come[coming] <= now:
            settings = ensemble.settings(max_tokens=tokens, ignore_end=True, top_k=40, seed=coming)
            prompts = ensemble.encode_prompt(f"{turn}.{coming}: write a story about the number {coming}.", settings)
            stream = ensemble.context(settings).start(prompts)
            arrival[stream] = come[coming]
            scheduler.add(stream)
            coming += 1
        if scheduler.idle:
            time.sleep(max(come[coming] - now, 0) if coming < count else 0)
            continue
        for stream in scheduler.step():
            now = time.perf_counter() - start
            if stream.ready:
                first.setdefault(stream, now - arrival[stream])
                wrote += [now] * len(stream.ready)
                stream.ready.clear()
            if stream.finished:
                ends[stream] = now - arrival[stream]
    last = come[-1]
    within = sum(last / 5 < seconds <= last for seconds in wrote)
    return within / (0.8 * last), np.array(list(first.values())), np.array(list(ends.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="smollm2-135m,smollm2-135m")
    parser.add_argument("--rates", default="0.25,0.5,1")
    parser.add_argument("--replies", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    running = [started(str(find_gguf(name).path), AT_ONCE + 1, 512) for name in arguments.models.split(",")]
    try:
        engines = [load(EngineSpec(url, f"member-{i}")) for i, (_, url) in enumerate(running)]
        pair = Ensemble([LoadedMember(engine, engine.name) for engine in engines])
        costs: PlanCosts = measure(pair, max_batch=AT_ONCE)
        for name, cost in costs.members.items():
            parts = " + ".join(f"{1000 * value:.2f}" for value in (cost.forward, cost.sequence, cost.token))
            print(f"{name}: {parts} ms (forward, each further sequence, each further token)")
        print(f"mixlm: {1000 * costs.router.seconds:.2f} ms a run")
        prompt = len(pair.encode_prompt("0.10: write a story about the number 10.", pair.settings()).ids[0])
        for turn, rate in enumerate(float(rate) for rate in arguments.rates.split(",")):
            plan = expected(costs, Workload(rate, prompt, arguments.tokens, AT_ONCE, "fixed")).seen
            speed, first, whole = seen(pair, rate, arguments.replies, arguments.tokens, turn)
            for name, tokens, firsts, ends in (
                ("predicted", plan.tokens_per_second, plan.first, plan.whole),
                ("seen", speed, first, whole),
            ):
                times = "; ".join(
                    f"{what} {quantiles(values)[0]:.2f} s, 95 % within {quantiles(values)[1]:.2f}"
                    for what, values in (("first token", firsts), ("completion", ends))
                )
                print(f"{rate:g} completions/s, {name}: {tokens:.1f} tokens/s; {times}; load {os.getloadavg()[0]:.1f}")
    finally:
        for process, _ in running:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
