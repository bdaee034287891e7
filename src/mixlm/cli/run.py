"""Run a command line, and turn errors into one sentence, a hint and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer

from mixlm.cli.errors import failed
from mixlm.errors import UsageError

_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def run_app(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a Typer application and return its exit code.

    Args:
        app: The application.
        name: The program's name in messages, such as "mixlm".
        arguments: The command line without the program; `sys.argv` by default.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            # Characters that the terminal cannot show are replaced; they do not stop a completion.
            reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
    try:
        if sys.stdout is None:
            raise UsageError("standard output is closed", "leave it open, or send it to /dev/null")
        command = typer.main.get_command(app)
        variable = f"_{name}_COMPLETE".upper()
        if (instruction := os.environ.get(variable)) and name.isidentifier():
            # A shell asks for the completions of a command line: see --show-completion.
            from typer._completion_classes import completion_init
            from typer.completion import shell_complete

            completion_init()
            return shell_complete(command, _SETTINGS, name, variable, instruction)
        with command.make_context(name, list(arguments), **_SETTINGS) as context:
            code = command.invoke(context)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.Exit as ended:
        return _ended(ended.exit_code)
    except (Exception, KeyboardInterrupt) as error:
        try:
            return failed(error, arguments)
        except BrokenPipeError as closed:  # nobody reads the message
            return failed(closed, arguments)


def _ended(code: int) -> int:
    """Return the exit code of a command that ended early, once its output has a reader."""
    try:
        sys.stdout.flush()
    except BrokenPipeError as error:
        return failed(error, ())
    return code
