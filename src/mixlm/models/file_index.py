"""What was computed of large files, kept in the cache by their path, size and time of change."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mixlm.models.cache import cache_root, write_json


def remembered(path: Path, index: str, compute: Callable[[], Any]) -> Any:
    """Return what `compute` returns, from an index if the file has not changed since.

    Args:
        path: The file.
        index: Name of the index, a JSON file in the cache.
        compute: Computes what JSON can hold of the file.

    Raises:
        OSError: There is no such file.
    """
    index_file = cache_root() / index
    stat = path.stat()
    key = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
    try:
        entries = dict(json.loads(index_file.read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        entries = {}
    if key not in entries:
        entries[key] = compute()
        # The index is only a cache; that it cannot be written is reported later.
        with suppress(OSError):
            entries = {entry: value for entry, value in entries.items() if os.path.exists(entry.rsplit("|", 2)[0])}
            index_file.parent.mkdir(parents=True, exist_ok=True)
            write_json(index_file, entries)
    return entries[key]
