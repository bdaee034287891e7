"""Tables on stdout."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from mixlm.terminal import has_colours, is_terminal, visible

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Return what prints to stdout. Where that is no terminal, lines are as long as they need to be."""
    from rich.console import Console

    colours = has_colours(sys.stdout)
    return Console(
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

    right: heads of the columns whose cells end at the right. styles: one a row, for its last cell. head_styles: of
    heads, by their text.
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
    for at, row in enumerate(rows):
        cells = [Text(visible(one)) for one in row]
        if styles is not None:
            cells[-1].stylize(styles[at])
        table.add_row(*cells)
    console().print(table)


def print_lines(text: str) -> None:
    """Print an explanation, dim where there are colours."""
    console().print(visible(text), style="dim" if has_colours(sys.stdout) else None)
