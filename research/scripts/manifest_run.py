"""Runs examples/kubernetes on one machine, as far as that goes: every pod a process in a network namespace of its own.

Names, addresses, ports, keys, probes, commands and numbers of replicas are those of the manifests. In the place of the
rest stand small models, processors for GPUs, and this file for the cluster. Then, with clients on the network:
completions by both of mixlm's pods; a replica of the large member is killed in the middle of completions; the small
member is killed, and comes back; one of mixlm's pods is killed. Needs root, and vLLM in an environment of its
own (`make test-engines`).

python -m research.scripts.manifest_run [--engines .venv-engines] [--large FOLDER] [--small FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import httpx
import yaml

ROOT = Path(__file__).resolve().parents[2]
BRIDGE, NET = "mixlm-run", "10.87.0"
# In place of GPUs; the rest of what a container is started with stays.
CPU = ["--dtype=bfloat16", "--max-model-len=1024", "--enforce-eager", "--block-size=32", "--max-num-seqs=16"]
CPU += ["--kv-cache-memory-bytes=300000000"]
CPU_ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_PLUGINS": "",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}
LEFT_OUT = ("--tensor-parallel-size",)
PROMPT = "Write a few sentences about the number {}."


def sh(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@dataclass
class Pod:
    """A pod: a name on the network, and a process."""

    name: str
    address: str
    command: list[str]
    env: dict[str, str]
    probe: str
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def space(self) -> str:
        return f"mixlm-{self.name.partition('.')[0]}"

    @property
    def url(self) -> str:
        return f"http://{self.address}:8000"

    def plug(self, number: int, hosts: str) -> None:
        """Put it on the network."""
        sh("ip", "netns", "add", self.space)
        etc = f"/etc/netns/{self.space}"
        os.makedirs(etc, exist_ok=True)
        Path(etc, "hosts").write_text(hosts)
        sh("ip", "link", "add", f"mx{number}", "type", "veth", "peer", "name", "eth0", "netns", self.space)
        sh("ip", "link", "set", f"mx{number}", "master", BRIDGE, "up")
        sh("ip", "-n", self.space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            sh("ip", "-n", self.space, "link", "set", link, "up")

    def start(self) -> None:
        out = self.log.open("ab")
        command = ["ip", "netns", "exec", self.space, *self.command]
        self.process = subprocess.Popen(
            command, env={**os.environ, **self.env}, stdout=out, stderr=out, start_new_session=True
        )

    def kill(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait_ready(self, seconds: float = 600) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with suppress(httpx.HTTPError):
                if httpx.get(self.url + self.probe, timeout=2).status_code == 200:
                    return
            if self.process is not None and self.process.poll() is not None:
                break
            time.sleep(1)
        sys.exit(f"{self.name} is not ready; its output:\n{self.log.read_text()[-2000:]}")


def environment(container: dict, keys: dict[str, str]) -> dict[str, str]:
    """Return a container's environment, secrets looked up by their names."""
    values = {}
    for variable in container.get("env", ()):
        values[variable["name"]] = (
            variable["value"] if "value" in variable else keys[variable["valueFrom"]["secretKeyRef"]["name"]]
        )
    return values


def pods(folder: Path, models: dict[str, str], engines: Path) -> tuple[list[Pod], list[Pod], str]:
    """Read the manifests: the members' pods, mixlm's, and the clients' key."""
    things = [
        thing
        for name in ("members.yaml", "mixlm.yaml")
        for thing in yaml.safe_load_all((ROOT / "examples/kubernetes" / name).read_text())
    ]
    keys = {"members": secrets.token_hex(8), "clients": secrets.token_hex(8)}
    [config] = [thing["data"]["pair.toml"] for thing in things if thing["kind"] == "ConfigMap"]
    members, fronts = [], []
    addresses = iter(f"{NET}.{number}" for number in range(10, 250))
    for thing in (each for each in things if each["kind"] in ("StatefulSet", "Deployment")):
        name, spec = thing["metadata"]["name"], thing["spec"]
        [container] = spec["template"]["spec"]["containers"]
        env = environment(container, keys)
        probe = container["readinessProbe"]["httpGet"]["path"]
        for i in range(spec["replicas"]):
            if thing["kind"] == "StatefulSet":
                args = [each for each in container["args"] if not each.startswith(LEFT_OUT)]
                theirs = next(each for each in args if each.startswith("--model=")).removeprefix("--model=")
                config = config.replace(f'"{theirs}"', json.dumps(models[name]))
                args = [each.replace(theirs, models[name]) for each in args] + CPU
                python = str(engines / "bin/python")
                command = [python, "-m", "vllm.entrypoints.openai.api_server", "--host=0.0.0.0", "--port=8000", *args]
                place = f"{name}-{i}.{spec['serviceName']}"
                members.append(Pod(place, next(addresses), command, env | CPU_ENV, probe, folder / f"{name}-{i}.log"))
            else:
                args = [str(folder) if each == "/etc/mixlm" else each for each in container["args"]]
                command = [str(ROOT / ".venv/bin/mixlm"), *args]
                fronts.append(Pod(f"{name}-{i}", next(addresses), command, env, probe, folder / f"{name}-{i}.log"))
    (folder / "pair.toml").write_text(config)
    return members, fronts, keys["clients"]


