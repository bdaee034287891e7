"""Measures `mixlm serve` against the same ensemble without a server. Served and direct runs take turns.

python -m research.scripts.serve_load KIND …
    one        [-m MODEL ...] [--engine NAME] [--tokens N] [--repeats N]   one client against Ensemble.stream
    many       [-m MODEL ...] [--engine NAME] [--clients N] [...]          N streams at once against a batch
    malformed  [--requests N]                                              spoiled requests: statuses, memory
    mixed      [-m MODEL ...] [--requests N] [--log FILE]                  requests of all kinds: memory over time
    cancel     [-m MODEL ...] [--engine NAME]                              clients that leave, under load

Without --engine, models of the catalog run in llama.cpp where that is installed. With --log, `mixed` writes what it
prints to a file too, and leaves its server running when it is interrupted: the same command goes on with both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mixlm
from mixlm.generation.scheduler import Scheduler
from mixlm.resumable_log import ResumableLog

MAIN = "import sys; from mixlm.cli import main; sys.exit(main())"
PROMPTS = ("Why is the sky blue?", "Name three rivers.", "What is a mixture?", "Tell me about birds.")


class Served:
    """A server in a process of its own.

    Args:
        models: The members.
        options: Further options of the command.
        lasting: Whether it survives this program's interrupt.
    """

    def __init__(self, models: Sequence[str], *options: str, lasting: bool = False) -> None:
        chosen = [word for model in models for word in ("-m", model)]
        command = [sys.executable, "-c", MAIN, "serve", "--port", "0", "--log", "error", *chosen, *options]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=lasting)
        assert self._process.stderr is not None
        url = next(
            match[1] for line in self._process.stderr if (match := re.match(r"serving .* at http://(\S+)", line))
        )
        self.pid, self.port = self._process.pid, int(url.rpartition(":")[2])

    @property
    def memory(self) -> float:
        """Resident memory, MB."""
        return memory(self.pid)

    @property
    def seconds(self) -> float:
        """Processor time so far."""
        return _seconds(Path(f"/proc/{self.pid}/stat"))

    @property
    def loop_seconds(self) -> float:
        """Processor time so far of the thread that reads requests and writes responses."""
        return _seconds(Path(f"/proc/{self.pid}/task/{self.pid}/stat"))

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


def memory(pid: int) -> float:
    """Resident memory of a process, MB. Raises OSError where there is none."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def _seconds(stat: Path) -> float:
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def request(body: bytes, path: str = "/v1/chat/completions") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def streamed(port: int, prompt: str, seed: int, tokens: int) -> tuple[int, float]:
    """Stream one completion; return its tokens and the seconds in forwards. Raises when it ends early."""
    reader, writer = await asyncio.open_connection("localhost", port)
    body = {"messages": [{"role": "user", "content": prompt}], "seed": seed, "max_tokens": tokens, "stream": True}
    body["stream_options"] = {"include_usage": True}
    writer.write(request(json.dumps(body).encode()))
    count, last = 0, b""
    while data := await reader.read(65536):
        count += data.count(b'"members":["')
        last = (last + data)[-4000:]
    writer.close()
    assert b"data: [DONE]" in last, last
    seconds = re.findall(rb'"forward_seconds":([\d.e-]+)', last)
    return count, sum(map(float, seconds))


def middle(values: Sequence[float]) -> str:
    """The middle half of some values, in words."""
    low, _, high = statistics.quantiles(values, n=4)
    return f"middle half {low:.2f} to {high:.2f}"


def measure_one(models: Sequence[str], engine: str, tokens: int, repeats: int) -> None:
    ensemble, server = mixlm.load(*models, engine=engine), Served(models, "--engine", engine)
    ratios, work, direct, served, outside = [], [], [], [], {"direct": [], "served": []}
    for turn in range(repeats + 1):
        prompt = PROMPTS[turn % len(PROMPTS)]
        worked, start = time.process_time(), time.perf_counter()
        usage = ensemble.stream(prompt, seed=turn, max_tokens=tokens).finish().usage
        between, ours = time.perf_counter(), time.process_time() - worked
        before = server.seconds
        written, forwards = asyncio.run(streamed(server.port, prompt, turn, tokens))
        end, theirs = time.perf_counter(), server.seconds - before
        assert written == usage.tokens
        if turn:  # the first of each is for warming up
            direct.append(written / (between - start))
            served.append(written / (end - between))
            ratios.append((end - between) / (between - start))
            work.append(theirs / ours)
            inside = sum(member.forward_seconds for member in usage.members.values())
            outside["direct"].append(1000 * (between - start - inside) / written)
            outside["served"].append(1000 * (end - between - forwards) / written)
            print(f"time served / direct {ratios[-1]:.3f}; processor time {theirs / ours:.3f}")
    server.stop()
    print(f"direct {statistics.median(direct):.1f} tokens/s, served {statistics.median(served):.1f}")
    print(f"time served / direct: median {statistics.median(ratios):.3f}, {middle(ratios)}")
    print(f"processor time served / direct: median {statistics.median(work):.3f}, {middle(work)}")
    for name, times in outside.items():
        print(f"{name}: {statistics.median(times):.2f} ms a token outside forwards")


