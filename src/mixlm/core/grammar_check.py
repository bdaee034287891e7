"""Checks that a grammar compiles, in a process of its own: llguidance may end the process in which it does not.

It recurses, and the process ends where the stack does; nor can anything stop it. So where a grammar may be too deep, or
has limits of size, time and memory, another process compiles it first, on a vocabulary of bytes; that one is killed at
the deadline. Compiling it here then takes about as long for each vocabulary.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from mixlm.core.grammar_worker import DONE, STARTED
from mixlm.errors import ConfigError

_WORKER = Path(__file__).with_name("grammar_worker.py")
_MEMORY_BYTES = 1 << 30
_START_SECONDS = 10.0  # of a process, on a busy machine
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


class CompileLimits:
    """Checks that the grammars of one schema compile within limits. That they are valid is not checked.

    Args:
        max_chars: Size of a source.
        timeout: Seconds for all of them, here and in the process that tries.
        num_vocabularies: For how many vocabularies each is compiled here.
    """

    def __init__(self, *, max_chars: int, timeout: float, num_vocabularies: int) -> None:
        self._max_chars = max_chars
        self._timeout = self._remaining = timeout
        self._num_vocabularies = num_vocabularies

    def __call__(self, source: str) -> None:
        """Check one grammar, as llguidance takes it. Raises ConfigError where it exceeds a limit."""
        if len(source) > self._max_chars:
            raise ConfigError(f"json_schema has more than {self._max_chars} characters")
        try:
            seconds = _check(source, memory=_MEMORY_BYTES, timeout=self._remaining)
        except subprocess.TimeoutExpired:
            raise self._too_slow() from None
        self._remaining -= (1 + self._num_vocabularies) * seconds
        if self._remaining <= 0:
            raise self._too_slow()

    def _too_slow(self) -> ConfigError:
        return ConfigError(f"json_schema takes longer than {self._timeout:g} s to compile", "make it smaller")


def _check(source: str, *, memory: int, timeout: float | None) -> float:
    """Return how many seconds a grammar takes to compile for one vocabulary. Raises TimeoutExpired and ConfigError.

    timeout: without the start of the process, which on a busy machine takes long for the smallest grammar too.
    """
    # -P: the folder of the worker is no place to import from.
    command = [sys.executable, "-P", str(_WORKER), str(memory), str(timeout or 0)]
    whole = None if timeout is None else timeout + _START_SECONDS
    try:
        worker = subprocess.run(command, input=source.encode(), capture_output=True, timeout=whole, check=False)
    except subprocess.TimeoutExpired as error:
        if STARTED.encode() in (error.stdout or b""):
            raise
        problem = f"json_schema cannot be checked: its compiler did not start in {_START_SECONDS:g} s"
        raise ConfigError(problem, "the machine is busy: try again") from None
    except (OSError, TypeError) as error:  # there is no such program, or none at all
        raise ConfigError(f"json_schema cannot be checked: {sys.executable!r} does not run: {error}") from None
    if hasattr(signal, "SIGALRM") and worker.returncode == -signal.SIGALRM:
        raise subprocess.TimeoutExpired(command, timeout or 0)
    if worker.returncode in _STACK_OVERFLOW:
        raise ConfigError("json_schema is nested too deeply to be compiled", "make it flatter")
    started, _, output = worker.stdout.decode(errors="replace").partition("\n")
    if started.strip() != STARTED:
        reason = worker.stderr.decode(errors="replace").strip().rpartition("\n")[2] or f"status {worker.returncode}"
        raise ConfigError(f"json_schema cannot be checked: its compiler does not start in {sys.executable!r}: {reason}")
    if not output.startswith(DONE):
        raise ConfigError("json_schema takes too much memory or time to compile", "make it smaller")
    return float(output.removeprefix(DONE))
