"""Many ids as a short text: "0-16,151643,151665-151935"."""

from __future__ import annotations

import re

import numpy as np

from mixlm.types import Ids

BANNED_ARGUMENT = "mixlm_banned"  # the name in requests of the ids that may not be sampled


def format_ranges(ids: Ids) -> str:
    """Write ids, int64 (n,) in ascending order, as ranges."""
    if ids.size == 0:
        return ""
    breaks = np.flatnonzero(np.diff(ids) != 1)
    starts, ends = ids[np.append(0, breaks + 1)].tolist(), ids[np.append(breaks, ids.size - 1)].tolist()
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def parse_ranges(ranges: str) -> Ids:
    """Read what `format_ranges` returns. Raises ValueError for anything else."""
    ids: list[int] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ValueError(f"{part!r} is no id and no range of ids")
        ids.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return np.array(ids, dtype=np.int64)
