"""The command line: one verb a file. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from mixlm.cli.bench import bench
from mixlm.cli.chat import chat
from mixlm.cli.check import check
from mixlm.cli.errors import Group
from mixlm.cli.eval import evaluate
from mixlm.cli.fit import fit
from mixlm.cli.generate import generate
from mixlm.cli.inspect import inspect
from mixlm.cli.models import models
from mixlm.cli.run import run_app
from mixlm.cli.score import score
from mixlm.cli.serve import serve
from mixlm.errors import UsageError
from mixlm.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(name="mixlm", cls=Group, add_completion=False, pretty_exceptions_enable=False)
for _command in (generate, chat, serve, inspect, check, bench, score, fit):
    app.command()(_command)
app.command("eval")(evaluate)
app.add_typer(models)


@app.command("paper", hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def _paper() -> None:
    raise UsageError("mixlm paper is run from a clone of mixlm now", "there: python -m research.paper NAME")


@app.command("plan", hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def _plan() -> None:
    raise UsageError("mixlm plan is run from a clone of mixlm now", "there: python -m research.planning FILE")


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
    """Run `mixlm` and return its exit code."""
    return run_app(app, "mixlm", arguments)
