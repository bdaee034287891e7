"""`mixlm models`: list, fetch and remove models."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mixlm.cli.display import print_json, print_table
from mixlm.cli.run import Command, CommandGroup
from mixlm.errors import UsageError
from mixlm.terminal import visible

models = typer.Typer(name="models", cls=CommandGroup, add_completion=False, rich_markup_mode=None)

_Json = Annotated[bool, typer.Option("--json", help="Print the list as one JSON object.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@models.callback(invoke_without_command=True)
def show(context: typer.Context, as_json: _Json = False, debug: _Debug = False) -> None:
    """List, fetch or remove models.

    Without a command: list them.
    """
    if context.invoked_subcommand is None:
        _list(as_json)
    elif as_json:
        raise UsageError(
            f"--json stands before {context.invoked_subcommand}, and is an option of the list",
            "write: mixlm models --json",
        )


@models.command("list", cls=Command)
def list_models(as_json: _Json = False, debug: _Debug = False) -> None:
    """List the models that can be fetched by name, and those that are installed."""
    _list(as_json)


def _list(as_json: bool) -> None:
    rows = _rows()
    if as_json:
        print_json({"models": rows})
        return
    from mixlm.models.cache import cache_root

    print_table(
        ("model", "what it is", "size", "installed", "licence"),
        [
            (
                row["name"],
                row["title"] or row["source"] or "",
                _size(row["size_bytes"]),
                "yes" if row["installed"] else "no",
                row["licence"] or "",
            )
            for row in rows
        ],
        right={"size"},
    )
    print(f"Installed models are in {visible(str(cache_root() / 'models'))}")
    if missing := [row["name"] for row in rows if not row["installed"]]:
        print(f"Fetch one with: mixlm models get {missing[0]}")


@models.command(cls=Command)
def get(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME",
            help="A name listed by `mixlm models`; demo, for the demo pair; a .gguf file; or a Hugging Face id,"
            " OWNER/NAME, or a file of one, OWNER/NAME/FILE.gguf.",
        ),
    ],
    debug: _Debug = False,
) -> None:
    """Fetch models, unless they are installed."""
    from mixlm.models.fetch import fetch_models

    for name in names:
        for model in fetch_models(name):
            print(f"{visible(model.name)} is installed: {visible(str(model.path))}")


@models.command(cls=Command)
def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="A model that `mixlm models` lists as installed.")],
    debug: _Debug = False,
) -> None:
    """Remove installed models."""
    from mixlm.models.cache import remove
    from mixlm.terminal import ProgressDisplay

    for name in names:
        model = remove(name, ProgressDisplay())
        print(f"{visible(model.name)} is removed: {_size(model.size_bytes)}")


def _rows() -> list[dict[str, Any]]:
    """Return the models of the catalog, then the other installed ones."""
    from mixlm.models.cache import installed
    from mixlm.models.catalog import CATALOG

    by_name = {model.name: model for model in installed()}
    rows = []
    for name in dict.fromkeys([*CATALOG, *by_name]):
        known, model = CATALOG.get(name), by_name.get(name)
        row = {
            "name": name,
            "title": known and known.title,
            "chat": known and known.chat,
            "installed": model is not None,
            "size_bytes": (model and model.size_bytes) or (known and known.size),
            "dtype": model and model.dtype,
            "licence": (model and model.licence) or (known and known.licence),
            "source": model and model.source,
            "path": model and str(model.path),
        }
        rows.append(row)
    return rows


def _size(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.0f} MB"
