"""What commands show: completions, each token in the colour of its member; tables, notes and JSON.

Texts and reports go to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from itertools import cycle
from typing import IO, TYPE_CHECKING, Any

from mixlm.terminal import has_colours, is_terminal, styled, visible

if TYPE_CHECKING:
    from rich.console import Console

    from mixlm.ensemble import Ensemble
    from mixlm.types import Completion, Token

# Colours, of the 256 of terminals and in CSS, with a contrast of about 4 on black and on white.
PALETTE = {32: "#0087d7", 166: "#d75f00", 133: "#af5faf", 29: "#00875f", 161: "#d7005f", 99: "#875fff"}
_DIM = "2"


def dim(line: str) -> None:
    """Write a secondary line to stderr."""
    if sys.stderr is not None:
        print(styled(visible(line), _DIM, sys.stderr), file=sys.stderr, flush=True)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print one JSON object to stdout."""
    print(json_text(value, indent=indent), flush=True)


def json_text(value: Any, *, indent: int | None = 2) -> str:
    """Return a value as ASCII JSON, which any terminal and locale can show."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    """Replace numbers that JSON cannot express by None."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    """Print a table to stdout.

    right: the heads of right-aligned columns. styles, head_styles: rich styles for the last cell of each row, and for
    heads by name.
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
    """Print a note to stdout, dimmed if it has colours."""
    console().print(visible(text), style="dim" if has_colours(sys.stdout) else None)


def member_colours(names: Sequence[str]) -> dict[str, int]:
    """Return each member's colour, one of the 256 of terminals."""
    return dict(zip(names, cycle(PALETTE), strict=False))


class Display:
    """Shows the completions of one ensemble by one method."""

    def __init__(self, ensemble: Ensemble, method: str) -> None:
        self._ensemble = ensemble
        self._method = method
        self._styles = {name: f"38;5;{code}" for name, code in member_colours(ensemble.names).items()}
        self._colours = len(ensemble.members) > 1
        self._direct = is_terminal(sys.stdout) or has_colours(sys.stdout)

    def legend(self) -> None:
        """Show the colour and weight of each member, the method and the unit; only if the text goes to a terminal."""
        if not self._direct or sys.stderr is None:
            return
        parts = [
            f"{self._paint(visible(name), name, sys.stderr)} {weight:.0%}"
            for name, weight in zip(self._ensemble.names, self._ensemble.weights, strict=True)
        ]
        how = styled(f"{self._method} by {self._ensemble.unit.name}", _DIM, sys.stderr)
        print("  ".join([*parts, how]), file=sys.stderr, flush=True)

    def write(self, token: Token) -> None:
        """Write the text of a token."""
        text = visible(token.text) if self._direct else token.text
        sys.stdout.write(self._paint(text, token.member, sys.stdout))
        sys.stdout.flush()

    def end(self) -> None:
        """End the text with a newline."""
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _paint(self, text: str, member: str, stream: IO[str]) -> str:
        return styled(text, self._styles[member], stream) if self._colours else text


def engines_by_member(ensemble: Ensemble) -> dict[str, str]:
    """Return what runs each member, by the member's name."""
    return {member.name: member.engine.backend for member in ensemble.members}


def engines_text(ensemble: Ensemble) -> str:
    """Return what runs the members: one name where it is the same for all."""
    engines = engines_by_member(ensemble)
    names = set(engines.values())
    return names.pop() if len(names) == 1 else ", ".join(f"{name} in {engine}" for name, engine in engines.items())


def completion_fields(ensemble: Ensemble, completion: Completion) -> dict[str, Any]:
    """Return the JSON form of a completion, with what ran each member."""
    return {**completion.as_dict(), "engines": engines_by_member(ensemble)}


def show_figures(ensemble: Ensemble, completion: Completion) -> None:
    """Show statistics in one line: speed, each member's share of the tokens and forward passes, engines, the seed."""
    usage = completion.usage
    parts = [f"{usage.tokens} token{'' if usage.tokens == 1 else 's'}"]
    if completion.finish_reason == "length":
        parts[0] += " (cut off)"
    if usage.tokens_per_second:
        parts += [f"{usage.tokens_per_second:.1f} tokens/s", f"{usage.bytes_per_second:.0f} bytes/s"]
    for name, member in usage.members.items():
        share = member.tokens / usage.tokens if usage.tokens else 0.0
        parts.append(f"{name} {share:.0%}, {member.forwards} forward{'' if member.forwards == 1 else 's'}")
    if usage.drafted:
        parts.append(f"{usage.accepted} of {usage.drafted} drafts accepted")
    if usage.chosen:
        parts.append(f"auto: {usage.chosen}")
    dim(" · ".join([*parts, engines_text(ensemble), f"seed {completion.seed}"]))
