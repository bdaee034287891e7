"""Run a command line: whatever goes wrong becomes one sentence, a hint and an exit code."""

from __future__ import annotations

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
        app: the application.
        name: the program's name in messages, such as "mixlm".
        arguments: the command line without the program; None takes it from `sys.argv`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            # A terminal that cannot show a character shows a stand-in; a reply does not end over it.
            reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
    try:
        if sys.stdout is None:
            raise UsageError("standard output is closed", "leave it open, or send it to /dev/null")
        command = typer.main.get_command(app)
        with command.make_context(name, list(given), **_SETTINGS) as context:
            code = command.invoke(context)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.Exit as ended:
        return ended.exit_code
    except (Exception, KeyboardInterrupt) as error:
        return failed(error, given)
