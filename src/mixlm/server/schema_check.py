"""Checks that the grammar of a client's JSON schema compiles within limits of size, time and memory.

Nothing can stop the compiler in this process. So a process of its own compiles a grammar first, on a vocabulary of
bytes; it is killed at the deadline. Compiling it here then takes about as long for each vocabulary.
"""

from __future__ import annotations

import subprocess
import sys
from math import ceil
from pathlib import Path

from mixlm.errors import ConfigError

_WORKER = Path(__file__).with_name("schema_worker.py")
_MEMORY_BYTES = 1 << 30


def check_grammar(source: str, *, max_chars: int, timeout: float) -> None:
    """Check that a grammar compiles within the limits. That it is valid is not checked.

    Args:
        source: The grammar, as llguidance takes it.
        max_chars: Size of the source.
        timeout: Seconds for compiling it.

    Raises:
        ConfigError: The grammar exceeds a limit.
    """
    if len(source) > max_chars:
        raise ConfigError(f"json_schema has more than {max_chars} characters")
    # -P: the folder of the worker is no place to import from.
    command = [sys.executable, "-P", str(_WORKER), str(_MEMORY_BYTES), str(ceil(timeout))]
    try:
        worker = subprocess.run(command, input=source.encode(), capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"json_schema takes longer than {timeout:g} s to compile", "make it smaller") from None
    if worker.returncode:
        raise ConfigError("json_schema takes too much memory or time to compile", "make it smaller")
