"""Input from files and standard input, and what `mixlm score` and `mixlm fit` have in common."""

from __future__ import annotations

import json
import os
import select
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mixlm.cli.display import dim
from mixlm.cli.options import flag
from mixlm.errors import ConfigError, UsageError, did_you_mean
from mixlm.terminal import is_terminal, progress_bars, visible

if TYPE_CHECKING:
    from mixlm.config import EnsembleConfig
    from mixlm.ensemble import Ensemble
    from mixlm.scoring.passages import Before
    from mixlm.scoring.scores import Scores

EndsOption = Annotated[
    bool | None,
    flag(
        "--ends/--no-ends",
        "Include the end of each answer in its score. Default: on, unless a member relies on stop strings.",
    ),
]
STDIN = "standard input"
# Seconds after which a wait for standard input is explained.
_PATIENCE = 2.0
_PAIR = '{"prompt": "…", "answer": "…"}'


def input_is_piped() -> bool:
    """Whether standard input comes from a file or another program, not from a keyboard."""
    return sys.stdin is not None and not sys.stdin.isatty()


def piped_text() -> str:
    """Return what another program or a file sends to standard input, "" if neither is there.

    Raises:
        ConfigError: It is not UTF-8.
    """
    if sys.stdin is None or sys.stdin.closed:
        return ""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except ValueError:  # a stream in memory
        try:
            return decode(STDIN, sys.stdin.buffer.read())
        except OSError:  # it cannot be read
            return ""
    if not stat.S_ISFIFO(mode) and not stat.S_ISREG(mode):
        return ""
    if not select.select([sys.stdin], [], [], _PATIENCE)[0]:
        # Whoever started this program may have left a pipe open that nobody writes to.
        dim("reading standard input, which is a pipe; to use the prompt alone, add: < /dev/null")
    return stdin_text()


def stdin_text() -> str:
    """Return all of standard input.

    Raises:
        UsageError: It is closed.
        ConfigError: It is not UTF-8.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError("standard input is closed", "leave it open, or send < /dev/null")
    return decode(STDIN, sys.stdin.buffer.read())


def decode(name: str, data: bytes) -> str:
    """Decode UTF-8.

    Raises:
        ConfigError: The data is not UTF-8; the message starts with `name`.
    """
    try:
        return data.decode("utf-8-sig")  # a byte-order mark is no text
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}", "convert it first"
        ) from error


def read_texts(files: Sequence[Path], expected: str = "give a text of at least a few sentences") -> dict[str, str]:
    """Return the texts of files by their names, as the user wrote them; "-", or no file, means standard input.

    expected: what to give in place of an empty file.

    Raises:
        UsageError: There is no text, or a file is named twice.
        ConfigError: A file is missing, empty, or not UTF-8; the message names it.
    """
    if not files and not input_is_piped():
        raise UsageError("there is no text", "name files, or pass a text on standard input")
    texts: dict[str, str] = {}
    for file in files or [Path("-")]:
        name = STDIN if str(file) == "-" else str(file)
        if name in texts:
            raise UsageError(f"{name} is given twice", "give each text once")
        texts[name] = stdin_text() if name == STDIN else decode(name, _bytes(file))
        if not texts[name].strip():
            raise ConfigError(f"{name} is empty", expected)
    return texts


def json_lines(name: str, text: str, expected: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of each line of JSON Lines; blank lines are skipped.

    Raises:
        ConfigError: A line is not a JSON object; the message names the file and the line.
    """
    # Not splitlines(): JSON strings may contain the other characters that it takes for ends of lines.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_object)
            json.dumps(record, allow_nan=False)
        except (ValueError, RecursionError) as error:
            raise line_error(name, number, f"not valid JSON: {error}", expected) from error
        if not isinstance(record, dict):
            raise line_error(name, number, "not a JSON object", expected)
        yield number, record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raises ValueError for a key that it has twice, of which one value would be lost."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return record


def line_error(name: str, number: int, reason: str, expected: str) -> ConfigError:
    """Return the error for a line of a file that does not have the expected form."""
    return ConfigError(f"{name}, line {number}: {reason}", f"each line must be an object {expected}")


