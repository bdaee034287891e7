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
    old, new = _flat(before), _flat(now)
    for key in old | new:
        if key not in old or key not in new or old[key] != new[key]:
            was, has = (json.dumps(flat[key]) if key in flat else "nothing" for flat in (old, new))
            raise ConfigError(
                f"{folder} was begun with {key} = {was}, and this run has {has}",
                "give another folder, or the settings and questions that this one was begun with",
            )


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Return the values of a JSON value by their keys, with dots between those of different depths."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {key: value}
    parts = [_flat(part, f"{key}.{name}" if key else str(name)) for name, part in value.items()]
    return {name: leaf for part in parts for name, leaf in part.items()}
