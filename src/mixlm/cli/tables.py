"""Tables and notes on stdout."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from mixlm.terminal import has_colours, is_terminal, visible

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Return a console on stdout. If stdout is not a terminal, lines are not wrapped."""
    from rich.console import Console

    class PlainConsole(Console):
        def on_broken_pipe(self) -> None:
            """Leave it to the program to end: rich would end it with an exit code of its own."""
            raise BrokenPipeError

    colours = has_colours(sys.stdout)
    return PlainConsole(
        file=sys.stdout,
        force_terminal=colours,
        no_color=not colours,
        width=None if is_terminal(sys.stdout) else 1000,
        highlight=False,
        markup=False,
        emoji=False,
    )


def print_table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[str] = (),
    styles: Sequence[str] | None = None,
    head_styles: Mapping[str, str] | None = None,
) -> None:
    """Print a table.

    Args:
        heads: The column headings.
        rows: The cells of each row.
        right: The headings of right-aligned columns.
        styles: A rich style for the last cell of each row.
        head_styles: Rich styles of headings, by heading.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        table.add_column(
            Text(head, style=(head_styles or {}).get(head, "")),
            justify="right" if head in right else "left",
            overflow="fold",
        )
    for i, row in enumerate(rows):
        cells = [Text(visible(cell)) for cell in row]
        if styles is not None:
            cells[-1].stylize(styles[i])
        table.add_row(*cells)
    console().print(table)


def print_lines(text: str) -> None:
    """Print a note, dimmed if stdout has colours."""
    console().print(visible(text), style="dim" if has_colours(sys.stdout) else None)
