"""What mixlm costs beside its engines, and how busy it keeps two servers of llama.cpp.

Overhead of a run: from one answer to the next, less what llama.cpp says it took for it, in this process and over the
loopback; the median, which on a busy machine is mostly waiting for a processor; and mixlm's own processor time.

Throughput: completions by equal weights over two servers, each with one thread, against the servers by themselves:
  the same work    each sequence's requests once more, one after the other: all that was read and written, with
                   nobody between the servers
  written alone    each server writes as many tokens of every completion as its member did, in one request, and reads
                   nothing of the other's
Both servers work at once, and as many completions in all as with mixlm. They take turns, since others may use the
machine; ratios are of one turn.

python -m research.scripts.server_speed [--models A,B] [--replies N] [--at-once N] [--tokens N] [--turns N]
(turns: 0 for the overhead alone)
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from statistics import median

import httpx

import mixlm
from mixlm.binding import LoadedMember
from mixlm.engines import EngineSpec, load
from mixlm.ensemble import Ensemble
from mixlm.models.gguf import find_gguf

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
# Of long prompts, as many tokens a forward as take about as long as a few completions do: others wait for them.
params.n_batch = params.n_ubatch = max(slots, 40)
server = xllamacpp.Server(params)
server.handle_completions({"prompt": [1], "n_predict": 1})
print(server.listening_address, flush=True)
time.sleep(36000)
"""
PROMPT = "Why is the sky blue?"


