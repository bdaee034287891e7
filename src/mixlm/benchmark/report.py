"""What a benchmark says, and on what it was measured."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mixlm.engines import Engine
from mixlm.engines.base import total_weight_bytes


@dataclass(frozen=True, slots=True)
class MethodRun:
    """One method's medians over repeats. Speeds are of decoding alone, after every member has read the prompt.

    label: unique among the runs. tokens, forwards: of a repeat; the forwards by member. seconds_by_forward_length: mean
    seconds of a forward by the number of tokens it ran. outside_forwards_*: what a token costs outside its forwards;
    share of the time, and milliseconds over all of a text, its first and its last quarter; None where that is not
    known. draft, checked, accepted: who wrote ahead, guesses that were checked in all repeats, and those that were
    right. chosen: what `auto` used last. predicted_tokens_per_second: by the cost model, where it has a formula.
    memory_bytes: in use at the end of a run, weights of all members included.
    """

    method: str
    members: tuple[str, ...]
    tokens_per_second: float
    bytes_per_second: float
    seconds_to_first_token: float
    forwards: Mapping[str, float]
    seconds_by_forward_length: Mapping[str, Mapping[int, float]]
    outside_forwards_share: float | None
    outside_forwards_ms: float | None
    outside_forwards_ms_first_quarter: float | None
    outside_forwards_ms_last_quarter: float | None
    label: str = ""
    tokens: float = 0.0
    draft: str | None = None
    checked: int = 0
    accepted: int = 0
    chosen: str | None = None
    predicted_tokens_per_second: float | None = None
    memory_bytes: int | None = None
    slowest_tokens_per_second: float = 0.0
    fastest_tokens_per_second: float = 0.0

    @property
    def acceptance(self) -> float | None:
        """The share of guesses that were right; None where none were checked."""
        return self.accepted / self.checked if self.checked else None


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All runs of a benchmark, the ratios between them, and what they were taken on.

    ratios: see `ratios.ratios`. notes: what a reader has to know to take the numbers for what they are.
    """

    runs: tuple[MethodRun, ...]
    ratios: Mapping[str, float]
    environment: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the form that `--json` writes."""
        return {
            "runs": [{**asdict(one), "acceptance": one.acceptance} for one in self.runs],
            "ratios": dict(self.ratios),
            "environment": dict(self.environment),
            **({"notes": list(self.notes)} if self.notes else {}),
        }


def environment(engines: Sequence[Engine], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return machine, versions, command, settings and memory."""
    packages = ("mixlm", "torch", "transformers", "tokenizers", "numpy")
    versions = {name: found for name in packages if (found := _version(name)) is not None}
    distinct = {id(one): one for one in engines}.values()
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "engines": {one.name: dict(one.details) for one in distinct},
        "weights_bytes": total_weight_bytes(engines),
        "peak_memory_bytes": _peak_memory(),
        **_accelerator(),
        "settings": dict(settings),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _peak_memory() -> int:
    """Return the most memory this process has had resident, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_in_use() -> int | None:
    """Return the bytes of memory in use now: the accelerators' where there are any, else what is resident."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return sum(int(torch.cuda.memory_allocated(i)) for i in range(torch.cuda.device_count()))
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _accelerator() -> dict[str, Any]:
    """Return the accelerator's name and its peak memory, when one is in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    return {
        "accelerator": torch.cuda.get_device_name(0),
        "accelerator_peak_memory_bytes": sum(
            torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())
        ),
    }