def measure_many(models: Sequence[str], engine: str, tokens: int, repeats: int, clients: int) -> None:
    ensemble = mixlm.load(*models, engine=engine)
    server = Served(models, "--engine", engine, "--batch", str(clients))

    def offline() -> tuple[float, float, int]:
        """Tokens a second, processor time, tokens."""
        scheduler = Scheduler(clients)
        start, worked = time.perf_counter(), time.process_time()
        for i in range(clients):
            settings = ensemble.settings(seed=i, max_tokens=tokens)
            prompts = ensemble.encode_prompt(PROMPTS[i % len(PROMPTS)], settings)
            scheduler.add(ensemble.context(settings).start(prompts))
        written = sum(generation.completion.usage.tokens for generation in scheduler.run())
        return written / (time.perf_counter() - start), time.process_time() - worked, written

    async def online() -> tuple[float, int]:
        """Tokens a second, tokens."""
        start = time.perf_counter()
        streams = [streamed(server.port, PROMPTS[i % len(PROMPTS)], i, tokens) for i in range(clients)]
        written = sum(count for count, _ in await asyncio.gather(*streams))
        return written / (time.perf_counter() - start), written

    ratios, work, loop = [], [], []
    for turn in range(repeats + 1):
        batch, ours, there = offline()
        before = server.seconds, server.loop_seconds
        live, waits = asyncio.run(online())
        theirs, looping = server.seconds - before[0], server.loop_seconds - before[1]
        print(f"batch {batch:.1f} tokens/s, {clients} streams {live:.1f}, ratio {live / batch:.3f}")
        if turn:
            ratios.append(live / batch)
            work.append(theirs / waits / (ours / there))
            loop.append(1000 * looping / waits)
    server.stop()
    print(f"streams / batch: median {statistics.median(ratios):.3f}, {middle(ratios)}")
    print(f"processor time a token, streams / batch: median {statistics.median(work):.3f}, {middle(work)}")
    print(f"of the event loop: median {statistics.median(loop):.3f} ms a token")


