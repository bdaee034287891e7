"""The files of `mixlm score` and `mixlm fit`, and what those commands ask of the options that all commands share."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from mixlm.cli.options import Shared
from mixlm.errors import ConfigError, UsageError, did_you_mean
from mixlm.terminal import progress_bars

if TYPE_CHECKING:
    from mixlm.config import EnsembleConfig
    from mixlm.ensemble import Ensemble
    from mixlm.scoring.scores import Scores

ends_option = Annotated[
    bool | None,
    Option(
        "--ends/--no-ends",
        help="Score the end of each answer too. Default: where no member relies on stop strings.",
        show_default=False,
    ),
]
STDIN = "standard input"
_FORM = '{"prompt": "…", "answer": "…"}'


def read_texts(files: Sequence[Path]) -> dict[str, str]:
    """Return the text of each file by its name as given; "-", or no file at all, is standard input.

    Raises UsageError or ConfigError that names the file.
    """
    if not files and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("there is no text", "name files, or give a text on standard input")
    texts: dict[str, str] = {}
    for file in files or [Path("-")]:
        name = STDIN if str(file) == "-" else str(file)
        if name in texts:
            raise UsageError(f"{name} is given twice", "give each text once")
        texts[name] = _decoded(name, sys.stdin.buffer.read() if name == STDIN else _bytes(file))
        if not texts[name].strip():
            raise ConfigError(f"{name} is empty", "give a text of a few sentences or more")
    return texts


def read_pairs(name: str, text: str) -> list[tuple[str, str]]:
    """Return the prompts and answers of JSON lines. Raises ConfigError that names the file and the line."""
    pairs = []
    # Not splitlines(): JSON strings may hold the other characters that it takes for ends of lines.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            form = json.loads(line)
        except ValueError as error:
            raise _wrong(name, number, f"it is no JSON: {error}") from error
        if not isinstance(form, dict):
            raise _wrong(name, number, "it is no object")
        for key in ("prompt", "answer"):
            if not isinstance(form.get(key), str):
                raise _wrong(name, number, f'it has no text "{key}"')
            if not form[key].strip():
                raise _wrong(name, number, f'its "{key}" is empty')
        pairs.append((form["prompt"], form["answer"]))
    return pairs


def pairs_of(texts: Mapping[str, str], *, ends: bool | None, system: str | None) -> dict[str, list[tuple[str, str]]]:
    """Return the prompts and answers of the files that hold such, by name: those that end in .jsonl.

    ends, system: options that are of answers and prompts; raises UsageError where there are none.
    """
    pairs = {name: read_pairs(name, text) for name, text in texts.items() if name.endswith(".jsonl")}
    if ends is not None and not pairs:
        raise UsageError(
            "--ends and --no-ends are of answers, and there are none", "leave it out, or give a .jsonl file"
        )
    if system is not None and not pairs:
        raise UsageError("--system goes in front of prompts, and there are none", "leave it out, or give a .jsonl file")
    return pairs


def scored(
    ensemble: Ensemble,
    texts: Mapping[str, str],
    pairs: Mapping[str, Sequence[tuple[str, str]]],
    models: Sequence[str] | None,
    *,
    ends: bool | None,
    system: str | None,
) -> dict[str, Scores]:
    """Let every member read every text, and show how far it is. pairs: of those texts that are prompts and answers."""
    from mixlm.scoring.score import score, score_answers

    settings = ensemble.settings() if system is None else ensemble.settings(system=system or None)
    scores = {}
    for name, text in texts.items():
        try:
            with progress_bars() as progress:
                about: dict[str, Any] = {"progress": progress, "identities": models}
                if name in pairs:
                    scores[name] = score_answers(ensemble, pairs[name], settings=settings, ends=ends, **about)
                else:
                    scores[name] = score(ensemble, text, **about)
        except UsageError as error:
            # Which of several files it is cannot be read from the sentence alone.
            raise type(error)(f"{name}: {error.message}" if len(texts) > 1 else error.message, error.hint) from error
    return scores


def _wrong(name: str, number: int, reason: str) -> ConfigError:
    return ConfigError(f"{name}, line {number}: {reason}", f"each line is an object {_FORM}")


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        beside = [one.name for one in file.parent.iterdir()] if file.parent.is_dir() else []
        hint = did_you_mean(file.name, beside) or "give the path of a text file, or - for standard input"
        raise ConfigError(f"there is no file {file}", hint) from None
    except IsADirectoryError:
        raise ConfigError(f"{file} is a folder", "name the files in it") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}", "give a text file") from error


def _decoded(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}", "convert it first"
        ) from error


def check_writable(option: str, path: Path | None) -> None:
    """Refuse a file that cannot be written before the time for measuring is spent."""
    reason = None
    if path is None:
        return
    if path.is_dir():
        reason = "it is a folder"
    elif not path.parent.is_dir():
        reason = f"there is no folder {path.parent}"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "permission denied"
    if reason is not None:
        raise ConfigError(f"{option} {path} cannot be written: {reason}", "give the name of a file")


def refuse_reply_options(shared: Shared, command: str, allowed: Collection[str] = ()) -> None:
    """Refuse options of replies: members are scored as they are, and an option that does nothing would mislead."""
    given: list[str] = [name for name in shared.options() if name not in allowed]
    if shared.method is not None and "method" not in allowed:
        given.append("method")
    if given:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"mixlm {command} has no use for {named}: members are scored as they are", "leave it out")


def identities(config: EnsembleConfig, cache: bool) -> list[str] | None:
    """Return what tells each member's model from others, for the cache of scores; None to read every text anew."""
    from mixlm.scoring.score import identity

    return [identity(one.model, one.dtype, one.adapter) for one in config.members] if cache else None
