"""The coloured view of a scored text at a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from mixlm.cli.display import _PALETTE
from mixlm.cli.tables import print_table
from mixlm.terminal import has_colours, styled, visible

# Bits from which on a segment is no longer expected, and from which on it is a surprise.
_EXPECTED, _SURPRISING = 1.0, 8.0
_STYLES = {"likely": "2;", "usual": "", "surprising": "1;"}
LEGEND = f"dim: likely (below {_EXPECTED:g} bit), bold: surprising ({_SURPRISING:g} bits or more)"


def about_unit(unit: str, segments: int, size: int) -> str:
    """Say what the mixture's figures mean in a unit."""
    if unit == "token":
        return f"{segments} tokens, {size} bytes. Members share their tokens: the mixture's probability is exact."
    if unit == "byte":
        return f"{size} bytes. Each is drawn anew, over every way to cut the text into tokens: probabilities are exact."
    if unit == "word":
        return (
            f"{segments} words, {size} bytes. One member is drawn for each, and every way to write it counts: "
            "probabilities are exact."
        )
    return (
        f"{segments} segments, {size} bytes. Segments end where all members have a token boundary; the mixture draws "
        "one member for each."
    )


def bits(logprob: float) -> float:
    """Return the surprise of a segment in bits."""
    return -logprob / math.log(2)


def level(logprob: float) -> str:
    """Say how much a segment surprises the mixture: "likely", "usual" or "surprising"."""
    amount = bits(logprob)
    return "likely" if amount < _EXPECTED else "surprising" if amount >= _SURPRISING else "usual"


def responsible(segment: Mapping[str, Any]) -> str:
    """Return the member most responsible for a segment."""
    shares: dict[str, float] = segment["responsibilities"]
    return max(shares, key=lambda name: shares[name])


def show_segments(found: Mapping[str, Any]) -> None:
    """Show a text in the form that `--json` prints. Without colours, a line for each segment."""
    names = list(found["bits_per_byte"]["members"])
    if not has_colours(sys.stdout):
        rows = [
            (f"{bits(one['logprob']):.2f}", responsible(one), f"{max(one['responsibilities'].values()):.0%}", shown)
            for one in found["segments"]
            if (shown := ascii_ends(one["text"]))
        ]
        print_table(("bits", "member", "share", "text"), rows, right={"bits", "share"})
        return
    codes = {name: f"38;5;{_PALETTE[i % len(_PALETTE)]}" for i, name in enumerate(names)}
    legend = "  ".join(styled(visible(name), codes[name], sys.stdout) for name in names)
    sys.stdout.write(f"{legend}  {styled(LEGEND, '2', sys.stdout)}\n\n")
    for one in found["segments"]:
        style = f"{_STYLES[level(one['logprob'])]}{codes[responsible(one)]}"
        # A line break inside a style would colour the rest of the line at some terminals.
        lines = visible(one["text"]).split("\n")
        sys.stdout.write("\n".join(styled(line, style, sys.stdout) for line in lines))
    sys.stdout.write("\n")
    sys.stdout.flush()


def ascii_ends(text: str) -> str:
    """Return a text in one line, with its spaces at both ends and its line ends visible."""
    shown = visible(text.replace("\n", "⏎").replace("\t", "⇥"))
    left, right = len(shown) - len(shown.lstrip(" ")), len(shown) - len(shown.rstrip(" "))
    inner = shown.strip(" ")
    return "␣" * left + inner + ("␣" * right if inner else "")
