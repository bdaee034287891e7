"""Checks that a grammar compiles, in a process of its own: llguidance may end the process in which it does not.

It recurses, and the process ends where the stack does; nor can anything stop it. So where a grammar may be too deep, or
has limits of size, time and memory, another process compiles it first, on a vocabulary of bytes; that one is killed at
the deadline. Compiling it here then takes about as long for each vocabulary.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from math import ceil
from pathlib import Path

from mixlm.core.grammar_worker import DONE, STARTED
from mixlm.errors import ConfigError

_WORKER = Path(__file__).with_name("grammar_worker.py")
_MEMORY_BYTES = 1 << 30
# Brackets of a source: whatever nests, or refers to something else, has one. Four times as many fit into the stack.
_SHALLOW = 200
_STACK_OVERFLOW = (-signal.SIGSEGV, 0xC00000FD)  # the second on Windows


def check_depth(source: str) -> None:
    """Check that a grammar is not too deep for the compiler. That it is valid is not checked.

    Raises:
        ConfigError: The compiler would end the process.
    """
    if sum(map(source.count, "{[(")) > _SHALLOW:
        _check(source, memory=0, timeout=None)


def check_limits(source: str, *, max_chars: int, timeout: float) -> None:
    """Check that a grammar compiles within limits. That it is valid is not checked.

    Args:
        source: The grammar, as llguidance takes it.
        max_chars: Size of the source.
        timeout: Seconds for compiling it.

    Raises:
        ConfigError: The grammar exceeds a limit.
    """
    if len(source) > max_chars:
        raise ConfigError(f"json_schema has more than {max_chars} characters")
    _check(source, memory=_MEMORY_BYTES, timeout=timeout)


def _check(source: str, *, memory: int, timeout: float | None) -> None:
    # -P: the folder of the worker is no place to import from.
    command = [sys.executable, "-P", str(_WORKER), str(memory), str(ceil(timeout or 0))]
    try:
        worker = subprocess.run(command, input=source.encode(), capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"json_schema takes longer than {timeout:g} s to compile", "make it smaller") from None
    except (OSError, TypeError) as error:  # there is no such program, or none at all
        raise ConfigError(f"json_schema cannot be checked: {sys.executable!r} does not run: {error}") from None
    if worker.returncode in _STACK_OVERFLOW:
        raise ConfigError("json_schema is nested too deeply to be compiled", "make it flatter")
    output = worker.stdout.decode(errors="replace").split()
    if STARTED not in output:
        reason = worker.stderr.decode(errors="replace").strip().rpartition("\n")[2] or f"status {worker.returncode}"
        raise ConfigError(f"json_schema cannot be checked: its compiler does not start in {sys.executable!r}: {reason}")
    if DONE not in output:
        raise ConfigError("json_schema takes too much memory or time to compile", "make it smaller")
