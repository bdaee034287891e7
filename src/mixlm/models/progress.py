"""How long work on models shows itself: bars at a terminal, one plain line a stage anywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)


class Stage:
    """One piece of work under way. On its own it shows nothing, which is what a stage without a terminal does."""

    def update(self, done: int, total: int | None = None, text: str | None = None) -> None:
        """Set how much is done; `total` and `text` change only when given."""

    def pulse(self, text: str) -> None:
        """Go on to work whose amount is not known."""


class _BarStage(Stage):
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def update(self, done: int, total: int | None = None, text: str | None = None) -> None:
        self._progress.update(self._task, completed=done, total=total, description=text)

    def pulse(self, text: str) -> None:
        self._progress.update(self._task, completed=0, description=text)
        # An update takes None for "as it was", so the total is taken away here.
        self._progress.tasks[self._task].total = None


class Reporter:
    """Shows stages of work on stderr.

    Args:
        console: where to write; stderr when left out.
        show: False shows nothing at all.
    """

    def __init__(self, console: Console | None = None, *, show: bool = True) -> None:
        self._console = console or Console(stderr=True)
        self._show = show

    def line(self, text: str) -> None:
        """Show one line of text."""
        if self._show:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, text: str, total: int | None = None, *, unit: str = "") -> Iterator[Stage]:
        """Show a stage for as long as the block runs.

        Args:
            text: what is being done.
            total: how much there is to do; None pulses until an update gives it.
            unit: "bytes", "items", or "" for a bar without a count.
        """
        if not self._show or not self._console.is_terminal:
            self.line(text)
            yield Stage()
            return
        counts: dict[str, list[ProgressColumn]] = {
            "bytes": [DownloadColumn(), TransferSpeedColumn()],
            "items": [MofNCompleteColumn()],
        }
        columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), *counts.get(unit, [])]
        with Progress(*columns, TimeElapsedColumn(), console=self._console) as progress:
            task = progress.add_task(text, total=total)
            yield _BarStage(progress, task)
            # A bar that pulsed, or counted only a part of the work, ends full all the same. It keeps its first text,
            # so that what stays on the screen reads as a list of what was done.
            end = progress.tasks[task].total or 1
            progress.update(task, total=end, completed=end, description=text)
