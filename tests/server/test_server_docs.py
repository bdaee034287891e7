"""What docs/serving.md says is true."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from serving import MAIN, running

from mixlm.loading import load
from mixlm.server.chat_schemas import ChatBody
from mixlm.server.middleware import OPEN_PATHS
from mixlm.server.request_schemas import CompletionBody, Extras

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.slow
def test_every_option_exists():
    command = [sys.executable, "-c", MAIN, "serve", "--help"]
    wide = {**os.environ, "COLUMNS": "200"}
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=wide).stdout
    commands = [line for line in TEXT.splitlines() if "mixlm serve" in line]
    named = set(re.findall(r"`(--[a-z-]+)", TEXT)) | set(re.findall(r"(--[a-z-]+)", " ".join(commands)))
    assert named
    for option in named - {"--help"}:
        assert option in shown, option


@pytest.mark.slow
def test_the_clients_work():
    with running({"pair": load("toy:1", "toy:2")}) as server:
        [code] = blocks("python")
        done = subprocess.run(
            [sys.executable, "-c", code.replace(ADDRESS, server.url)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        [curl] = [block for block in blocks("sh") if block.startswith("curl")]
        command = shlex.split(curl.replace("\\\n", " ").replace(ADDRESS, server.url))
        done = subprocess.run([*command, "-sS", "--noproxy", "*"], capture_output=True, text=True, check=False)
        assert '"choices"' in done.stdout, (done.stdout, done.stderr)


def test_every_field_is_described():
    for kind in (ChatBody, CompletionBody, Extras):
        for name in kind.model_fields:
            assert f"`{name}" in TEXT, name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (Path(__file__).resolve().parents[2] / "docs" / target).is_file(), target


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")
def test_systemd_understands_the_unit(tmp_path):
    [unit] = blocks("ini")
    # The program itself is not there.
    file = tmp_path / "mixlm.service"
    file.write_text(unit.replace("/opt/mixlm/bin/mixlm", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(file) not in done.stderr, done.stderr


def test_the_container_installs_what_there_is():
    [text] = blocks("dockerfile")
    extras = re.search(r"/src\[([\w,]+)\]", text)
    assert extras
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(extras[1].split(",")) <= set(project["project"]["optional-dependencies"])
    [path] = re.findall(r"127.0.0.1:8000(/\w+)", text)
    assert path in OPEN_PATHS
