"""Finished work on disk, so that an interrupted run continues where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from mixlm.errors import ConfigError


class ResumableLog:
    """Records of finished work, by index: one JSON object per line, written as soon as the work is done.

    A record holds its index and the key of its request: everything that its result depends on, or a digest of it. A
    last line that was cut off is removed when the log is opened.

    Args:
        path: The file, JSON Lines; None keeps the records in memory.
        index: The field of a record that holds its index.
        key: The field that holds the key of its request.
        result: A field that every record has.

    Raises:
        ConfigError: A line is not such a record.
    """

    def __init__(self, path: Path | None = None, *, index: str = "index", key: str = "request", result: str) -> None:
        self.records: dict[Any, dict[str, Any]] = {}
        self._path = path
        self._index, self._key, self._result = index, key, result
        if path is not None and path.exists():
            self._read(path)

    def get(self, index: int | str, key: Any) -> dict[str, Any] | None:
        """Return the record of a request, None if there is none.

        Raises:
            ConfigError: The record has another key, so the file belongs to another run.
        """
        record = self.records.get(index)
        if record is not None and record[self._key] != key:
            raise ConfigError(
                f"{self._path}: {self._index} {index} is of another request, or was made with other settings",
                "name another place, or give the requests and settings that this one was begun with",
            )
        return record

    def check(self, key: Any) -> None:
        """Raise ConfigError where a record has another key, in a file of which all records depend on the same."""
        for index in self.records:
            self.get(index, key)

    def get_or_make(self, index: int | str, key: Any, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the record of a request, which is made where there is none. Raises what `get` does."""
        if self.get(index, key) is None:
            self.add(index, key, make())
        return self.records[index]

    def add(self, index: int | str, key: Any, fields: Mapping[str, Any]) -> None:
        """Write a record to the end of the file. key: as JSON has it, lists in place of tuples."""
        record = {self._index: index, self._key: key, **fields}
        self.records[index] = record
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.truncate(path, end)
        for number, line in enumerate(data[:end].splitlines(), start=1):
            try:
                record = json.loads(line)
                _ = record[self._key], record[self._result]
                self.records[record[self._index]] = record
            except (ValueError, TypeError, KeyError):
                raise ConfigError(
                    f"{path}, line {number}: expected a JSON object with {self._index}, {self._key}, {self._result}",
                    "remove the line to have it made again, or name another file",
                ) from None


@contextmanager
def exclusive(path: Path, waiting: AbstractContextManager[Any] | None = None) -> Iterator[None]:
    """Hold the lock of a file, which is made if it is not there and is never removed, or two could hold its lock.

    The system releases the lock when the process ends, however it ends.

    Args:
        path: The file.
        waiting: Entered while another process holds the lock.

    Raises:
        ConfigError: Another process holds the lock, and nothing is given to wait in.
    """
    from filelock import lock_descriptor

    with path.open("a") as file:
        if not lock_descriptor(file.fileno(), blocking=False):
            if waiting is None:
                place = str(path).removesuffix(".lock")
                raise ConfigError(f"{place} is being written by another mixlm", "wait for it, or name another place")
            with waiting:
                lock_descriptor(file.fileno())
        yield
