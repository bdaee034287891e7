"""Third-party clients against `mixlm serve`, each in an environment of its own: `make test-clients`.

    python tests/clients/run.py [CLIENT ...] [--keep FOLDER] [--table]

A client is a file here, `client_NAME.py` or `client_NAME.mjs`, that takes the server's URL and prints one line of JSON:
for each of chat, stream, structured and tools "yes" or "no", and why. What it needs is in `CLIENTS`. The server has two
toys, which sample words at random: what is tested is the form of requests and responses, and that structures and calls
fit their schemas.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
FEATURES = ("chat", "stream", "structured", "tools")
# The package whose version is shown, and what is installed.
CLIENTS: dict[str, tuple[str, Sequence[str]]] = {
    "openai": ("openai", ["openai"]),
    "openai_old": ("openai", ["openai==2.8.*"]),
    "openai_responses": ("openai", ["openai"]),
    "openai_agents": ("openai-agents", ["openai-agents"]),
    "langchain": ("langchain-openai", ["langchain-openai"]),
    "llamaindex": ("llama-index-llms-openai-like", ["llama-index-llms-openai-like"]),
    "pydantic_ai": ("pydantic-ai-slim", ["pydantic-ai-slim[openai]"]),
    "instructor": ("instructor", ["instructor"]),
    "dspy": ("dspy", ["dspy"]),
    "smolagents": ("smolagents", ["smolagents[openai]"]),
    "outlines": ("outlines", ["outlines", "openai"]),
    "guidance": ("guidance", ["guidance", "openai"]),
    "litellm": ("litellm", ["litellm"]),
    "litellm_proxy": ("litellm", ["litellm[proxy]", "openai"]),
    "anthropic": ("anthropic", ["anthropic"]),
    "llm": ("llm", ["llm"]),
    "inspect_ai": ("inspect-ai", ["inspect-ai", "openai"]),
    "openai_node": ("openai", ["openai", "zod"]),
    "vercel_ai": ("ai", ["ai", "@ai-sdk/openai-compatible", "zod"]),
}
SERVE = "import sys; from mixlm.cli import main; sys.exit(main())"


def main() -> int:
    """Run the clients; exit with 1 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"of {', '.join(CLIENTS)}; all by default")
    parser.add_argument("--keep", type=Path, help="where environments are kept between runs")
    parser.add_argument("--table", action="store_true", help="print a table in Markdown")
    options = parser.parse_args()
    if unknown := set(options.clients) - CLIENTS.keys():
        parser.error(f"there is no client {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as scratch, Server() as server:
        rows = []
        for name in options.clients or CLIENTS:
            rows.append(run_client(name, server.url, options.keep or Path(scratch)))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if options.table:
        print(table(rows))
    return int(any(row[feature] == "no" for row in rows for feature in FEATURES))


def run_client(name: str, url: str, environments: Path) -> dict[str, Any]:
    """Install a client and run its file. Returns its row: name, version, and each feature's result."""
    package, requirements = CLIENTS[name]
    folder = (environments / name).absolute()
    is_node = (FOLDER / f"client_{name}.mjs").exists()
    environment = {
        **{key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")},
        "OPENAI_API_KEY": "any", "OPENAI_BASE_URL": f"{url}/v1", "NO_PROXY": "*", "HOME": str(folder),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_AGENTS_DISABLE_TRACING": "1", "DO_NOT_TRACK": "1",
    }  # fmt: skip
    row: dict[str, Any] = {"client": name, "version": "", **dict.fromkeys(FEATURES, "no"), "why": ""}
    try:
        row["version"] = (install_node if is_node else install_python)(folder, package, requirements)
        file = f"client_{name}.mjs" if is_node else f"client_{name}.py"
        if is_node:
            for copied in (file, "features.mjs"):  # Node looks for packages beside the file
                shutil.copy(FOLDER / copied, folder)
        command = ["node", str(folder / file)] if is_node else [str(folder / "bin" / "python"), str(FOLDER / file)]
        done = subprocess.run(
            [*command, url], capture_output=True, text=True, timeout=480, env=environment, cwd=folder, check=False
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        row |= json.loads(lines[-1]) if lines else {"why": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    except (subprocess.SubprocessError, OSError) as error:
        row["why"] = f"{type(error).__name__}: {str(error)[:200]}"
    return row


def install_python(folder: Path, package: str, requirements: Sequence[str]) -> str:
    """Make a virtual environment; return the version of the client."""
    python, mark = folder / "bin" / "python", folder / ".installed"
    if not mark.exists():
        run(sys.executable, "-m", "venv", str(folder))
        run(str(python), "-m", "pip", "install", "-q", "uv")  # pip looks for minutes for versions that fit together
        run(str(python), "-m", "uv", "pip", "install", "-q", "-p", str(python), *requirements)
        mark.touch()
    return run(str(python), "-c", f"import importlib.metadata as m; print(m.version({package!r}))").strip()


def install_node(folder: Path, package: str, requirements: Sequence[str]) -> str:
    """Make a folder with packages of Node; return the version of the client."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "node_modules" / package).exists():
        (folder / "package.json").write_text('{"type": "module"}', encoding="utf-8")
        run("npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), *requirements)
    described = (folder / "node_modules" / package / "package.json").read_text(encoding="utf-8")
    return str(json.loads(described)["version"])


def run(*command: str) -> str:
    """Run a command; return what it prints. Raises CalledProcessError if it fails."""
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout


class Server:
    """`mixlm serve` with two toys, in a process of its own."""

    def __enter__(self) -> Server:
        command = [
            sys.executable, "-c", SERVE, "serve", "-m", "toy:1", "-m", "toy:2", "--name", "toys", "--port", "0",
            "--max-tokens", "600",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if match := re.match(r"serving .* at (http\S+)", line):
                self.url = match[1].rstrip("/")
                break
        else:
            raise RuntimeError("the server did not start")
        self._log = threading.Thread(target=self._process.stderr.read, daemon=True)
        self._log.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.join(10)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a table in Markdown."""
    lines = ["| client | version | chat | stream | structured | tools |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['client'].replace('_', ' ')} | {row['version']} | {' | '.join(row[name] for name in FEATURES)} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