def _read_pairs(name: str, text: str) -> list[tuple[str, str]]:
    pairs = []
    for number, record in json_lines(name, text, _PAIR):
        for key in ("prompt", "answer"):
            if not isinstance(record.get(key), str):
                raise line_error(name, number, f'"{key}" is missing or not a string', _PAIR)
            if not record[key].strip():
                raise line_error(name, number, f'"{key}" is empty', _PAIR)
        pairs.append((record["prompt"], record["answer"]))
    return pairs


def prompts_and_answers(
    texts: Mapping[str, str], *, ends: bool | None, system: str | None
) -> dict[str, list[tuple[str, str]]]:
    """Return the prompts and answers of the .jsonl files, by name.

    Raises:
        ConfigError: A line does not have the expected form; the message names the file and the line.
        UsageError: `ends` or `system` is given, which apply to answers and prompts, and there is no .jsonl file.
    """
    pairs = {name: _read_pairs(name, text) for name, text in texts.items() if name.endswith(".jsonl")}
    if ends is not None and not pairs:
        raise UsageError("--ends and --no-ends apply to answers, and there are none", "omit it, or give a .jsonl file")
    if system is not None and not pairs:
        raise UsageError("--system applies to prompts, and there are none", "omit it, or give a .jsonl file")
    return pairs


def score_texts(
    ensemble: Ensemble,
    texts: Mapping[str, str],
    pairs: Mapping[str, Sequence[tuple[str, str]]],
    models: Sequence[str | None] | None,
    *,
    ends: bool | None,
    system: str | None,
    before: Before = "begin",
) -> dict[str, Scores]:
    """Score every text under every member, and show the progress.

    Args:
        ensemble: The ensemble.
        texts: Texts by name.
        pairs: The prompts and answers of those texts that consist of them, by name.
        models: What `model_identities` returns.
        ends, before: See `score_answers`, `score`.
        system: The system message for prompts; None for the ensemble's own.
    """
    from mixlm.scoring.score import score, score_answers

    settings = ensemble.settings() if system is None else ensemble.settings(system=system or None)
    scores = {}
    for name, text in texts.items():
        try:
            with progress_bars() as progress:
                if name in pairs:
                    scores[name] = score_answers(
                        ensemble, pairs[name], settings=settings, ends=ends, progress=progress, identities=models
                    )
                else:
                    scores[name] = score(ensemble, text, before=before, progress=progress, identities=models)
        except UsageError as error:
            # Among several files, the message must say which one it means.
            raise type(error)(f"{name}: {error.message}" if len(texts) > 1 else error.message, error.hint) from error
    return scores


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        siblings = [path.name for path in file.parent.iterdir()] if file.parent.is_dir() else []
        hint = did_you_mean(file.name, siblings) or "give the path of a text file, or - for standard input"
        raise ConfigError(f"there is no file {file}", hint) from None
    except IsADirectoryError:
        raise ConfigError(f"{file} is a folder", "name the files in it") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}", "give a text file") from error


def check_writable(option: str, path: Path, *, force: bool = True) -> None:
    """Check that the output file of an option can be written, before long work starts.

    Raises:
        ConfigError: It cannot; or it exists, and without `force` a user does not allow to overwrite it.
    """
    if not force and path.is_file() and not _confirms_overwriting(path):
        raise ConfigError(f"{option} {path} exists", "name another file, or add --force to overwrite it")
    reason = None
    if str(path) == "-":
        reason = "standard output is for the report"
    elif path.is_dir():
        reason = "it is a folder"
    elif not path.parent.is_dir():
        reason = f"there is no folder {path.parent}"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "permission denied"
    if reason is not None:
        raise ConfigError(
            f"{option} {path} cannot be written: {reason}", "name a file in a folder that you can write to"
        )


def _confirms_overwriting(path: Path) -> bool:
    """Ask at a terminal whether a file may be overwritten."""
    if not is_terminal(sys.stdin) or not is_terminal(sys.stderr):
        return False
    print(f"{visible(str(path))} exists. Overwrite it? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def model_identities(config: EnsembleConfig, cache: bool) -> list[str | None] | None:
    """Return what identifies each member's model in the cache of scores; None to bypass the cache."""
    from mixlm.scoring.score import identity

    if not cache:
        return None
    return [identity(member.model, member.dtype, member.adapter, member.revision) for member in config.members]
