"""What a reply looks like: text in the colour of the member that wrote it, a legend, and its figures.

The text goes to stdout as it is written, character by character; everything else goes to stderr.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

from mixlm.terminal import has_colours, is_terminal, styled, visible

if TYPE_CHECKING:
    from mixlm.ensemble import Ensemble
    from mixlm.types import Completion, Token

# Of the 256 colours, some that keep a contrast of about 4 with a black and with a white background alike.
_PALETTE = (32, 166, 133, 29, 161, 99)
_DIM = "2"


def dim(line: str) -> None:
    """Write a line to stderr that is not the point."""
    if sys.stderr is not None:
        print(styled(visible(line), _DIM, sys.stderr), file=sys.stderr, flush=True)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print one JSON object to stdout."""
    print(json_text(value, indent=indent), flush=True)


def json_text(value: Any, *, indent: int | None = 2) -> str:
    """Return a value as JSON, in ASCII so that any terminal and any locale can take it."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    """Return a value with null in place of the numbers that JSON has no form for."""
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def member_colours(names: Sequence[str]) -> dict[str, int]:
    """Return each member's colour, one of the 256."""
    return {name: _PALETTE[i % len(_PALETTE)] for i, name in enumerate(names)}


class Display:
    """Shows replies of one ensemble.

    method: how its replies are written, for the legend.
    """

    def __init__(self, ensemble: Ensemble, method: str) -> None:
        self._ensemble = ensemble
        self._method = method
        self._styles = {name: f"38;5;{code}" for name, code in member_colours(ensemble.names).items()}
        self._colours = len(ensemble.members) > 1
        self._direct = is_terminal(sys.stdout) or has_colours(sys.stdout)

    def legend(self) -> None:
        """Show who writes in which colour, with which weight, and how. Only where the text is shown directly."""
        if not self._direct or sys.stderr is None:
            return
        parts = [
            f"{self._paint(visible(name), name, sys.stderr)} {weight:.0%}"
            for name, weight in zip(self._ensemble.names, self._ensemble.weights, strict=True)
        ]
        how = styled(f"{self._method} by {self._ensemble.unit.name}", _DIM, sys.stderr)
        print("  ".join([*parts, how]), file=sys.stderr, flush=True)

    def write(self, token: Token) -> None:
        """Write what a token adds to the text."""
        text = visible(token.text) if self._direct else token.text
        sys.stdout.write(self._paint(text, token.member, sys.stdout))
        sys.stdout.flush()

    def end(self) -> None:
        """End the text with a newline."""
        sys.stdout.write("\n")
        sys.stdout.flush()

    def figures(self, completion: Completion) -> None:
        """Show a reply's figures in one line."""
        dim(figures(completion))

    def _paint(self, text: str, member: str, stream: IO[str]) -> str:
        return styled(text, self._styles[member], stream) if self._colours else text


def figures(completion: Completion) -> str:
    """Return one line of figures: speed, each member's share of the tokens and its forwards, seed."""
    usage = completion.usage
    parts = [f"{usage.tokens} token{'' if usage.tokens == 1 else 's'}"]
    if completion.finish_reason == "length":
        parts[0] += " (cut off)"
    if usage.tokens_per_second:
        parts += [f"{usage.tokens_per_second:.1f} tokens/s", f"{usage.bytes_per_second:.0f} bytes/s"]
    for name, one in usage.members.items():
        share = one.tokens / usage.tokens if usage.tokens else 0.0
        parts.append(f"{name} {share:.0%}, {one.forwards} forward{'' if one.forwards == 1 else 's'}")
    if usage.drafted:
        parts.append(f"{usage.accepted} of {usage.drafted} guesses right")
    if usage.chosen:
        parts.append(f"auto: {usage.chosen}")
    return " · ".join([*parts, f"seed {completion.seed}"])
