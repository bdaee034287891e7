"""The command line: one verb a file. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from mixlm import __version__
from mixlm.cli.bench import bench
from mixlm.cli.chat import chat
from mixlm.cli.check import check
from mixlm.cli.errors import Group, failed
from mixlm.cli.eval import evaluate
from mixlm.cli.fit import fit
from mixlm.cli.generate import generate
from mixlm.cli.inspect import inspect
from mixlm.cli.models import models
from mixlm.cli.paper import paper
from mixlm.cli.plan import plan
from mixlm.cli.score import score
from mixlm.cli.serve import serve
from mixlm.errors import UsageError

__all__ = ["app", "main"]

app = typer.Typer(name="mixlm", cls=Group, add_completion=False, pretty_exceptions_enable=False)
for _command in (generate, chat, serve, inspect, check, bench, plan, score, fit, paper):
    app.command()(_command)
app.command("eval")(evaluate)
app.add_typer(models)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mixlm {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _mixlm(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Several language models write one text, at the cost of one model a token."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Whatever goes wrong becomes one sentence and a hint."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            # A terminal that cannot show a character shows a stand-in; a reply does not end over it.
            reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
    try:
        if sys.stdout is None:
            raise UsageError("standard output is closed", "leave it open, or send it to /dev/null")
        command = typer.main.get_command(app)
        with command.make_context("mixlm", list(given)) as context:
            code = command.invoke(context)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.Exit as ended:
        return ended.exit_code
    except (Exception, KeyboardInterrupt) as error:
        return failed(error, given)
