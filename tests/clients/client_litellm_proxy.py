"""LiteLLM as a proxy in front of the server, with the openai client."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from features import BASE

PARAMETERS = {"model": "openai/toys", "api_base": BASE, "api_key": "any"}
CONFIG = {"model_list": [{"model_name": "toys", "litellm_params": PARAMETERS}]}
SECONDS = 180  # until the proxy is ready


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(url: str, proxy: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and proxy.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health/liveliness", timeout=5).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise SystemExit("the proxy did not start")


with tempfile.TemporaryDirectory() as folder:
    config, url = Path(folder) / "config.yaml", f"http://127.0.0.1:{free_port()}"
    config.write_text(json.dumps(CONFIG))  # YAML too
    command = [str(Path(sys.executable).with_name("litellm")), "--config", str(config)]
    command += ["--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    # Without a key of its own, since the client's is that of every server here.
    keyless = {**os.environ, "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
    proxy = subprocess.Popen(command, stdout=sys.stderr, env=keyless)
    try:
        wait_until_ready(url, proxy)
        client = Path(__file__).with_name("client_openai.py")
        environment = {**os.environ, "OPENAI_BASE_URL": f"{url}/v1"}
        subprocess.run([sys.executable, str(client), url], env=environment, check=True)
    finally:
        proxy.terminate()
        proxy.wait(30)
