"""`mixlm models`: what can be fetched, what is installed, and fetching it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixlm.cli.display import print_json
from mixlm.cli.groups import Command, CommandGroup
from mixlm.cli.tables import print_table
from mixlm.terminal import visible

if TYPE_CHECKING:
    from mixlm.models import InstalledModel

models = typer.Typer(name="models", cls=CommandGroup, add_completion=False, rich_markup_mode=None)

_Json = Annotated[bool, typer.Option("--json", help="Print the list as one JSON object.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@models.callback(invoke_without_command=True)
def show(context: typer.Context, as_json: _Json = False, debug: _Debug = False) -> None:
    """List the models, or fetch one.

    Without a command: the models that can be fetched by name, and those that are installed.
    """
    if context.invoked_subcommand is not None:
        return
    rows = _rows()
    if as_json:
        print_json({"models": rows})
        return
    from mixlm.models import cache_root

    print_table(
        ("model", "what it is", "size", "installed", "licence"),
        [
            (
                one["name"],
                one["title"] or one["source"] or "",
                _size(one["size_bytes"]),
                "yes" if one["installed"] else "no",
                one["licence"] or "",
            )
            for one in rows
        ],
        right={"size"},
    )
    # Each model's folder is named like the model, so that one line says where all of them are.
    print(f"Installed models are in {visible(str(cache_root() / 'models'))}")
    if lacking := [one["name"] for one in rows if not one["installed"]]:
        print(f"Fetch one with: mixlm models get {lacking[0]}")


@models.command(cls=Command)
def get(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A name listed by `mixlm models`, or demo for the demo pair.")
    ],
    debug: _Debug = False,
) -> None:
    """Fetch a model, or the demo pair, unless it is installed."""
    import mixlm.models as store

    for one in store.get(name):
        print(f"{one.name} is installed: {visible(str(one.path))}")


def _rows() -> list[dict[str, Any]]:
    """Return the catalogue's models first, then the others that are installed."""
    from mixlm.models import CATALOG, installed

    there = {one.name: one for one in installed()}
    rows = []
    for name in dict.fromkeys([*CATALOG, *there]):
        known = CATALOG.get(name)
        row = _installed(there.get(name))
        if known is not None:
            row["size_bytes"] = row["size_bytes"] or known.size
            row["licence"] = row["licence"] or known.licence
        title, chat = (known.title, known.chat) if known is not None else (None, None)
        rows.append({"name": name, "title": title, "chat": chat, **row})
    return rows


def _installed(one: InstalledModel | None) -> dict[str, Any]:
    return {
        "installed": one is not None,
        "size_bytes": one.size_bytes if one else None,
        "dtype": one.dtype if one else None,
        "licence": one.licence if one else None,
        "source": one.source if one else None,
        "path": str(one.path) if one else None,
    }


def _size(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.0f} MB"
