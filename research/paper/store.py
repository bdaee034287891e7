"""Finished runs on disk: each is one JSON file with the settings it ran with, and is not run again."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixlm.errors import ConfigError


class Store:
    """A folder of finished runs. Raises ConfigError when it cannot be made or written."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.folder} cannot be written: {error.strerror}", "give another --out") from error

    def get(self, label: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what a run with these settings found, None when there is no whole one."""
        try:
            raw = json.loads(self._path(label, key).read_text(encoding="utf-8"))
            if raw["key"] == _plain(key):
                found: dict[str, Any] = raw["found"]
                return found
        except (OSError, ValueError, TypeError, KeyError):
            pass  # a file that is not whole is as good as none
        return None

    def put(self, label: str, key: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        """Keep what a run found, and return it as it will be read."""
        self.write(f"runs/{self._path(label, key).name}", json.dumps({"key": key, "found": found}, indent=2) + "\n")
        kept: dict[str, Any] = _plain(found)
        return kept

    def answers(self, label: str, key: Mapping[str, Any]) -> Path:
        """Return the folder for the answers of a run that may stop half-way."""
        return self.folder / "answers" / name_of(label, key)

    def write(self, name: str, text: str) -> Path:
        """Write a file whole or not at all, and return its path."""
        path = self.folder / name
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
        return path

    def _path(self, label: str, key: Mapping[str, Any]) -> Path:
        return self.folder / "runs" / f"{name_of(label, key)}.json"


def name_of(label: str, key: Mapping[str, Any]) -> str:
    """Return a file name for a run: readable, and different for different settings."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return f"{re.sub(r'[^a-z0-9.]+', '-', label.lower()).strip('-')[:80]}-{digest}"


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
