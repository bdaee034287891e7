"""Throughput: tokens per second while many completions are generated together.

The window begins when every completion has its first token and ends when the first one is finished, so that it contains
neither prefill nor the batch running empty. The time of the whole batch, from the first prompt to the last token, is
measured too, and compared with the same completions one by one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from mixlm.benchmark.report import memory_in_use
from mixlm.benchmark.timing import TimedRun, method_settings, single_member
from mixlm.engines.requests import Forward
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from mixlm.generation.generation import Generation
from mixlm.generation.scheduler import Scheduler

SIZES = (1, 2, 4, 8, 16, 32, 64)
KINDS = ("single", "conventional", "mixture")


class BatchContestant:
    """One method writing `size` completions at once. whole: seconds of each whole batch so far, the warm-up's first."""

    def __init__(self, ensemble: Ensemble, kind: str, size: int, prompt: str, options: Mapping[str, Any]) -> None:
        self.method = kind
        self.series = kind if kind != "single" else f"single {ensemble.names[0]}"
        self.label = f"{self.series}, {size} at once"
        self.members = ensemble.names
        self.size = size
        self.whole: list[float] = []
        self._ensemble = ensemble
        # Raw: the stop strings of a template would end some completions sooner than others.
        self._settings = method_settings(ensemble, kind, {**options, "raw": True})
        self.draft = self._settings.draft
        self._prompts = ensemble.encode_prompt(prompt, self._settings)

    def measure(self, sequence: int, tokens: int) -> TimedRun:
        """Write completions of `tokens` + 1 tokens. The sample is of the window in which all of them are under way."""
        scheduler = Scheduler(self.size)
        streams = self._streams(sequence, tokens)
        for generation in streams:
            scheduler.add(generation)
        window = _SteadyWindow(len(streams))
        while not scheduler.idle:
            scheduler.step()
            window.look(streams)
        for generation in streams:
            if generation.error is not None:
                raise generation.error
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
        """Write the same completions one after the other, and return the seconds it takes."""
        start = time.perf_counter()
        for stream in self._streams(sequence, tokens):
            stream.finish()
            stream.release()
        return time.perf_counter() - start

    def _streams(self, sequence: int, tokens: int) -> list[Generation]:
        settings = replace(self._settings, max_tokens=tokens + 1)
        numbers = range(sequence * self.size, (sequence + 1) * self.size)
        writers = [self._ensemble.context(replace(settings, sequence=number)) for number in numbers]
        return [writer.start(self._prompts) for writer in writers]


class _SteadyWindow:
    """The time between the last completion's first token and the first completion's last."""

    def __init__(self, count: int) -> None:
        self.start = self.begin = self.latest = time.perf_counter()
        self.seconds = 0.0
        self.tokens = 0
        self.memory: int | None = None
        self.forwards: list[list[Forward]] = []
        self._count = count
        self._logs: list[list[int]] = []
        self._before: int | None = None
        self._open = True

    def look(self, streams: Sequence[Generation]) -> None:
        """Take down what has been written by now."""
        self.latest = time.perf_counter()
        if not self._open:
            return
        counts = [len(generation.ready) for generation in streams]
        if self._before is None:
            if all(counts):
                self.begin, self._before = self.latest, sum(counts)
                self._logs = [
                    [len(session.stats.forwards) for session in generation.sessions] for generation in streams
                ]
            elif any(generation.finished for generation in streams):
                raise ConfigError(
                    f"a completion was finished before all {self._count} had begun", "generate more tokens in each"
                )
            return
        self.seconds, self.tokens = self.latest - self.begin, sum(counts) - self._before
        if any(generation.finished for generation in streams):
            self._open, self.memory = False, memory_in_use()
            self.forwards = [
                [
                    f
                    for generation, seen in zip(streams, self._logs, strict=True)
                    for f in generation.sessions[i].stats.forwards[seen[i] :]
                ]
                for i in range(len(streams[0].sessions))
            ]


@dataclass(frozen=True)
class OfflineBatch:
    """A whole batch of completions together, and the same one by one: seconds."""

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
    contestants: list[BatchContestant] = []
    for size in sizes:
        for kind in kinds:
            ensembles = (
                [ensemble] if kind != "single" else [single_member(ensemble, i) for i in range(len(ensemble.members))]
            )
            contestants += [BatchContestant(source, kind, size, prompt, options) for source in ensembles]
    return contestants


def compare_offline(contestants: Sequence[BatchContestant], tokens: int) -> OfflineBatch | None:
    """Set the largest batch of the mixture (of the last method, without one) against its completions one by one."""
    largest = max(contestant.size for contestant in contestants)
    of_it = [contestant for contestant in contestants if contestant.size == largest]
    contestant = next((contestant for contestant in of_it if contestant.method == "mixture"), of_it[-1])
    if largest < 2:
        return None
    together = median(contestant.whole[1:] or contestant.whole)
    return OfflineBatch(contestant.series, largest, together, contestant.one_by_one(1, tokens))
