"""Many ids as a short text: "0-16,151643,151665-151935"."""

from __future__ import annotations

import re

import numpy as np

from mixlm.types import Ids

BANNED_ARGUMENT = "mixlm_banned"  # what requests call the ids that may not be drawn


def format_ranges(ids: Ids) -> str:
    """Write ids, int64 (n,) in ascending order, as ranges."""
    if ids.size == 0:
        return ""
    breaks = np.flatnonzero(np.diff(ids) != 1)
    starts, ends = ids[np.append(0, breaks + 1)].tolist(), ids[np.append(breaks, ids.size - 1)].tolist()
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def parse_ranges(ranges: str) -> Ids:
    """Read what `as_ranges` wrote. Raises ValueError for anything else."""
    out: list[int] = []
    for part in ranges.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if found is None:
            raise ValueError(f"{part!r} is no id and no range of ids")
        out.extend(range(int(found[1]), int(found[2] or found[1]) + 1))
    return np.array(out, dtype=np.int64)