def ask(front: Pod, key: str, index: int, tokens: int = 48) -> tuple[float, dict]:
    """Return seconds and the answer to one request."""
    body = {
        "model": "pair",
        "messages": [{"role": "user", "content": PROMPT.format(index)}],
        "max_tokens": tokens,
        "seed": index,
    }
    start = time.perf_counter()
    url, headers = front.url + "/v1/chat/completions", {"Authorization": f"Bearer {key}"}
    answer = httpx.post(url, json=body, headers=headers, timeout=300)
    answer.raise_for_status()
    return time.perf_counter() - start, answer.json()


def several(fronts: list[Pod], key: str, count: int, first: int, then=None, after: float = 0.0) -> list[dict]:
    """Ask for completions at once, each of a pod in turn; `then` is done in the middle."""
    with ThreadPoolExecutor(count) as threads:
        start = time.perf_counter()
        futures = [threads.submit(ask, fronts[i % len(fronts)], key, first + i) for i in range(count)]
        if then is not None:
            threading.Timer(after, then).start()
        results = [future.result() for future in futures]
        seconds = time.perf_counter() - start
    written = sum(answer["usage"]["completion_tokens"] for _, answer in results)
    took = [seconds for seconds, _ in results]
    print(
        f"  {count} completions, {written} tokens: {written / seconds:.1f} tokens/s, a completion {median(took):.1f} s"
        f" ({min(took):.1f} to {max(took):.1f}); members: {shares([answer for _, answer in results])}",
        flush=True,
    )
    return [answer for _, answer in results]


def shares(answers: list[dict]) -> str:
    """Return what each member wrote, and missed."""
    totals: dict[str, list[int]] = {}
    for answer in answers:
        for name, used in answer["usage"]["mixlm"]["members"].items():
            total = totals.setdefault(name, [0, 0])
            total[0] += used["tokens"]
            total[1] += used["dropped"]
    return ", ".join(f"{name} wrote {wrote}, was left out of {out}" for name, (wrote, out) in totals.items())


def run(members: list[Pod], fronts: list[Pod], key: str) -> None:
    """The clients' part."""
    refused = httpx.get(fronts[0].url + "/v1/models", timeout=10).status_code
    print(f"without a key: status {refused}")
    for front in fronts:
        seconds, answer = ask(front, key, 1)
        print(f"{front.name}: {seconds:.1f} s, {answer['choices'][0]['message']['content']!r}", flush=True)
    print("both pods of mixlm:")
    several(fronts, key, 12, 100)
    print(f"{members[0].name} is killed in the middle:")
    several(fronts, key, 12, 200, members[0].kill, 4.0)
    print(f"{members[-1].name}, the only one of its member, is killed in the middle:")
    several(fronts, key, 12, 300, members[-1].kill, 4.0)
    members[-1].start()
    members[-1].wait_ready()
    time.sleep(31)  # a member that stopped answering is looked at again within half a minute
    print(f"{members[-1].name} is back:")
    several(fronts, key, 4, 400)
    several(fronts, key, 12, 500)
    fronts[0].kill()
    print(f"{fronts[0].name} is killed; the other one goes on:")
    several(fronts[1:], key, 12, 600)


def main() -> None:
    home = Path("~/.cache/mixlm/models").expanduser()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=Path, default=ROOT / ".venv-engines")
    parser.add_argument("--large", default=str(home / "gemma-3-270m"))
    parser.add_argument("--small", default=str(home / "smollm2-135m"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = {"large": arguments.large, "small": arguments.small}
        members, fronts, key = pods(Path(folder), models, arguments.engines.absolute())
        every = members + fronts
        hosts = "127.0.0.1 localhost\n" + "".join(f"{pod.address} {pod.name}\n" for pod in every)
        try:
            sh("ip", "link", "add", BRIDGE, "type", "bridge")
            sh("ip", "addr", "add", f"{NET}.1/24", "dev", BRIDGE)
            sh("ip", "link", "set", BRIDGE, "up")
            for number, pod in enumerate(every):
                pod.plug(number, hosts)
            start = time.perf_counter()
            for group in (members, fronts):
                for pod in group:
                    pod.start()
                for pod in group:
                    pod.wait_ready()
            names = ", ".join(f"{pod.name} at {pod.address}" for pod in every)
            print(f"ready after {time.perf_counter() - start:.0f} s: {names}", flush=True)
            run(members, fronts, key)
        finally:
            for pod in every:
                pod.kill()
                subprocess.run(["ip", "netns", "del", pod.space], check=False, capture_output=True)
                subprocess.run(["rm", "-rf", f"/etc/netns/{pod.space}"], check=False)
            subprocess.run(["ip", "link", "del", BRIDGE], check=False, capture_output=True)


if __name__ == "__main__":
    main()
