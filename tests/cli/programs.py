"""Ways to run the command line: in a process of its own, and at a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass

TOYS = ("-m", "toy:1", "-m", "toy:2")
MAIN = "import sys; from mixlm.cli import main; sys.exit(main())"
# As a program at a terminal: the terminal becomes the one whose Ctrl-C reaches it.
# A background job may have been told to ignore Ctrl-C, and hands that on; at a terminal it means something.
_AT_TERMINAL = (
    "import fcntl, signal, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
)
# Toys that never end a completion and take their time over it.
SLOW = """
import time
from mixlm.engines import toy
plain = toy.ToySession.forward
def forward(self, ids, last):
    time.sleep(0.02)
    out = plain(self, ids, last)
    out[:, -1] = -100
    return out
toy.ToySession.forward = forward
"""


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one sentence and the one hint of a refusal; checks that there is nothing else."""
        assert self.out == ""
        sentence, hint = self.err.splitlines()
        assert sentence.startswith("mixlm: error: ")
        assert hint.startswith("hint: ")
        assert "Traceback" not in self.err
        return self.err


Run = Callable[..., Result]


def process(*arguments: str, stdin: str = "", program: str = MAIN, **environment: str) -> Result:
    """Run the command line, or another program, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        env={**os.environ, **environment},
        timeout=60,
    )
    return Result(done.returncode, done.stdout, done.stderr)


class Terminal:
    """A program at a pseudo-terminal, 100 columns wide."""

    def __init__(self, *arguments: str, before: str = "", **environment: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _AT_TERMINAL + before + MAIN, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", **environment},
        )
        os.close(slave)
        self.screen = ""

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._master, keys.encode())

    def wait_for(self, text: str, *, after: int = 0, seconds: float = 60) -> None:
        """Wait until the screen has shown a text behind its first `after` characters."""
        end = time.monotonic() + seconds
        while text not in self.screen[after:]:
            assert time.monotonic() < end, f"{text!r} never came; the screen is {self.screen!r}"
            self._read(0.1)

    def end(self, seconds: float = 60) -> int:
        """Wait for the program to end and return its exit code."""
        end = time.monotonic() + seconds
        while self._read(0.1) or self._process.poll() is None:
            assert time.monotonic() < end, f"it never ended; the screen is {self.screen!r}"
        return self._process.wait()

    def interrupt(self) -> int:
        """Press Ctrl-C until the program ends; return its exit code.

        A signal that comes while readline is about to wait is seen at the next key only, as at any prompt.
        """
        for _ in range(10):
            if self._process.poll() is None:
                self.type("\x03")
            end = time.monotonic() + 3
            while time.monotonic() < end:
                if not self._read(0.1) and self._process.poll() is not None:
                    return self._process.wait()
        raise AssertionError(f"it never ended; the screen is {self.screen!r}")

    def close(self) -> None:
        """End the program if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._master)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # what Linux says once nobody holds the other end
            time.sleep(0.01)
            return False
        self.screen += data.decode("utf-8", "replace")
        return bool(data)
