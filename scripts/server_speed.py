"""What mixlm costs beside its engines, and how busy it keeps two servers of llama.cpp.

Overhead of a run: from one token to the next, less what llama.cpp says it took for it, in this process and over the
loopback; the median, which on a busy machine is mostly waiting for a processor; and mixlm's own processor time for a
token. Throughput: replies by equal weights over two servers, each with one thread, against the servers
by themselves: each writes as many tokens of every reply as its member did, with the prompts to read, both at once and
without mixlm. The two take turns, since others may use the machine; ratios are of the two in one turn.

python scripts/server_speed.py [--models A,B] [--replies N] [--tokens N] [--turns N]   (turns: 0 for the overhead alone)
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import httpx

import mixlm
from mixlm.engines import EngineSpec, load
from mixlm.ensemble import Ensemble, MemberSpec
from mixlm.models import find_gguf

SERVE = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
slots, context = int(sys.argv[2]), int(sys.argv[3])
params.n_parallel, params.n_ctx = slots, context * slots
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cpuparams.poll = params.cpuparams_batch.poll = 0
params.verbosity, params.warmup, params.fit_params, params.endpoint_props = -1, False, False, True
params.swa_full, params.cache_ram_mib, params.n_ctx_checkpoints = True, 0, 0
server = xllamacpp.Server(params)
server.handle_completions({"prompt": [1], "n_predict": 1})
print(server.listening_address, flush=True)
time.sleep(36000)
"""
PROMPT = "Why is the sky blue?"


def started(path: str, slots: int, context: int) -> tuple[subprocess.Popen[str], str]:
    """Start a server of llama.cpp with one thread; return its process and URL."""
    command = [sys.executable, "-c", SERVE, path, str(slots), str(context)]
    one = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return one, one.stdout.readline().strip()


class Heard:
    """Stands in front of a dialect and adds up what llama.cpp says its answers took, in seconds."""

    def __init__(self, dialect) -> None:
        self._dialect, self.seconds, self.answers = dialect, 0.0, 0
        self.bodies, self.name = dialect.bodies, dialect.name

    def read(self, answer):
        timings = answer["timings"]
        self.seconds += (timings["prompt_ms"] + timings["predicted_ms"]) / 1000
        self.answers += 1
        return self._dialect.read(answer)


def overhead(ensemble: Ensemble, heard: Sequence[Heard], tokens: int, clock) -> tuple[float, float]:
    """Return milliseconds a token outside the engine: the median of those that took one question, and by `clock`."""
    stream = ensemble.stream(PROMPT, seed=1, max_tokens=tokens, ignore_end=True, top_k=40)
    found, before = [], None
    next(stream)
    used = clock()
    for _ in stream:
        now = (time.perf_counter(), sum(one.seconds for one in heard), sum(one.answers for one in heard))
        if before is not None and now[2] - before[2] == 1:
            found.append(now[0] - before[0] - (now[1] - before[1]))
        before = now
    return 1000 * median(found), 1000 * (clock() - used) / (tokens - 1)


def mixed(ensemble: Ensemble, prompts: Sequence[str], tokens: int):
    """Write all replies at once; return seconds, processor seconds of this process, and the replies."""
    start, cpu = time.perf_counter(), time.process_time()
    options = {"max_tokens": tokens, "ignore_end": True, "top_k": 40, "seed": 1}
    found = dict(ensemble.replies(prompts, at_once=len(prompts), **options))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return seconds, cpu, [found[at].completion for at in range(len(prompts))]


def alone(urls: Sequence[str], prompts, written) -> float:
    """Let each server write its part of every reply by itself, both at once; return seconds."""
    client = httpx.Client(timeout=600, limits=httpx.Limits(max_connections=len(urls) * len(prompts)))

    def ask(server: int, at: int) -> int:
        body = {"prompt": prompts[at][server].tolist(), "n_predict": written[at][server], "ignore_eos": True}
        body |= {"temperature": 1.0, "top_k": 40, "seed": 0, "id_slot": at, "cache_prompt": False}
        return client.post(urls[server] + "/v1/completions", json=body).json()["usage"]["completion_tokens"]

    jobs = [(server, at) for at in range(len(prompts)) for server in range(len(urls)) if written[at][server]]
    with client, ThreadPoolExecutor(len(jobs)) as threads:
        start = time.perf_counter()
        got = sum(threads.map(lambda job: ask(*job), jobs))
        seconds = time.perf_counter() - start
    assert got == sum(map(sum, written))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="smollm2-135m,gemma-3-270m")
    parser.add_argument("--replies", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    names = given.models.split(",")
    paths = [str(find_gguf(one).path) for one in names]
    running = [started(path, given.replies + 1, 512) for path in paths]
    try:
        urls = [url for _, url in running]
        engines = [
            load(EngineSpec(url, f"{name}-{at}")) for at, (name, url) in enumerate(zip(names, urls, strict=True))
        ]
        pair = Ensemble([MemberSpec(one, one.name) for one in engines])
        heard = [Heard(one.servers[0]._dialect) for one in engines]
        for one, ear in zip(engines, heard, strict=True):
            one.servers[0]._dialect = ear
        over, used = min(overhead(pair, heard, 64, time.process_time) for _ in range(3))
        print(f"a run over the loopback: {over:.2f} ms outside the server, {used:.2f} ms of processor time")
        ratios = []
        for turn in range(given.turns):
            texts = [f"{turn}.{at}: write a story about the number {at}." for at in range(given.replies)]
            seconds, cpu, replies = mixed(pair, texts, given.tokens)
            settings = pair.settings()
            ids = [pair.prompts(text, settings).ids for text in texts]
            written = [[sum(t.member == one.name for t in reply.tokens) for one in engines] for reply in replies]
            total = sum(map(sum, written))
            caught = sum(u.forward_tokens for reply in replies for u in reply.usage.members.values())
            own = alone(urls, ids, written)
            ratios.append(own / seconds)
            print(
                f"turn {turn + 1}: {total} tokens, mixlm {total / seconds:.1f} tokens/s, the servers {total / own:.1f},"
                f" ratio {ratios[-1]:.2f}; {caught} tokens read; {1000 * cpu / total:.2f} ms of processor time a token"
                f" in mixlm; load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
        if ratios:
            print(f"ratio, median of {given.turns} turns: {median(ratios):.2f}, best {max(ratios):.2f}")
    finally:
        for one, _ in running:
            one.kill()
            one.wait()
    here = mixlm.load(*names, engine="llamacpp")
    heard = [Heard(one.engine.dialect) for one in here.members]
    for one, ear in zip(here.members, heard, strict=True):
        one.engine.dialect = ear
    # llama.cpp's work is in threads of its own.
    over, used = min(overhead(here, heard, 64, time.thread_time) for _ in range(3))
    print(f"a run in this process: {over:.2f} ms outside llama.cpp, {used:.2f} ms of processor time")


if __name__ == "__main__":
    main()
