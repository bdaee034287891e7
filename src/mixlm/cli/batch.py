"""`mixlm generate --input … --output …`: completions of a file of prompts, written as they finish, and resumable.

Each line of the output is one completion: the keys of its input line but for the prompt, such as an id; the key of its
request (prompt, options, members, rule, router, engines); and under "run", what made it. A second run skips the
requests that are done, and refuses a file that was written with other settings. On standard output there is nothing to
continue.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from mixlm.cli.display import dim, engines_by_member, print_json
from mixlm.cli.inputs import STDIN, check_writable, json_lines, line_error, read_texts
from mixlm.cli.options import Shared, option_flag
from mixlm.core.options import OPTIONS, Options
from mixlm.core.rule_options import rule_as_dict
from mixlm.errors import ConfigError, UsageError, did_you_mean
from mixlm.resumable_log import ResumableLog, exclusive
from mixlm.terminal import progress_bars
from mixlm.version import __version__

if TYPE_CHECKING:
    from mixlm.ensemble import Ensemble
    from mixlm.generation.prompt import Prompt

_RECORD = '{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'


class PromptRecord(NamedTuple):
    """A line of the input: a prompt or a conversation, and the other keys, which its output line has too."""

    prompt: Prompt
    extra: Mapping[str, Any]


def read_prompts(source: Path, output: Path) -> list[PromptRecord]:
    """Read a file of prompts, whose completions are written to another one; "-" are standard input and output.

    Raises:
        ConfigError: A line is not a prompt, or the output cannot be written; the message names the file and line.
        UsageError: Input and output are the same file.
    """
    if str(output) != "-":
        check_writable("--output", output)
        if output.exists() and not output.is_file():
            raise UsageError(f"--output {output} is no file that can be continued", "--output - is standard output")
    [(name, text)] = read_texts([source], f"each line must be an object {_RECORD}").items()
    if name != STDIN and source.resolve() == output.resolve():
        raise UsageError(f"--input and --output are both {source}", "name another file for the completions")
    return [_read_record(name, number, record) for number, record in json_lines(name, text, _RECORD)]


def complete_file(
    ensemble: Ensemble, records: Sequence[PromptRecord], options: Options, output: Path, batch_size: int
) -> int:
    """Generate the missing completions, so many together. Returns the exit code: 1 if a prompt failed."""
    from mixlm.routing.base import FixedRouter, describe_router

    settings = ensemble.settings(**options)
    fixed = {name: value for name, value in options.items() if name != "seed"}
    of_ensemble: dict[str, Any] = {}
    if settings.rule is not None:
        of_ensemble["rule"] = rule_as_dict(settings.rule, settings.rule_parameters)
    if any(sampling := [dict(member.sampling) for member in ensemble.members]):
        of_ensemble["sampling"] = sampling
    if not isinstance(ensemble.router, FixedRouter):
        of_ensemble["router"] = describe_router(ensemble.router)
    weights = ensemble.weights.tolist()
    common = {"method": settings.method, "unit": ensemble.unit.name, **of_ensemble, "options": fixed}
    run = {
        "mixlm": __version__,
        "engines": engines_by_member(ensemble),
        "weights": dict(zip(ensemble.names, weights, strict=True)),
        **common,
    }
    request = {
        **common,
        "system": settings.system,
        "members": ensemble.names,
        "weights": weights,
        "engines": [[member.engine.backend, member.engine.details.get("dtype")] for member in ensemble.members],
    }
    keys = [_key(request, record, number) for number, record in enumerate(records)]
    if str(output) == "-":
        return _complete(ensemble, records, {"seed": settings.seed, **options}, batch_size, keys, run, None)
    # Windows lets nobody write a locked file through another handle.
    with exclusive(output.with_name(f"{output.name}.lock") if os.name == "nt" else output):
        log = ResumableLog(output, index="number", key="key", result="seed")
        for i in log.records:
            log.get(i, keys[i] if i in range(len(keys)) else "")
        seed = next((record["seed"] for record in reversed(log.records.values())), settings.seed)
        if "seed" in options and seed != options["seed"]:
            raise ConfigError(
                f"{output} was written with seed {seed}, and --seed is {options['seed']}",
                "leave --seed out to continue it, or name another file",
            )
        if log.records:
            rest = "continuing with the rest" if len(log.records) < len(records) else "nothing is left to generate"
            dim(f"{len(log.records)} of {len(records)} are in {output}; {rest}")
        return _complete(ensemble, records, {"seed": seed, **options}, batch_size, keys, run, log)


def _complete(
    ensemble: Ensemble,
    records: Sequence[PromptRecord],
    options: Options,
    batch_size: int,
    keys: Sequence[str],
    run: Mapping[str, Any],
    log: ResumableLog | None,
) -> int:
    """Generate what is not in the log, and write it as it finishes. Returns the exit code."""
    done = set() if log is None else set(log.records)
    missing = [(i, record.prompt) for i, record in enumerate(records) if i not in done]
    failed = 0
    with progress_bars(single=True) as show:
        if show is not None:
            show("completions", len(done), len(records))
        generations = ensemble.numbered_generations(missing, at_once=batch_size, **options)
        for finished, (i, generation) in enumerate(generations, start=len(done) + 1):
            if generation.error is not None:
                failed += 1
                dim(f"prompt {i + 1}: {generation.error.with_hint}")
                continue
            fields = {**records[i].extra, **generation.completion.as_dict(), "run": run}
            fields.pop("tokens", None)
            if log is None:
                print_json({"number": i, "key": keys[i], **fields}, indent=None)
            else:
                log.add(i, keys[i], fields)
            if show is not None:
                show("completions", finished, len(records))
    if failed:
        again = "" if log is None else "; run the same command again to retry them"
        dim(f"{failed} of {len(records)} failed{again}")
    return 1 if failed else 0


# Keys of output lines; an input line may not have them.
_OUTPUT_KEYS = ("number", "key", "run", "text", "tokens", "seed", "finish_reason", "usage")


_OF_ENSEMBLE = {field.name for field in fields(Shared)} - {"generation", "debug"}
# Options of a run, also by the names that other programs have for them.
_OTHER_NAMES = {"router", "sampling", "options", "alternatives", "max_new_tokens", "max_completion_tokens"}
_RUN_OPTIONS = frozenset({*OPTIONS, *_OF_ENSEMBLE, *_OTHER_NAMES})


def _read_record(name: str, number: int, record: dict[str, Any]) -> PromptRecord:
    """Return what one line says."""
    extra = {key: value for key, value in record.items() if key not in ("prompt", "messages")}
    if ("prompt" in record) == ("messages" in record):
        near = did_you_mean(next(iter(extra)), ("prompt", "messages")) if len(extra) == 1 else None
        error = line_error(name, number, 'it needs either "prompt" or "messages"', _RECORD)
        raise ConfigError(error.message, near) if near else error
    for key in extra:
        if (option := key.lower().replace("-", "_")) in _RUN_OPTIONS:
            reason = f"{key!r} is an option, and all prompts of a run have the same"
            is_flag = option in _OF_ENSEMBLE or (option in OPTIONS and OPTIONS[option].panel is not None)
            named = f": {option_flag(option)}" if is_flag else ""
            hint = f"give it once, as an option of mixlm generate{named}; data of your own needs another name"
            raise ConfigError(f"{name}, line {number}: {reason}", hint)
        if key in _OUTPUT_KEYS:
            raise ConfigError(
                f"{name}, line {number}: {key!r} is a key of the output, whose lines have those of the input too",
                "give it another name",
            )
    prompt, messages = record.get("prompt"), record.get("messages")
    if "prompt" in record and not (isinstance(prompt, str) and prompt.strip()):
        raise line_error(name, number, '"prompt" is empty or not a string', _RECORD)
    is_list = isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)
    if "messages" in record and not is_list:
        raise line_error(name, number, '"messages" is not a list of messages', _RECORD)
    return PromptRecord(cast("Prompt", prompt or messages), extra)


def _key(request: Mapping[str, Any], record: PromptRecord, number: int) -> str:
    """Return what tells apart all that a completion depends on, but for the seed."""
    plain = {**request, "prompt": record.prompt, "number": number, **({"extra": record.extra} if record.extra else {})}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
