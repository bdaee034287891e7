"""Many replies at once: how many tokens a second come out while all of them are being written.

The window begins when every reply has its first token and ends when the first reply is finished, so that neither
reading prompts nor the emptying at the end is in it. How long the whole batch takes, from the first prompt to the last
token, is measured beside it, and set against the same replies written one by one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from mixlm.benchmark.report import memory_in_use
from mixlm.benchmark.timing import TimedRun, draft_name, method_settings, single_member
from mixlm.engines.base import Forward
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from mixlm.generation.generation import Generation
from mixlm.generation.scheduler import Scheduler

SIZES = (1, 2, 4, 8, 16, 32, 64)
KINDS = ("single", "conventional", "mixture")
_AHEAD = ("speculative", "drafted")


class BatchContestant:
    """One method writing `size` replies at once. whole: seconds of each whole batch so far, the warm-up's first."""

    def __init__(self, ensemble: Ensemble, kind: str, size: int, prompt: str, options: Mapping[str, Any]) -> None:
        self.method = kind
        self.series = kind if kind != "single" else f"single {ensemble.names[0]}"
        self.label = f"{self.series}, {size} at once"
        self.members = ensemble.names
        self.size = size
        self.whole: list[float] = []
        self._ensemble = ensemble
        # Continued as it stands, without a template: its strings that end a reply would end some sooner than others.
        self._settings = method_settings(ensemble, kind, {**options, "raw": True})
        self.draft = draft_name(ensemble, self._settings) if kind in _AHEAD else None
        self._prompts = ensemble.encode_prompt(prompt, self._settings)

    def measure(self, sequence: int, tokens: int) -> TimedRun:
        """Write replies of `tokens` + 1 tokens. The sample is of the window in which all of them are under way."""
        scheduler = Scheduler(self.size)
        streams = self._streams(sequence, tokens)
        for one in streams:
            scheduler.add(one)
        window = _SteadyWindow(len(streams))
        while not scheduler.idle:
            scheduler.step()
            window.look(streams)
        for one in streams:
            if one.error is not None:
                raise one.error
        self.whole.append(window.latest - window.start)
        return TimedRun(
            tokens=window.tokens,
            seconds=window.seconds,
            first=window.begin - window.start,
            bytes=0,
            forwards=window.forwards,
            memory=window.memory,
        )

    def one_by_one(self, sequence: int, tokens: int) -> float:
        """Write the same replies one after the other, and return the seconds it takes."""
        start = time.perf_counter()
        for one in self._streams(sequence, tokens):
            one.finish()
            one.release()
        return time.perf_counter() - start

    def _streams(self, sequence: int, tokens: int) -> list[Generation]:
        settings = replace(self._settings, max_tokens=tokens + 1)
        numbers = range(sequence * self.size, (sequence + 1) * self.size)
        writers = [self._ensemble.context(replace(settings, sequence=number)) for number in numbers]
        return [one.start(self._prompts) for one in writers]


class _SteadyWindow:
    """The time between the last reply's first token and the first reply's last."""

    def __init__(self, replies: int) -> None:
        self.start = self.begin = self.latest = time.perf_counter()
        self.seconds = 0.0
        self.tokens = 0
        self.memory: int | None = None
        self.forwards: list[list[Forward]] = []
        self._replies = replies
        self._logs: list[list[int]] = []
        self._before: int | None = None
        self._open = True

    def look(self, streams: Sequence[Generation]) -> None:
        """Take down what has been written by now."""
        self.latest = time.perf_counter()
        if not self._open:
            return
        counts = [len(one.ready) for one in streams]
        if self._before is None:
            if all(counts):
                self.begin, self._before = self.latest, sum(counts)
                self._logs = [[len(session.stats.forwards) for session in one.sessions] for one in streams]
            elif any(one.finished for one in streams):
                raise ConfigError(
                    f"a reply was finished before all {self._replies} had begun", "write more tokens in each"
                )
            return
        self.seconds, self.tokens = self.latest - self.begin, sum(counts) - self._before
        if any(one.finished for one in streams):
            self._open, self.memory = False, memory_in_use()
            self.forwards = [
                [
                    f
                    for one, seen in zip(streams, self._logs, strict=True)
                    for f in one.sessions[i].stats.forwards[seen[i] :]
                ]
                for i in range(len(streams[0].sessions))
            ]


@dataclass(frozen=True)
class OfflineBatch:
    """A whole batch of replies together, and the same one by one: seconds."""

    label: str
    replies: int
    together: float
    one_by_one: float

    @property
    def ratio(self) -> float:
        """How many times as long one by one takes."""
        return self.one_by_one / self.together


def batch_contestants(
    ensemble: Ensemble, kinds: Sequence[str], sizes: Sequence[int], prompt: str, options: Mapping[str, Any]
) -> list[BatchContestant]:
    """Return what is measured: every method at every size, `single` for each member alone."""
    found: list[BatchContestant] = []
    for size in sizes:
        for kind in kinds:
            those = (
                [ensemble] if kind != "single" else [single_member(ensemble, i) for i in range(len(ensemble.members))]
            )
            found += [BatchContestant(one, kind, size, prompt, options) for one in those]
    return found


def compare_offline(those: Sequence[BatchContestant], tokens: int) -> OfflineBatch | None:
    """Set the largest batch of the mixture (of the last method, without one) against its replies one by one."""
    largest = max(one.size for one in those)
    of_it = [one for one in those if one.size == largest]
    one = next((one for one in of_it if one.method == "mixture"), of_it[-1])
    if largest < 2:
        return None
    together = median(one.whole[1:] or one.whole)
    return OfflineBatch(one.series, largest, together, one.one_by_one(1, tokens))
