"""`mixlm generate`: a completion of a prompt, or of each prompt in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from typer import Argument

from mixlm.cli.batch import complete_file, read_prompts
from mixlm.cli.display import Display, completion_fields, print_json, show_figures
from mixlm.cli.inputs import input_is_piped, piped_text, read_texts, stdin_text
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared, check_counts, flag, with_shared
from mixlm.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from mixlm.core.options import Options

_EXAMPLE = 'such as: mixlm generate "Why is the sky blue?"'


@with_shared()
def generate(
    shared: Shared,
    prompt: Annotated[
        str | None,
        Argument(
            help="The prompt. Omit it, or write '-', to read standard input; text that is piped in stands before it.",
            show_default=False,
        ),
    ] = None,
    input: Annotated[
        Path | None,
        flag(
            "--input FILE", "A file of prompts: JSON Lines, each with a prompt or messages. '-' reads standard input."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        flag(
            "--output FILE",
            "Write the completions of --input here, one JSON object per line; '-' is standard output. If the file"
            " exists, continue it.",
        ),
    ] = None,
    batch: Annotated[
        int | None, flag("--batch N", "With --input: the number of completions generated together. Default: 16.")
    ] = None,
    raw: Annotated[bool, flag("--raw", "Continue the prompt as it is, without a chat template.")] = False,
    as_json: Annotated[bool, flag("--json", "Print the completion and its usage as one JSON object.")] = False,
    top_logprobs: Annotated[
        int | None,
        flag(
            "--alternatives K",
            "With --json: also print the top logprobs: of the K most likely tokens at each position.",
        ),
    ] = None,
    json_schema: Annotated[
        Path | None, flag("--json-schema FILE", "Generate JSON that matches the schema in FILE. Needs mixlm[grammar].")
    ] = None,
    logit_bias: Annotated[
        list[str] | None,
        flag(
            "--logit-bias TEXT=X",
            "Add X, from -100 to 100, to the logit of the token that is exactly TEXT. Repeatable.",
        ),
    ] = None,
    logprobs_of: Annotated[
        str | None,
        flag(
            "--logprobs-of NAME",
            "With --json: log-probabilities of the sampled member's distribution (member) or of the average"
            " (ensemble, which runs every member).",
        ),
    ] = None,
) -> int:
    """Generate a completion of a prompt, or of each prompt in a file."""
    reported = {"top_logprobs": top_logprobs, "logprobs_of": logprobs_of}
    reported = {name: value for name, value in reported.items() if value is not None}
    if reported and not as_json:
        name = "--logprobs-of" if top_logprobs is None else "--alternatives"
        raise UsageError(f"{name} needs --json", "add --json, or omit it")
    extra = cast("Options", {"raw": True} if raw else {})
    if logit_bias:
        extra["logit_bias"] = _biases(logit_bias)
    if json_schema is not None:
        extra["json_schema"] = _schema(json_schema)
    if input is not None or output is not None:
        if input is None or output is None:
            raise UsageError(
                "--input and --output go together",
                "name a file of prompts and one for the completions; '-' is standard input, or output",
            )
        if prompt is not None or as_json:
            unwanted = "prompt" if prompt is not None else "--json"
            raise UsageError(f"--input takes no {unwanted}", "prompts and completions are in files")
        check_counts(batch=batch)
        records = read_prompts(input, output)
        options = cast("Options", {**shared.options(), **extra})
        ensemble = open_ensemble(shared, options, one_method=True)
        return complete_file(ensemble, records, options, output, 16 if batch is None else batch)
    if batch is not None:
        raise UsageError("--batch is given without --input", "omit it, or name a file of prompts")
    text = _text(prompt, raw)
    options = cast("Options", {**shared.options(), **extra, **reported})
    ensemble = open_ensemble(shared, options, one_method=True, sequences=1)
    generation = ensemble.stream(text, **options)
    if as_json:
        print_json(completion_fields(ensemble, generation.finish()))
        return 0
    display = Display(ensemble, ensemble.settings(**options).method)
    display.legend()
    try:
        for token in generation:
            display.write(token)
    finally:
        # After an interruption or a failure, the text so far ends with a newline too.
        display.end()
    show_figures(ensemble, generation.completion)
    return 0


def _schema(path: Path) -> Any:
    """Read a JSON schema. Raises ConfigError that names the file."""
    [text] = read_texts([path], "it must be a JSON schema").values()
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error


def _biases(values: list[str]) -> dict[str | int, float]:
    """Return biases by text. Raises UsageError for a value that is not TEXT=X."""
    biases: dict[str | int, float] = {}
    for value in values:
        text, _, number = value.rpartition("=")
        try:
            biases[text] = float(number)
        except ValueError:
            text = ""
        if not text:
            raise UsageError(f"--logit-bias is {value!r}", "give a text and a number, such as ' water=-2.5'")
    return biases


def _text(prompt: str | None, raw: bool) -> str:
    """Return the prompt, after the text that is piped in.

    Removes the newline that ends a message on standard input; `raw` keeps it.
    """
    if prompt is None and not input_is_piped():
        raise UsageError("there is no prompt", f"give one as an argument or on standard input, {_EXAMPLE}")
    if prompt is None or prompt == "-":
        prompt = stdin_text()
        if not raw:
            prompt = prompt.removesuffix("\n").removesuffix("\r")
    elif piped := piped_text():
        ending = "" if piped.endswith("\n") else "\n"
        prompt = f"{piped}{ending}\n{prompt}"
    if not raw and not prompt.strip():
        raise ConfigError("the prompt is empty", f"write something, {_EXAMPLE}")
    return prompt
