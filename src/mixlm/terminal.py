"""Output at a terminal: colours, visible control characters, and the progress of long work.

Progress goes to stderr: bars at a terminal; elsewhere one plain line per stage, or nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

# Reports progress: what is being done, how many steps are done, and how many there are.
Progress = Callable[[str, int, int], None]

# A terminal would obey control characters, and a text may contain any.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def visible(text: str) -> str:
    """Return the text with a visible character in place of every control character but newline and tab."""
    return text.translate(_VISIBLE)


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether a stream is a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def has_colours(stream: IO[str] | None) -> bool:
    """Whether to write colours to a stream. NO_COLOR and FORCE_COLOR take precedence over what the stream is."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") != "0":
        return True
    return is_terminal(stream) and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str, stream: IO[str] | None) -> str:
    """Return the text in a style, an ANSI code, if the stream takes colours."""
    return f"\x1b[{style}m{text}\x1b[0m" if text and has_colours(stream) else text


class Stage:
    """A stage of work in progress, shown as a task of bars; without bars, it shows nothing."""

    def __init__(self, bars: Bars | None = None, task: TaskID | None = None) -> None:
        self._shown = None if bars is None or task is None else (bars, task)

    def update(self, done: int, total: int | None = None, text: str | None = None) -> None:
        """Set the steps done, and the total and the text if they are given."""
        if self._shown is not None:
            bars, task = self._shown
            bars.update(task, completed=done, total=total, description=None if text is None else visible(text))

    def pulse(self, text: str) -> None:
        """Continue with work of unknown length."""
        self.update(0, text=text)
        if self._shown is not None:
            bars, task = self._shown
            bars.tasks[task].total = None  # for `update`, None means unchanged


class ProgressDisplay:
    """Shows stages of work on a console, by default stderr: a bar each at a terminal, one line each elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._given = console

    @property
    def _console(self) -> Console:
        return self._given or _stderr()

    def line(self, text: str) -> None:
        """Show one line of text."""
        self._console.print(visible(text), markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, text: str, total: int | None = None, *, unit: str = "") -> Iterator[Stage]:
        """Show a stage while the block runs.

        total: the number of steps; None if an update gives it later. unit: "bytes", "items", or "" for no count.
        """
        if not self._console.is_terminal:
            self.line(text)
            yield Stage()
            return
        with _bars(self._console, unit) as bars:
            task = bars.add_task(visible(text), total=total)
            yield Stage(bars, task)
            # Bars that pulsed or counted a part of the work end full, with their first text: a list of what was done.
            end = bars.tasks[task].total or 1
            bars.update(task, total=end, completed=end, description=visible(text))


@contextmanager
def progress_bars(*, single: bool = False) -> Iterator[Progress | None]:
    """Yield a function that shows progress as bars, which disappear at the end; None if stderr is no terminal.

    single: one bar whose label changes, instead of one bar per label.
    """
    if not is_terminal(sys.stderr):
        yield None
        return
    tasks: dict[str, TaskID] = {}
    with _bars(_stderr(), "items", transient=True) as bars:

        def show(label: str, done: int, total: int) -> None:
            key = "" if single else label
            if key not in tasks:
                tasks[key] = bars.add_task(visible(label), total=total)
            bars.update(tasks[key], description=visible(label), completed=done, total=total)

        yield show


def _stderr() -> Console:
    from rich.console import Console

    return Console(file=sys.stderr, force_terminal=is_terminal(sys.stderr))


def _bars(console: Console, unit: str, *, transient: bool = False) -> Bars:
    from rich import progress

    counts: dict[str, list[progress.ProgressColumn]] = {
        "bytes": [progress.DownloadColumn(), progress.TransferSpeedColumn()],
        "items": [progress.MofNCompleteColumn()],
    }
    text = progress.TextColumn("{task.description}", markup=False)
    columns = [progress.SpinnerColumn(), text, progress.BarColumn(), *counts.get(unit, [])]
    return progress.Progress(*columns, progress.TimeElapsedColumn(), console=console, transient=transient)
