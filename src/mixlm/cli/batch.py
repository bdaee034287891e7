"""`mixlm generate --input … --output …`: completions of a file of prompts, written as they finish, and resumable.

Each line of the output is one completion with the key of its request (prompt, options, members). A second run skips
the requests that are done, and refuses a file that was written with other settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mixlm.cli.display import dim
from mixlm.cli.inputs import STDIN, check_writable, json_lines, line_error, read_texts
from mixlm.errors import ConfigError, UsageError
from mixlm.resumable_log import ResumableLog, exclusive
from mixlm.terminal import progress_bars

if TYPE_CHECKING:
    from mixlm.core.options import Options
    from mixlm.ensemble import Ensemble
    from mixlm.generation.prompt import Prompt

_RECORD = '{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A file of prompts and the file of their completions.

    Args:
        input: The prompts, JSON Lines; "-" is standard input.
        output: The completions, JSON Lines.
        batch_size: The number of completions generated together.
    """

    input: Path
    output: Path
    batch_size: int

    def prompts(self) -> list[Prompt]:
        """Read the prompts.

        Raises:
            ConfigError: A line is not a prompt, or the output cannot be written; the message names the file and line.
            UsageError: Input and output are the same file.
        """
        if self.batch_size < 1:
            raise ConfigError(f"--batch is {self.batch_size}; it must be 1 or more")
        check_writable("--output", self.output)
        [(name, text)] = read_texts([self.input]).items()
        if name != STDIN and self.input.resolve() == self.output.resolve():
            raise UsageError(f"--input and --output are both {self.input}", "name another file for the completions")
        return [_prompt(name, number, record) for number, record in json_lines(name, text, _RECORD)]

    def run(self, ensemble: Ensemble, prompts: Sequence[Prompt], options: Options) -> int:
        """Generate the missing completions. Returns the exit code: 1 if a prompt failed."""
        settings = ensemble.settings(**options)
        request = {
            "options": {name: value for name, value in options.items() if name != "seed"},
            "method": settings.method,
            "unit": ensemble.unit.name,
            "system": settings.system,
            "members": ensemble.names,
            "weights": ensemble.weights.tolist(),
        }
        keys = [_key({**request, "prompt": _plain(prompt), "number": i}) for i, prompt in enumerate(prompts)]
        with exclusive(self.output):
            log = ResumableLog(self.output, index="number", key="key", result="seed")
            for i in log.records:
                log.get(i, keys[i] if i in range(len(keys)) else "")
            done = set(log.records)
            seed = next((record["seed"] for record in reversed(log.records.values())), settings.seed)
            options = cast("Options", {"seed": seed, **options})
            if done:
                dim(f"{len(done)} of {len(prompts)} are in {self.output}; continuing with the rest")
            failed = 0
            with progress_bars(single=True) as show:
                if show is not None:
                    show("completions", len(done), len(prompts))
                missing = [(i, prompt) for i, prompt in enumerate(prompts) if i not in done]
                generations = ensemble.numbered_generations(missing, at_once=self.batch_size, **options)
                for finished, (i, generation) in enumerate(generations, start=len(done) + 1):
                    if generation.error is not None:
                        failed += 1
                        dim(f"prompt {i + 1}: {generation.error}")
                        continue
                    fields = generation.completion.as_dict()
                    fields.pop("tokens", None)
                    log.add(i, keys[i], fields)
                    if show is not None:
                        show("completions", finished, len(prompts))
        if failed:
            dim(f"{failed} of {len(prompts)} failed; run the same command again to retry them")
        return 1 if failed else 0


def _prompt(name: str, number: int, record: dict[str, Any]) -> Prompt:
    """Return the prompt of one line."""
    if ("prompt" in record) == ("messages" in record):
        raise line_error(name, number, 'it needs either "prompt" or "messages"', _RECORD)
    if "prompt" in record:
        prompt = record["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise line_error(name, number, '"prompt" is empty or not a string', _RECORD)
        return prompt
    messages = record["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise line_error(name, number, '"messages" is not a list of messages', _RECORD)
    return cast("Prompt", messages)


def _plain(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [dict(cast(Any, message)) for message in prompt]


def _key(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]
