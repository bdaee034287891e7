"""Answers on disk: one JSON object a line, written as soon as it is there, so that an interrupted run can go on."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mixlm.errors import ConfigError

_SETTINGS = "settings.json"
_LOCK = ".lock"
_ELSEWHERE = "give another folder, or the settings and questions that this one was begun with"


class AnswerLog:
    """The answers of one run, by the request's place; without a path they are kept in memory alone.

    A last line that was cut off is dropped. Raises ConfigError for any other line that is no answer.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self.entries: dict[int, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._read(path)

    def knows(self, at: int, arguments: tuple[Any, ...]) -> bool:
        """Whether a request is answered. Raises ConfigError when the answer there is one to other arguments."""
        entry = self.entries.get(at)
        if entry is None:
            return False
        if entry["request"] != _digest(arguments):
            raise ConfigError(f"{self._path}: request {at} was another when this folder was begun", _ELSEWHERE)
        return True

    def response(self, at: int) -> Any:
        """Return an answer."""
        return self.entries[at]["response"]

    def add(self, at: int, arguments: tuple[Any, ...], entry: Mapping[str, Any]) -> None:
        """Note an answer: `entry` has a "response", and whatever else is worth to be kept."""
        whole = {"index": at, "request": _digest(arguments), **entry}
        self.entries[at] = whole
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(whole) + "\n")

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with path.open("r+b") as file:
                file.truncate(whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                entry = json.loads(line)
                _ = entry["request"], entry["response"]
                self.entries[int(entry["index"])] = entry
            except (ValueError, TypeError, KeyError):
                raise ConfigError(
                    f"{path}, line {number}: this is no answer; expected a JSON object with index, request, response",
                    "take the line out, and it is answered anew",
                ) from None


def answers_path(folder: Path, task: str, law: str, seed: int) -> Path:
    """Return where the answers of one run lie. Any names will do."""
    return folder / quote(task, safe="") / quote(law, safe="") / f"seed-{seed}.jsonl"


@contextmanager
def locked(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold a folder for answers, which is made, or was begun with equal settings.

    The system lets go of it when the process ends, however it ends. Raises ConfigError that names the first key in
    which settings differ, or says why the folder cannot be used, which it cannot while another run does.
    """
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = held.enter_context((folder / _LOCK).open("a"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _begin(folder, settings)
        except BlockingIOError:
            raise ConfigError(
                f"another run is writing to {folder} at this moment", "wait until it has ended, or give another folder"
            ) from None
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
    if (found := _difference(before, now)) is not None:
        key, old, new = found
        raise ConfigError(f"{folder} was begun with {key} = {old}, and this run has {new}", _ELSEWHERE)


def _difference(before: Any, now: Any, key: str = "") -> tuple[str, str, str] | None:
    """Return the first key in which two JSON values differ, with both values."""
    if isinstance(before, list) and isinstance(now, list):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if not isinstance(before, dict) or not isinstance(now, dict):
        return None if before == now else (key, json.dumps(before), json.dumps(now))
    for name in [*before, *(one for one in now if one not in before)]:
        place = f"{key}.{name}" if key else str(name)
        if name not in before or name not in now:
            return place, json.dumps(before.get(name)), json.dumps(now.get(name))
        if (found := _difference(before[name], now[name], place)) is not None:
            return found
    return None


def _digest(arguments: tuple[Any, ...]) -> str:
    form = json.dumps(arguments, sort_keys=True, default=str)
    return hashlib.sha256(form.encode()).hexdigest()[:16]
