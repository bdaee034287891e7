"""The folder of an evaluation: its settings, and a log of the responses for each task, method and seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mixlm.errors import ConfigError
from mixlm.resumable_log import ResumableLog, exclusive

_SETTINGS = "settings.json"
_LOCK = ".lock"


def response_log(path: Path | None = None) -> ResumableLog:
    """Open the responses to one list of requests, by a request's place in it; None keeps them in memory."""
    return ResumableLog(path, result="response")


def request_key(arguments: tuple[Any, ...]) -> str:
    """Return a digest of a request's arguments."""
    form = json.dumps(arguments, sort_keys=True, default=str)
    return hashlib.sha256(form.encode()).hexdigest()[:16]


def responses_path(folder: Path, task: str, method: str, seed: int) -> Path:
    """Return the file of the responses of one run. Any names will do."""
    return folder / quote(task, safe="") / quote(method, safe="") / f"seed-{seed}.jsonl"


@contextmanager
def locked_folder(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Lock a folder for responses: a new one, or one that was begun with equal settings.

    Raises:
        ConfigError: Settings differ (the message names the first key), another run has the lock, or the folder cannot
            be used.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(folder / _LOCK))
            _begin(folder, settings)
        except OSError as error:
            raise ConfigError(f"answers cannot be kept in {folder}: {error.strerror}", "give another folder") from error
        yield


def _begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a folder, or compare them with those it was begun with."""
    path = folder / _SETTINGS
    now = json.loads(json.dumps(settings))
    if not path.exists():
        path.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}", "give another folder") from error
    if (difference := _difference(before, now)) is not None:
        key, old, new = difference
        raise ConfigError(
            f"{folder} was begun with {key} = {old}, and this run has {new}",
            "give another folder, or the settings and questions that this one was begun with",
        )


def _difference(before: Any, now: Any, key: str = "") -> tuple[str, str, str] | None:
    """Return the first key in which two JSON values differ, with both values."""
    if isinstance(before, list) and isinstance(now, list):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if not isinstance(before, dict) or not isinstance(now, dict):
        return None if before == now else (key, json.dumps(before), json.dumps(now))
    for name in [*before, *(name for name in now if name not in before)]:
        place = f"{key}.{name}" if key else str(name)
        if name not in before or name not in now:
            return place, json.dumps(before.get(name)), json.dumps(now.get(name))
        if (difference := _difference(before[name], now[name], place)) is not None:
            return difference
    return None