def spoiled(rng: random.Random) -> tuple[str, bytes]:
    """A request with something wrong in it: in its values, its fields, or its bytes."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "temperature": 0.5}
    odd = (None, True, -1, 1e308, 10**30, "", [], {}, [[]], "x" * 3000, "\u0000", {"type": "text"})
    name = rng.choice([*body, "stop", "n", "seed", "tools", "mixlm", "stream", "top_p", f"x{rng.random()}"])
    body[name] = rng.choice(odd)
    if isinstance(body["max_tokens"], float | int) and body["max_tokens"] not in (True, -1):
        body["max_tokens"] = 2
    data = json.dumps(body).encode()
    if rng.random() < 0.4:
        position = rng.randrange(len(data))
        data = data[:position] + rng.randbytes(rng.randrange(4)) + data[position + rng.randrange(5) :]
    return rng.choice(["/v1/chat/completions", "/v1/completions", f"/v1/x{rng.random()}"]), data


def measure_malformed(requests: int) -> None:
    server, rng, statuses = Served(["toy:1", "toy:2"], "--max-tokens", "2"), random.Random(0), Counter[int]()

    async def ask() -> None:
        path, data = spoiled(rng)
        reader, writer = await asyncio.open_connection("localhost", server.port)
        writer.write(request(data, path))
        answer = await reader.read()
        statuses[int(answer.split(b" ", 2)[1])] += 1
        writer.close()

    async def run() -> None:
        for done in range(0, requests, 20):
            await asyncio.gather(*[ask() for _ in range(20)])
            if done % (requests // 10) == 0:
                print(f"{done} requests: {server.memory:.1f} MB")

    asyncio.run(run())
    print(f"{requests} requests: {server.memory:.1f} MB; statuses {dict(sorted(statuses.items()))}")
    server.stop()
    assert not [status for status in statuses if status >= 500]


WORDS = ("one", "river", "the", "light", "falls", "stone", "a", "bird", "sings", "over")
PLACE = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}}


def mixed_request(number: int) -> tuple[str, bytes]:
    """A valid or an invalid request, another one for each number: its path and body."""
    rng = random.Random(number)
    text = f"{number} " + " ".join(rng.choices(WORDS, k=150 if number % 100 == 7 else rng.randrange(3, 9)))
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "seed": number, "max_tokens": 3}
    kind = number % 20
    if kind == 0:  # schemas; those of 2,000 properties are refused
        names = {f"name{number}_{i}": {"type": "integer"} for i in range(rng.choice((3, 30, 300, 2000)))}
        schema = {"name": "x", "schema": {"type": "object", "properties": names}}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif number % 100 == 1:
        function = {"name": f"f{number}", "description": text, "parameters": PLACE}
        body["tools"] = [{"type": "function", "function": function}]
    elif kind in (2, 3, 12, 13):
        return spoiled(rng)
    elif kind == 4:
        return "/v1/responses", json.dumps({"input": text, "max_output_tokens": 3}).encode()
    elif kind == 5:  # refused for members of which only the likeliest tokens are known
        body = {"prompt": text, "echo": True, "logprobs": 5, "max_tokens": 0}
        return "/v1/completions", json.dumps(body).encode()
    elif kind == 6:
        body |= {"stream": True, "logprobs": True, "top_logprobs": 5, "n": 2}
    elif number % 100 == 8:  # refused: 200,000 characters are allowed
        body["messages"] = [{"role": "user", "content": f"{number}" + "<bos>" * 50_000}]
    elif number % 100 == 58:  # tokenized, and then refused for its length
        body["messages"] = [{"role": "user", "content": f"{number} " + "long " * 39_000}]
    elif kind > 8:
        return "/v1/completions", json.dumps({"prompt": text, "seed": number, "max_tokens": 3}).encode()
    return "/v1/chat/completions", json.dumps(body).encode()


def measure_mixed(models: Sequence[str], requests: int, log: Path | None) -> None:
    """Send requests of all kinds, eight at a time; print the server's memory along the way."""
    rows = ResumableLog(log, index="requests", key="models", result="megabytes")
    rows.check(list(models))
    done, server, start = max(rows.records, default=0), None, time.monotonic()
    last = rows.records.get(done)
    if last is not None and (done >= requests or _is_server(last["pid"])):
        pid, port = last["pid"], last["port"]
    else:
        server = Served(models, "--max-tokens", "4", lasting=log is not None)
        pid, port = server.pid, server.port

    def note(sent: int) -> None:
        seconds = round(time.monotonic() - start)
        rows.add(sent, list(models), {"pid": pid, "port": port, "megabytes": round(memory(pid), 1), "seconds": seconds})
        print(rows.records[sent], flush=True)

    statuses = Counter[int]()

    async def ask(number: int) -> None:
        path, data = mixed_request(number)
        reader, writer = await asyncio.open_connection("localhost", port)
        writer.write(request(data, path))
        head = await reader.readline()
        statuses[int(head.split(b" ", 2)[1])] += 1
        if number % 40 != 6:  # every second client of a stream leaves
            await reader.read()
        writer.close()

    async def run() -> None:
        for first in range(done, requests, 50):
            numbers = iter(range(first, min(first + 50, requests)))

            async def client() -> None:
                for number in numbers:  # noqa: B023 - the clients share it
                    await ask(number)

            await asyncio.gather(*[client() for _ in range(8)])
            note(min(first + 50, requests))

    if done < requests:
        note(done)
        asyncio.run(run())
        print(f"statuses of this run: {dict(sorted(statuses.items()))}")
    if server is not None:
        server.stop()
    elif _is_server(pid):
        os.kill(pid, signal.SIGTERM)
    points = [(count, row["megabytes"]) for count, row in rows.records.items()]
    early, late = (
        statistics.median(size for count, size in points if low * requests <= count <= high * requests)
        for low, high in ((0.25, 0.5), (0.75, 1))
    )
    print(f"second quarter {early:.1f} MB, last quarter {late:.1f} MB: {100 * (late / early - 1):+.1f} %")
    assert not [status for status in statuses if status >= 500]


def _is_server(pid: int) -> bool:
    try:
        return b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def measure_cancel(models: Sequence[str], engine: str) -> None:
    """Clients leave while all slots are taken; how soon does the next in line begin?"""
    server, waits = Served(models, "--engine", engine, "--batch", "8"), []

    async def run() -> None:
        body = {"messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 500, "stream": True, "seed": 3}
        data = request(json.dumps(body).encode())
        connections = [await asyncio.open_connection("localhost", server.port) for _ in range(8)]
        for reader, writer in connections:
            writer.write(data)
            await reader.readuntil(b'"members":["')
        for _ in range(12):
            late = await asyncio.open_connection("localhost", server.port)
            late[1].write(data)
            await asyncio.sleep(0.3)
            connections.pop(0)[1].close()
            start = time.perf_counter()
            await late[0].readuntil(b'"members":["')
            waits.append(time.perf_counter() - start)
            connections.append(late)
        for _, writer in connections:
            writer.close()

    asyncio.run(run())
    server.stop()
    print(
        f"from a client's leaving to the first token of the next: median {statistics.median(waits):.3f} s, longest",
        end="",
    )
    print(f" {max(waits):.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["one", "many", "malformed", "mixed", "cancel"])
    parser.add_argument("-m", dest="models", action="append")
    parser.add_argument("--engine", default="auto", help="of one, many and cancel")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()
    models = arguments.models or ["smollm2-135m", "gemma-3-270m"]
    if arguments.what == "one":
        measure_one(models, arguments.engine, arguments.tokens, arguments.repeats)
    elif arguments.what == "many":
        measure_many(models, arguments.engine, arguments.tokens, arguments.repeats, arguments.clients)
    elif arguments.what == "malformed":
        measure_malformed(arguments.requests or 10_000)
    elif arguments.what == "mixed":
        measure_mixed(models, arguments.requests or 2000, arguments.log)
    else:
        measure_cancel(models, arguments.engine)


if __name__ == "__main__":
    main()
