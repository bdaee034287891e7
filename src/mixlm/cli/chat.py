"""`mixlm chat`: a conversation at a terminal, or one message a line from a pipe."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

from typer import Option

from mixlm.cli.display import Display, dim, print_json
from mixlm.cli.errors import say
from mixlm.cli.generate import decoded
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared, with_shared
from mixlm.errors import MixlmError, PromptTooLongError, did_you_mean
from mixlm.terminal import has_colours, is_terminal

if TYPE_CHECKING:
    from mixlm.ensemble import Chat

_COMMANDS = {
    "/help": "show this",
    "/reset": "begin a new conversation",
    "/exit": "end; so do Ctrl-D, and Ctrl-C while no reply is being written",
}
_PROMPT = "> "
# A Ctrl-C that comes this many seconds behind a reply was meant to stop that reply.
_GRACE = 1.0


@with_shared
def chat(
    shared: Shared,
    as_json: Annotated[
        bool, Option("--json", help="Print each reply as one JSON object on a line of its own.")
    ] = False,
) -> int:
    """Talk with an ensemble.

    Ctrl-C stops a reply; /help lists the commands. From a pipe, each line is a message.
    """
    options = shared.options()
    ensemble = open_ensemble(shared, options, whole=False)
    display = Display(ensemble, ensemble.settings(**options).method)
    if not as_json:
        display.legend()
    if is_terminal(sys.stdin):
        dim("/help lists the commands; Ctrl-C stops a reply")
    talk = ensemble.chat(**options)
    ended = -_GRACE
    while (line := _read(ended)) is not None:
        command = _command(line)
        if command == "/exit":
            break
        if command == "/reset":
            talk = ensemble.chat(**options)
            dim("a new conversation")
        elif command is not None:
            _help(command)
        elif line.strip():
            try:
                _reply(talk, line, display, as_json=as_json)
            except MixlmError as error:
                # A script is told by the exit code; at a terminal the conversation can go on.
                if not is_terminal(sys.stdin):
                    raise
                hint = "/reset begins a new conversation" if isinstance(error, PromptTooLongError) else error.hint
                say(f"mixlm: error: {error.message}" + (f"\nhint: {hint}" if hint else ""))
            ended = time.monotonic()
    return 0


def _reply(talk: Chat, line: str, display: Display, *, as_json: bool) -> None:
    """Write one reply. Ctrl-C ends it where it is; what was written stays in the history."""
    stopped = False
    stream = talk.stream(line)
    try:
        for token in stream:
            if not as_json:
                display.write(token)
    except KeyboardInterrupt:
        stopped = True
    finally:
        if not as_json:
            display.end()
    if as_json:
        print_json(stream.completion.as_dict(), indent=None)
        return
    if stopped:
        dim("stopped")
    display.figures(stream.completion)


def _read(ended: float) -> str | None:
    """Return the next message, or None at the end of input and for Ctrl-C.

    ended: when the last reply ended. A Ctrl-C right behind it gives an empty message.
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
        return decoded(data).removesuffix("\n").removesuffix("\r")
    if not is_terminal(sys.stdout):
        # Stdout holds the replies alone.
        print(_PROMPT, end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            raise EOFError
        return line.removesuffix("\n")
    with suppress(ImportError):
        import readline  # noqa: F401  # gives `input` editing and a history
    # The marks \1 and \2 tell readline which characters take no room.
    return input(f"\1\x1b[1m\2{_PROMPT}\1\x1b[0m\2" if has_colours(sys.stdout) else _PROMPT)


def _command(line: str) -> str | None:
    """Return the command that a line is: a slash and one word of letters. Anything else is a message."""
    word = line.strip()
    return word if word.startswith("/") and word[1:].isalpha() else None


def _help(command: str) -> None:
    if command != "/help":
        dim(f"there is no command {command}; {did_you_mean(command, _COMMANDS) or '/help lists them'}")
        return
    for name, what in _COMMANDS.items():
        dim(f"{name:<8} {what}")
