"""Scores of texts on disk, so that no model reads a text twice. What was not used for longest makes room.

They lie in `scores/` of the cache folder and take at most `$MIXLM_SCORES_MB` megabytes, 500 when it is not set; 0 keeps
none. 90 kB of text take about 1 MB for each model.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

from mixlm.errors import ConfigError
from mixlm.models import cache_root

LIMIT = "MIXLM_SCORES_MB"
_MEGABYTES = 500.0


def folder() -> Path:
    """Return the folder that scores are kept in."""
    return cache_root() / "scores"


class Kept(Protocol):
    """What can be kept: scores, or what scores are made of."""

    def save(self, path: str) -> None:
        """Write it to a file."""
        ...


T = TypeVar("T")


def get(path: Path, load: Callable[[Path], T]) -> T | None:
    """Return what a file holds, and note that it was used; None where there is none, or it is spoiled.

    load: reads a file, or raises ConfigError.
    """
    if not path.is_file():
        return None
    try:
        found = load(path)
    except ConfigError:
        return None
    with suppress(OSError):
        os.utime(path)
    return found


def put(scores: Kept, path: Path) -> None:
    """Write scores by one rename, and make room. A cache that cannot be written is no reason to fail.

    Raises ConfigError for a limit that is no number.
    """
    most = limit()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        os.close(handle)
        try:
            scores.save(draft)
            os.replace(draft, path)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise
        _make_room(path.parent, most)


def limit() -> float:
    """Return how many bytes scores may take. Raises ConfigError for a setting that is no number, or negative."""
    given = os.environ.get(LIMIT, "")
    try:
        megabytes = float(given) if given else _MEGABYTES
    except ValueError:
        megabytes = -1
    if not megabytes >= 0:
        raise ConfigError(f"{LIMIT} is {given!r}; it must be a number of megabytes, 0 or more")
    return megabytes * 1e6


def _make_room(where: Path, most: float) -> None:
    """Remove what was not used for longest, until the rest fits."""
    files = sorted(((one.stat(), one) for one in where.glob("*.npz")), key=lambda pair: -pair[0].st_mtime_ns)
    total = 0
    for about, one in files:
        total += about.st_size
        if total > most:
            # Another process may have removed it.
            one.unlink(missing_ok=True)