def started(path: str, slots: int, context: int) -> tuple[subprocess.Popen[str], str]:
    """Start a server of llama.cpp with one thread; return its process and URL."""
    command = [sys.executable, "-c", SERVE, path, str(slots), str(context)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


class Heard:
    """What a server was asked, when it answered, and what it says that took, in seconds."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict]] = []
        self.answers: list[tuple[float, float]] = []

    def note(self, answer) -> None:
        took = answer["timings"]["prompt_ms"] + answer["timings"]["predicted_ms"]
        self.answers.append((time.perf_counter(), took / 1000))

    def on(self, client) -> None:
        """Listen to the client of one of the servers of a remote member."""
        request = client.request

        async def listening(method, path, body=None, **options):
            response = await request(method, path, body, **options)
            if body is not None and response.status == 200:
                self.asked.append((path, body))
                self.note(response.value)
            return response

        client.request = listening

    def listen(self, engine) -> None:
        """Listen to llama.cpp in this process; what a call of its library took goes to `calls`, in seconds."""
        self.calls: list[tuple[float, float]] = []
        engine.server = Library(engine.server, self)


class Library:
    """Stands in front of llama.cpp in this process."""

    def __init__(self, server, heard: Heard) -> None:
        self._server, self._heard = server, heard

    def handle_completions(self, body):
        start = time.perf_counter()
        answer = self._server.handle_completions(body)
        self._heard.calls.append((time.perf_counter(), time.perf_counter() - start))
        self._heard.note(answer)
        return answer


def overhead(ensemble: Ensemble, heard: Sequence[Heard], tokens: int, clock) -> tuple[float, float]:
    """Return milliseconds a run outside the engine, the median, and those of processor time, by `clock`."""
    for ear in heard:
        ear.answers.clear()
    stream = ensemble.stream(PROMPT, seed=1, max_tokens=tokens, ignore_end=True, top_k=20)
    next(stream)
    first, used = sum(len(ear.answers) for ear in heard), clock()
    for _ in stream:
        pass
    used = clock() - used
    answers = sorted(each for ear in heard for each in ear.answers)[first - 1 :]
    gaps = [now[0] - before[0] - now[1] for before, now in pairwise(answers)]
    return 1000 * median(gaps), 1000 * used / len(gaps)


def mixed(ensemble: Ensemble, prompts: Sequence[str], tokens: int, at_once: int):
    """Write all completions, `at_once` together; return seconds, processor seconds of this process, and completions."""
    start, cpu = time.perf_counter(), time.process_time()
    options = {"max_tokens": tokens, "ignore_end": True, "top_k": 20, "seed": 1, "raw": True}
    generations = dict(ensemble.generations(prompts, at_once=at_once, **options))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return seconds, cpu, [generations[i].completion for i in range(len(prompts))]


def alone(urls: Sequence[str], prompts, written, at_once: int) -> float:
    """Let each server write its part of every completion alone, both at once; return seconds."""
    client = httpx.Client(timeout=600, limits=httpx.Limits(max_connections=2 * at_once))

    def ask(server: int, i: int) -> int:
        body = {"prompt": prompts[i][server].tolist(), "n_predict": written[i][server], "ignore_eos": True}
        body |= {"temperature": 1.0, "top_k": 20, "seed": 0, "cache_prompt": False}
        return client.post(urls[server] + "/v1/completions", json=body).json()["usage"]["completion_tokens"]

    with client:
        seconds, got = together(urls, at_once, lambda i: range(len(prompts)), ask)
    assert got == sum(map(sum, written))
    return seconds


def together(urls, at_once: int, jobs, do) -> tuple[float, int]:
    """Do each server's jobs, half of `at_once` at a time at each; return seconds, and the sum of what was returned."""
    pools = [ThreadPoolExecutor(at_once // len(urls)) for _ in urls]
    start = time.perf_counter()
    done = [pool.submit(do, server, job) for server, pool in enumerate(pools) for job in jobs(server)]
    got = sum(future.result() for future in done)
    seconds = time.perf_counter() - start
    for pool in pools:
        pool.shutdown()
    return seconds, got


def again(urls: Sequence[str], heard: Sequence[Heard], at_once: int) -> float:
    """Ask both servers what they were asked, each sequence's requests in turn, without mixlm; return seconds."""
    chains: list[dict[int, list[tuple[str, bytes]]]] = [{} for _ in urls]
    for known, ear in zip(chains, heard, strict=True):
        for path, body in ear.asked:
            # What the sequence left behind would spare reading it.
            chain = known.setdefault(body["id_slot"], [])
            chain.append((path, json.dumps(body if chain else {**body, "cache_prompt": False}).encode()))

    def ask(server: int, requests: Sequence[tuple[str, bytes]]) -> int:
        connection = http.client.HTTPConnection(urls[server].removeprefix("http://"), timeout=600)
        for path, data in requests:
            connection.request("POST", path, data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            assert answer.status == 200, text
        return len(requests)

    return together(urls, at_once, lambda server: chains[server].values(), ask)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="smollm2-135m,gemma-3-270m")
    parser.add_argument("--replies", type=int, default=32)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    names = arguments.models.split(",")
    paths = [str(find_gguf(name).path) for name in names]
    running = [started(path, arguments.at_once + 1, 512) for path in paths]
    try:
        urls = [url for _, url in running]
        engines = [load(EngineSpec(url, f"{name}-{i}")) for i, (name, url) in enumerate(zip(names, urls, strict=True))]
        pair = Ensemble([LoadedMember(engine, engine.name) for engine in engines])
        heard = [Heard() for _ in engines]
        for engine, ear in zip(engines, heard, strict=True):
            ear.on(engine.replicas[0].client)
        over, used = min(overhead(pair, heard, 64, time.process_time) for _ in range(3))
        print(f"a run over the loopback: {over:.2f} ms outside the server, {used:.2f} ms of processor time", flush=True)
        ratios = []
        for turn in range(arguments.turns):
            texts = [
                f"{turn}.{i}. This is the story of the number {i}, and it begins" for i in range(arguments.replies)
            ]
            for ear in heard:
                ear.asked.clear()
            seconds, cpu, completions = mixed(pair, texts, arguments.tokens, arguments.at_once)
            settings = pair.settings(raw=True)
            ids = [pair.encode_prompt(text, settings).ids for text in texts]
            written = [
                [sum(t.member == engine.name for t in completion.tokens) for engine in engines]
                for completion in completions
            ]
            total = sum(map(sum, written))
            caught = sum(u.forward_tokens for completion in completions for u in completion.usage.members.values())
            runs = sum(len(ear.asked) for ear in heard)
            same, separate = again(urls, heard, arguments.at_once), alone(urls, ids, written, arguments.at_once)
            ratios.append((same / seconds, separate / seconds))
            print(
                f"turn {turn + 1}: {total} tokens in {runs} requests, {caught} tokens read; tokens/s: mixlm"
                f" {total / seconds:.1f}, the same work {total / same:.1f} ({ratios[-1][0]:.2f}), written alone"
                f" {total / separate:.1f} ({ratios[-1][1]:.2f}); {1000 * cpu / total:.2f} ms of processor time a token"
                f" in mixlm; load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
        for i, name in enumerate(("the same work", "written alone") if ratios else ()):
            values = [ratio[i] for ratio in ratios]
            print(
                f"of {name}, median of {arguments.turns} turns: {median(values):.2f},"
                f" {min(values):.2f} to {max(values):.2f}"
            )
    finally:
        for engine, _ in running:
            engine.kill()
            engine.wait()
    ensemble = mixlm.load(*names, engine="llamacpp")
    heard = [Heard() for _ in ensemble.members]
    for engine, ear in zip(ensemble.members, heard, strict=True):
        ear.listen(engine.engine)
    # llama.cpp's work is in threads of its own.
    over, used = min(overhead(ensemble, heard, 64, time.thread_time) for _ in range(3))
    calls = sorted(each for ear in heard for each in ear.calls)[-60:]
    milliseconds = 1000 * median(now[0] - before[0] - now[1] for before, now in pairwise(calls))
    print(
        f"a run in this process: {over:.2f} ms outside llama.cpp's forward and sampling,"
        f" {milliseconds:.2f} ms outside its library"
    )


if __name__ == "__main__":
    main()
