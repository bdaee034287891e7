"""`mixlm chat`: a conversation at a terminal, or with one message per line from a pipe."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

from typer import Option

from mixlm.cli.display import Display, dim, print_json
from mixlm.cli.errors import say
from mixlm.cli.inputs import STDIN, decode
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared, with_shared
from mixlm.errors import MixlmError, PromptTooLongError, did_you_mean
from mixlm.terminal import has_colours, is_terminal

if TYPE_CHECKING:
    from mixlm.chat import Chat

_COMMANDS = {
    "/help": "show this list",
    "/reset": "start a new conversation",
    "/exit": "end the chat; so do Ctrl-D, and Ctrl-C while nothing is being generated",
}
_PROMPT = "> "
# A Ctrl-C within this many seconds after a completion was meant to stop that completion.
_GRACE = 1.0


@with_shared
def chat(
    shared: Shared,
    as_json: Annotated[
        bool, Option("--json", help="Print each completion as one JSON object on its own line.")
    ] = False,
) -> int:
    """Chat with an ensemble.

    Ctrl-C stops a completion; /help lists the commands. From a pipe, each line is a message.
    """
    options = shared.options()
    ensemble = open_ensemble(shared, options, whole=False)
    display = Display(ensemble, ensemble.settings(**options).method)
    if not as_json:
        display.legend()
    if is_terminal(sys.stdin):
        dim("/help lists the commands; Ctrl-C stops a completion")
    conversation = ensemble.chat(**options)
    ended = -_GRACE
    while (line := _read(ended)) is not None:
        command = _command(line)
        if command == "/exit":
            break
        if command == "/reset":
            conversation = ensemble.chat(**options)
            dim("a new conversation")
        elif command is not None:
            _help(command)
        elif line.strip():
            try:
                _complete(conversation, line, display, as_json=as_json)
            except MixlmError as error:
                # A script learns of it from the exit code; at a terminal the conversation can continue.
                if not is_terminal(sys.stdin):
                    raise
                hint = "/reset starts a new conversation" if isinstance(error, PromptTooLongError) else error.hint
                say(f"mixlm: error: {error.message}" + (f"\nhint: {hint}" if hint else ""))
            ended = time.monotonic()
    return 0


def _complete(conversation: Chat, line: str, display: Display, *, as_json: bool) -> None:
    """Generate one completion. Ctrl-C stops it; the text so far stays in the history."""
    stopped = False
    generation = conversation.stream(line)
    try:
        for token in generation:
            if not as_json:
                display.write(token)
    except KeyboardInterrupt:
        stopped = True
    finally:
        if not as_json:
            display.end()
    if as_json:
        print_json(generation.completion.as_dict(), indent=None)
        return
    if stopped:
        dim("stopped")
    display.figures(generation.completion)


def _read(ended: float) -> str | None:
    """Return the next message, or None at the end of input and for Ctrl-C.

    Args:
        ended: When the last completion ended, by `time.monotonic`. Ctrl-C right after it returns an empty message.
    """
    try:
        return _line()
    except EOFError:
        stay = False
    except KeyboardInterrupt:
        stay = time.monotonic() - ended < _GRACE
    if is_terminal(sys.stdin):
        print(file=sys.stderr, flush=True)
    return "" if stay else None


def _line() -> str:
    """Return one line of standard input. Raises EOFError at its end."""
    if not is_terminal(sys.stdin):
        if sys.stdin is None or not (data := sys.stdin.buffer.readline()):
            raise EOFError
        return decode(STDIN, data).removesuffix("\n").removesuffix("\r")
    if not is_terminal(sys.stdout):
        # Stdout is for the completions only.
        print(_PROMPT, end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            raise EOFError
        return line.removesuffix("\n")
    with suppress(ImportError):
        import readline  # noqa: F401  # gives `input` editing and a history
    # \1 and \2 tell readline which characters have no width.
    return input(f"\1\x1b[1m\2{_PROMPT}\1\x1b[0m\2" if has_colours(sys.stdout) else _PROMPT)


def _command(line: str) -> str | None:
    """Return the line if it is a command: a slash and one word of letters. Anything else is a message."""
    word = line.strip()
    return word if word.startswith("/") and word[1:].isalpha() else None


def _help(command: str) -> None:
    if command != "/help":
        dim(f"there is no command {command}; {did_you_mean(command, _COMMANDS) or '/help lists them'}")
        return
    for name, text in _COMMANDS.items():
        dim(f"{name:<8} {text}")
