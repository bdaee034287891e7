"""The blocks of docs/python.md run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("code", [block for block in BLOCKS if "FOLDER" not in block], ids=range(len(BLOCKS) - 1))
def test_a_block_runs(code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
def test_the_block_with_a_loaded_model_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "engines"))
    from test_transformers_engine import build

    [code] = [block for block in BLOCKS if "FOLDER" in block]
    exec(code, {"FOLDER": build(tmp_path / "m", "llama")})
    assert capsys.readouterr().out


def test_every_block_is_short():
    assert max(sum(bool(line.strip()) for line in block.splitlines()) for block in BLOCKS) <= 12
