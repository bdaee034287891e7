"""The report of a benchmark, and the machine that it ran on."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mixlm.engines import Engine
from mixlm.engines.base import total_weight_bytes


@dataclass(frozen=True, slots=True)
class MethodRun:
    """One method's medians over repeats. Speeds are of decoding alone, after every member has prefilled the prompt.

    Args:
        label: Unique among the runs.
        tokens: Tokens of a repeat.
        forwards: Forwards of a repeat, by member.
        seconds_by_forward_length: Mean seconds of a forward by its number of tokens, by member.
        outside_forwards_share: Share of the time outside forwards; None where it is not known.
        outside_forwards_ms: Milliseconds per token outside forwards; also of the first and the last quarter of a text.
        drafted, accepted: Drafts that were verified, and accepted, in all repeats.
        plan: What `auto` did last.
        predicted_tokens_per_second: By the cost model, where it has a formula.
        memory_bytes: Memory in use at the end of a run, all members' weights included.
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
    drafted: int = 0
    accepted: int = 0
    plan: str | None = None
    predicted_tokens_per_second: float | None = None
    memory_bytes: int | None = None
    slowest_tokens_per_second: float = 0.0
    fastest_tokens_per_second: float = 0.0

    @property
    def acceptance(self) -> float | None:
        """The share of drafts that were accepted; None where none were verified."""
        return self.accepted / self.drafted if self.drafted else None

    def as_dict(self) -> dict[str, Any]:
        """Return the form that `--json` writes; `checked` and `chosen` are older names of `drafted` and `plan`."""
        return {**asdict(self), "acceptance": self.acceptance, "checked": self.drafted, "chosen": self.plan}


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All runs of a benchmark.

    ratios: of speeds, see `speed_ratios`. notes: what a reader has to know to interpret the numbers.
    """

    runs: tuple[MethodRun, ...]
    ratios: Mapping[str, float]
    environment: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the form that `--json` writes."""
        return {
            "runs": [run.as_dict() for run in self.runs],
            "ratios": dict(self.ratios),
            "environment": dict(self.environment),
            **({"notes": list(self.notes)} if self.notes else {}),
        }


def environment(engines: Sequence[Engine], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return machine, versions, command, settings and memory."""
    versions = {}
    for name in ("mixlm", "torch", "transformers", "tokenizers", "numpy"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    distinct = {id(engine): engine for engine in engines}.values()
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "engines": {engine.name: dict(engine.details) for engine in distinct},
        "weights_bytes": total_weight_bytes(engines),
        **_peak_memory(),
        **_accelerator(),
        "settings": dict(settings),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _peak_memory() -> dict[str, int]:
    """Return the most memory this process has had resident, in bytes, where the system counts it."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_memory_bytes": peak if sys.platform == "darwin" else peak * 1024}


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
