"""The folder of an experiment: finished runs, responses of runs that were interrupted, and outputs."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixlm.errors import ConfigError
from mixlm.resumable_log import ResumableLog


class ResultStore:
    """Results of finished runs, by label and settings.

    Raises:
        ConfigError: The folder cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._log = ResumableLog(self.folder / "runs.jsonl", index="run", key="settings", result="result")
        except OSError as error:
            raise ConfigError(f"{self.folder} cannot be written: {error.strerror}", "give another --out") from error

    def get(self, label: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the result of a run with these settings, None when there is none."""
        name = run_name(label, settings)
        record = self._log.get(name, name.rpartition("-")[2])
        return None if record is None else record["result"]

    def put(self, label: str, settings: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the result of a run, and return it as `get` will."""
        name = run_name(label, settings)
        plain: dict[str, Any] = json.loads(json.dumps(result))
        self._log.add(name, name.rpartition("-")[2], {"result": plain})
        return plain

    def responses(self, label: str, settings: Mapping[str, Any]) -> Path:
        """Return the folder for the responses of a run, which may be interrupted."""
        return self.folder / "answers" / run_name(label, settings)

    def write(self, name: str, text: str) -> Path:
        """Write a file whole or not at all, and return its path."""
        path = self.folder / name
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
        return path


def run_name(label: str, settings: Mapping[str, Any]) -> str:
    """Return a file name for a run: readable, and different for different settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return f"{re.sub(r'[^a-z0-9.]+', '-', label.lower()).strip('-')[:80]}-{digest}"
