"""A cache of scores on disk, so that no model reads a text twice. The least recently used files are removed first.

The files lie in `scores/` of the cache folder and take at most `$MIXLM_SCORES_MB` megabytes, 500 by default; 0 turns
the cache off. 90 kB of text take about 1 MB for each model.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mixlm.engines.base import Engine
from mixlm.errors import ConfigError
from mixlm.models.cache import cache_root
from mixlm.version import __version__

Arrays = Mapping[str, npt.NDArray[Any]]
_LIMIT_VARIABLE = "MIXLM_SCORES_MB"
_MEGABYTES = 500.0


def cached(
    what: Sequence[Any],
    engine: Engine,
    model: str | None,
    data: Iterable[bytes],
    make: Callable[[], Arrays],
    lengths: Mapping[str, int],
) -> Arrays:
    """Return arrays by name, from the cache where they are known.

    Args:
        what: What JSON holds of that which they depend on, beside the engine and mixlm's version.
        engine: The engine.
        model: Its model's identity; None to cache nothing.
        data: Texts and ids that they depend on.
        make: Makes them.
        lengths: Of some arrays, by name; a file with others is made anew.

    Raises:
        ConfigError: `$MIXLM_SCORES_MB` is not a number.
    """
    if model is None:
        return make()
    about = [__version__, *what, engine.name, dict(engine.details), model]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for part in data:
        digest.update(len(part).to_bytes(8, "little") + part)
    path = cache_root() / "scores" / f"{digest.hexdigest()}.npz"
    with suppress(Exception):  # not there, or damaged: numpy and zipfile raise errors of many kinds
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays: Arrays = dict(file)
        if all(len(arrays[name]) == length for name, length in lengths.items()):
            with suppress(OSError):
                os.utime(path)
            return arrays
    arrays = make()
    _write(path, arrays, _limit())
    return arrays


def _write(path: Path, arrays: Arrays, limit_bytes: float) -> None:
    """Write a file atomically and enforce the limit. A cache that cannot be written is no error."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        try:
            with open(handle, "wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _evict(path.parent, limit_bytes)


def _limit() -> float:
    """Return the limit in bytes. Raises ConfigError for a setting that is not a number, or negative."""
    setting = os.environ.get(_LIMIT_VARIABLE, "")
    try:
        megabytes = float(setting) if setting else _MEGABYTES
    except ValueError:
        megabytes = -1
    if not megabytes >= 0:
        raise ConfigError(f"{_LIMIT_VARIABLE} is {setting!r}; it must be a number of megabytes, 0 or more")
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
