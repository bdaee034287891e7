"""A cache of scores on disk, so that no model reads a text twice. The least recently used files are removed first.

The files lie in `scores/` of the cache folder and take at most `$MIXLM_SCORES_MB` megabytes, 500 by default; 0 turns
the cache off. 90 kB of text take about 1 MB for each model.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from mixlm.errors import ConfigError
from mixlm.models.cache import cache_root
from mixlm.version import __version__

LIMIT_VARIABLE = "MIXLM_SCORES_MB"
_MEGABYTES = 500.0


def folder() -> Path:
    """Return the folder of the cache."""
    return cache_root() / "scores"


def path_of(about: Sequence[Any], data: Iterable[bytes]) -> Path:
    """Return the file of a result: a hash of mixlm's version and of all that it depends on.

    Args:
        about: What JSON holds of that.
        data: Texts and ids.
    """
    digest = hashlib.sha256(json.dumps([__version__, *about], sort_keys=True).encode())
    for part in data:
        digest.update(len(part).to_bytes(8, "little") + part)
    return folder() / f"{digest.hexdigest()}.npz"


T = TypeVar("T")


def get(path: Path, load: Callable[[Path], T]) -> T | None:
    """Return what a file holds and mark it as used; None for a missing or damaged file.

    load: reads a file, or raises ConfigError.
    """
    if not path.is_file():
        return None
    try:
        value = load(path)
    except ConfigError:
        return None
    with suppress(OSError):
        os.utime(path)
    return value


def put(save: Callable[[str], None], path: Path) -> None:
    """Write a file atomically and enforce the limit. A cache that cannot be written is no error.

    save: writes to a path. Raises ConfigError for a limit that is not a number.
    """
    limit_bytes = limit()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        os.close(handle)
        try:
            save(temporary)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _evict(path.parent, limit_bytes)


def limit() -> float:
    """Return the limit in bytes. Raises ConfigError for a setting that is not a number, or negative."""
    setting = os.environ.get(LIMIT_VARIABLE, "")
    try:
        megabytes = float(setting) if setting else _MEGABYTES
    except ValueError:
        megabytes = -1
    if not megabytes >= 0:
        raise ConfigError(f"{LIMIT_VARIABLE} is {setting!r}; it must be a number of megabytes, 0 or more")
    return megabytes * 1e6


def _evict(directory: Path, limit_bytes: float) -> None:
    """Remove the least recently used files until the rest fits."""
    files = sorted(((path.stat(), path) for path in directory.glob("*.npz")), key=lambda entry: -entry[0].st_mtime_ns)
    total = 0
    for status, path in files:
        total += status.st_size
        if total > limit_bytes:
            # Another process may have removed it.
            path.unlink(missing_ok=True)
