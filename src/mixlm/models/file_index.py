"""What was computed of large files, kept in the cache by their path, size and time of change."""

from __future__ import annotations

import json
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
    except (OSError, ValueError, TypeError):
        entries = {}
    if key not in entries:
        value = compute()
        entries = {entry: other for entry, other in entries.items() if Path(entry.rsplit("|", 2)[0]).exists()}
        entries[key] = value
        # The index is only a cache; that it cannot be written is reported later.
        with suppress(OSError):
            index_file.parent.mkdir(parents=True, exist_ok=True)
            write_json(index_file, entries)
    return entries[key]
