"""`mixlm generate`: one reply, or the continuation of a text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from typer import Argument, Option

from mixlm.cli.batch import Batch
from mixlm.cli.display import Display, print_json
from mixlm.cli.inputs import read_texts
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared, with_shared
from mixlm.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from mixlm.core.options import Options

_EXAMPLE = 'such as: mixlm generate "Why is the sky blue?"'


@with_shared
def generate(
    shared: Shared,
    prompt: Annotated[
        str | None, Argument(help="What to answer; read from standard input when left out or '-'.", show_default=False)
    ] = None,
    input: Annotated[
        Path | None,
        Option(
            "--input",
            metavar="FILE",
            help="Answer many prompts: JSON lines with a prompt, or with messages; - for standard input.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        Option(
            "--output",
            metavar="FILE",
            help="Where the replies to --input go, one JSON object a line as they are finished. Given once more, the "
            "command goes on where it stopped.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, Option("--batch", metavar="N", help="Replies to --input that are written together.")] = 16,
    raw: Annotated[bool, Option("--raw", help="Continue the prompt as it stands, without any template.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the reply and its figures as one JSON object.")] = False,
    alternatives: Annotated[
        int | None,
        Option(
            "--alternatives",
            metavar="K",
            help="With --json: the K likeliest symbols at each token's place, of the law that it was drawn from.",
            show_default=False,
        ),
    ] = None,
    json_schema: Annotated[
        Path | None,
        Option(
            "--json-schema",
            metavar="FILE",
            help="Write JSON of the schema in FILE (the extra grammar).",
            show_default=False,
        ),
    ] = None,
    logit_bias: Annotated[
        list[str] | None,
        Option(
            "--logit-bias",
            metavar="TEXT=X",
            help="Add X, from -100 to 100, to the logits of the tokens that are exactly TEXT. Can be repeated.",
            show_default=False,
        ),
    ] = None,
    logprobs_of: Annotated[
        str | None,
        Option(
            "--logprobs-of",
            metavar="NAME",
            help="With --json: member, or ensemble for the average's, which runs every member.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Write a reply to a prompt, or to each prompt of a file."""
    told = {"alternatives": alternatives, "logprobs_of": logprobs_of}
    told = {name: value for name, value in told.items() if value is not None}
    if told and not as_json:
        raise UsageError(f"--{next(iter(told)).replace('_', '-')} goes with --json", "add --json, or leave it out")
    more = cast("Options", {"raw": True} if raw else {})
    if logit_bias:
        more["logit_bias"] = _biases(logit_bias)
    if json_schema is not None:
        more["json_schema"] = _schema(json_schema)
    if input is not None or output is not None:
        return _many(shared, more, (prompt, as_json), Batch(input, output, batch) if input and output else None)
    text = _text(prompt, raw)
    options = cast("Options", {**shared.options(), **more, **told})
    ensemble = open_ensemble(shared, options, whole=False)
    stream = ensemble.stream(text, **options)
    if as_json:
        print_json(stream.finish().as_dict())
        return 0
    display = Display(ensemble, ensemble.settings(**options).method)
    display.legend()
    try:
        for token in stream:
            display.write(token)
    finally:
        # Interrupted or failed, the text so far stands on lines of its own.
        display.end()
    display.figures(stream.completion)
    return 0


def _many(shared: Shared, more: Options, one: tuple[str | None, bool], batch: Batch | None) -> int:
    """Answer a file of prompts."""
    prompt, as_json = one
    if batch is None:
        raise UsageError("--input and --output go together", "name the file of prompts and the file for the replies")
    if prompt is not None or as_json:
        raise UsageError(
            f"--input takes no {'prompt' if prompt is not None else '--json'} beside it",
            "prompts and replies are files",
        )
    prompts = batch.prompts()
    options = cast("Options", {**shared.options(), **more})
    return batch.run(open_ensemble(shared, options), prompts, options)


def _schema(path: Path) -> Any:
    """Read a JSON schema. Raises ConfigError that names the file."""
    [text] = read_texts([path]).values()
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error


def _biases(given: list[str]) -> dict[str | int, float]:
    """Return biases by text. Raises UsageError for what is none."""
    found: dict[str | int, float] = {}
    for one in given:
        text, equals, value = one.rpartition("=")
        try:
            found[text] = float(value)
        except ValueError:
            equals = ""
        if not equals or not text:
            raise UsageError(f"--logit-bias is {one!r}", "give a text and a number, such as ' water=-2.5'")
    return found


def _text(prompt: str | None, raw: bool) -> str:
    """Return the prompt. Of a message from standard input, the newline that ends it is left out; `raw` keeps it."""
    if prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("there is no prompt", f"give one here or on standard input, {_EXAMPLE}")
    if prompt is None or prompt == "-":
        prompt = decoded(sys.stdin.buffer.read())
        if not raw:
            prompt = prompt.removesuffix("\n").removesuffix("\r")
    if not raw and not prompt.strip():
        raise ConfigError("the prompt is empty", f"write something, {_EXAMPLE}")
    return prompt


def decoded(data: bytes) -> str:
    """Return what came from standard input as text. Raises ConfigError when it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"standard input is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}", "convert it first"
        ) from error
