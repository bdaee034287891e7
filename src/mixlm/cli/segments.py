"""The coloured view of a scored text at a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from mixlm.cli.display import member_colours
from mixlm.cli.tables import print_table
from mixlm.terminal import has_colours, styled, visible

# The surprisal in bits above which a segment is no longer expected, and above which it is surprising.
_EXPECTED, _SURPRISING = 1.0, 8.0
_STYLES = {"likely": "2;", "usual": "", "surprising": "1;"}
LEGEND = f"dim: likely (below {_EXPECTED:g} bit), bold: surprising ({_SURPRISING:g} bits or more)"


# What the mixture's probabilities mean, by `Scores.unit`.
_MEANINGS = {
    "token": "{segments} tokens, {size} bytes. Members share a vocabulary: the mixture's probability is exact.",
    "byte": "{size} bytes. Each is marginalised over all tokenizations of the text: probabilities are exact.",
    "word": "{segments} words, {size} bytes. One member is sampled per word, and each word is marginalised over its "
    "tokenizations: probabilities are exact.",
    "segment": "{segments} segments, {size} bytes. Segments end where all members have a token boundary; the mixture "
    "samples one member for each.",
}


def about_unit(unit: str, segments: int, size: int) -> str:
    """Explain what the mixture's probabilities mean in scores of a unit."""
    return _MEANINGS.get(unit, _MEANINGS["segment"]).format(segments=segments, size=size)


def bits(logprob: float) -> float:
    """Return the surprisal of a segment in bits."""
    return -logprob / math.log(2)


def level(logprob: float) -> str:
    """Return how surprising a segment is to the mixture: "likely", "usual" or "surprising"."""
    amount = bits(logprob)
    return "likely" if amount < _EXPECTED else "surprising" if amount >= _SURPRISING else "usual"


def responsible(segment: Mapping[str, Any]) -> str:
    """Return the member most responsible for a segment."""
    shares: dict[str, float] = segment["responsibilities"]
    return max(shares, key=lambda name: shares[name])


def show_segments(report: Mapping[str, Any]) -> None:
    """Show the report that `--json` prints: the coloured text, or without colours one line per segment."""
    names = list(report["bits_per_byte"]["members"])
    if not has_colours(sys.stdout):
        rows = [
            (
                f"{bits(segment['logprob']):.2f}",
                responsible(segment),
                f"{max(segment['responsibilities'].values()):.0%}",
                text,
            )
            for segment in report["segments"]
            if (text := visible_line(segment["text"]))
        ]
        print_table(("bits", "member", "share", "text"), rows, right={"bits", "share"})
        return
    codes = {name: f"38;5;{code}" for name, code in member_colours(names).items()}
    legend = "  ".join(styled(visible(name), codes[name], sys.stdout) for name in names)
    sys.stdout.write(f"{legend}  {styled(LEGEND, '2', sys.stdout)}\n\n")
    for segment in report["segments"]:
        style = f"{_STYLES[level(segment['logprob'])]}{codes[responsible(segment)]}"
        # With a line break inside a style, some terminals would colour the rest of the line.
        lines = visible(segment["text"]).split("\n")
        sys.stdout.write("\n".join(styled(line, style, sys.stdout) for line in lines))
    sys.stdout.write("\n")
    sys.stdout.flush()


def visible_line(text: str) -> str:
    """Return a text in one line, with visible newlines, tabs, and leading and trailing spaces."""
    shown = visible(text.replace("\n", "⏎").replace("\t", "⇥"))
    left, right = len(shown) - len(shown.lstrip(" ")), len(shown) - len(shown.rstrip(" "))
    inner = shown.strip(" ")
    return "␣" * left + inner + ("␣" * right if inner else "")
