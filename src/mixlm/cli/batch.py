"""`mixlm generate --input … --output …`: replies to a file of prompts, written as they come and continued after a stop.

A line of the output is a finished reply. It holds the key of what was asked (prompt, options, members), so that a
second run knows which prompts are done, and refuses a file that was written with other settings.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from mixlm.cli.display import dim, json_text
from mixlm.cli.inputs import STDIN, check_writable, read_texts
from mixlm.errors import ConfigError, UsageError
from mixlm.terminal import progress_bars

if TYPE_CHECKING:
    from mixlm.core.options import Options
    from mixlm.ensemble import Ensemble, Prompt
    from mixlm.generation.generation import Generation

_FORM = '{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'


@dataclass(frozen=True, slots=True)
class Batch:
    """A file of prompts and the file of their replies. at_once: how many are written together."""

    input: Path
    output: Path
    at_once: int

    def prompts(self) -> list[Prompt]:
        """Read the prompts. Raises ConfigError that names the file and the line."""
        if self.at_once < 1:
            raise ConfigError(f"--batch is {self.at_once}; it must be 1 or more")
        check_writable("--output", self.output)
        [(name, text)] = read_texts([self.input]).items()
        if name != STDIN and self.input.resolve() == self.output.resolve():
            raise UsageError(f"--input and --output are both {self.input}", "replies need a file of their own")
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        return [_prompt(name, number, line) for number, line in lines]

    def run(self, ensemble: Ensemble, prompts: Sequence[Prompt], options: Options) -> int:
        """Write the replies that are missing. Returns the exit code: 1 where a prompt could not be answered."""
        settings = ensemble.settings(**options)
        given = {name: value for name, value in options.items() if name != "seed"}
        how = {"method": settings.method, "unit": ensemble.unit.name, "system": settings.system}
        asked = {"options": given, **how, "members": ensemble.names, "weights": ensemble.weights.tolist()}
        keys = [_key({**asked, "prompt": _plain(prompt), "number": at}) for at, prompt in enumerate(prompts)]
        with _locked(self.output) as file:
            done, seed = _done(self.output, file, keys)
            options = cast("Options", {**options, "seed": options.get("seed", settings.seed if seed is None else seed)})
            if done:
                dim(f"{len(done)} of {len(prompts)} are in {self.output}; going on with the others")
            left = [at for at in range(len(prompts)) if at not in done]
            failed = self._write(ensemble, prompts, left, (options, keys, file))
        if failed:
            dim(f"{failed} of {len(prompts)} failed; run the same command again to try those")
        return 1 if failed else 0

    def _write(
        self, ensemble: Ensemble, prompts: Sequence[Prompt], left: Sequence[int], to: tuple[Options, list[str], IO[str]]
    ) -> int:
        options, keys, file = to
        failed = written = 0
        with progress_bars(single=True) as show:
            if show is not None:
                show("replies", len(prompts) - len(left), len(prompts))
            for number, (at, stream) in enumerate(
                ensemble.numbered_replies([(at, prompts[at]) for at in left], at_once=self.at_once, **options), start=1
            ):
                if stream.error is not None:
                    failed += 1
                    dim(f"prompt {at + 1}: {stream.error}")
                    continue
                written += 1
                print(json_text({"number": at, "key": keys[at], **_reply(stream)}, indent=None), file=file, flush=True)
                os.fsync(file.fileno())
                if show is not None:
                    show("replies", len(prompts) - len(left) + number, len(prompts))
        return failed


def _reply(stream: Generation) -> dict[str, Any]:
    form = stream.completion.as_dict()
    form.pop("tokens", None)
    return form


def _prompt(name: str, number: int, line: str) -> Prompt:
    """Return the prompt of one line."""
    try:
        form = json.loads(line)
    except ValueError as error:
        raise _wrong(name, number, f"it is no JSON: {error}") from error
    if not isinstance(form, dict) or ("prompt" in form) == ("messages" in form):
        raise _wrong(name, number, 'it is no object with either a "prompt" or "messages"')
    if "prompt" in form:
        if not isinstance(form["prompt"], str) or not form["prompt"].strip():
            raise _wrong(name, number, 'its "prompt" is no text, or empty')
        return cast("Prompt", form["prompt"])
    messages = form["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise _wrong(name, number, 'its "messages" are no list of messages')
    return cast("Prompt", messages)


def _wrong(name: str, number: int, reason: str) -> ConfigError:
    return ConfigError(f"{name}, line {number}: {reason}", f"each line is an object {_FORM}")


def _plain(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [dict(cast(Any, one)) for one in prompt]


def _key(asked: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    """Open the output for one process alone; the lock goes with the process, however it ends."""
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{path} is being written by another mixlm", "wait for it, or name another file"
            ) from None
        yield file


def _done(path: Path, file: IO[str], keys: Sequence[str]) -> tuple[set[int], int | None]:
    """Return which prompts have their reply, and the seed of the replies.

    A last line that a kill cut off is taken away: its reply is written again. Raises ConfigError for a file that is not
    this run's.
    """
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    done: set[int] = set()
    seed = None
    for number, line in enumerate(data[:whole].decode("utf-8", "replace").split("\n"), start=1):
        if not line:
            continue
        try:
            form = json.loads(line)
            at, key, seed = form["number"], form["key"], form["seed"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path}, line {number}: this is no reply of mixlm", "name another file") from None
        if not 0 <= at < len(keys) or keys[at] != key:
            raise ConfigError(
                f"{path} holds replies to other prompts or with other options (line {number})",
                "name another file, or remove it",
            )
        done.add(at)
    if whole < len(data):
        file.truncate(whole)
    return done, seed
