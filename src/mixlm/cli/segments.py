"""The coloured view of a scored text: at a terminal, and as a self-contained HTML page."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mixlm.cli.display import PALETTE, member_colours, print_table
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
_PAGE_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1c1c; --faint: #666; --line: #ddd; --toward: #000 }
@media (prefers-color-scheme: dark) {
  :root { --back: #16171a; --text: #e4e4e4; --faint: #9a9a9a; --line: #3a3b3f; --toward: #fff }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.25rem 7rem; max-width: 60rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.3rem; margin: 0 0 1rem; overflow-wrap: anywhere }
table { border-collapse: collapse; margin-bottom: 1rem }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
th { font-weight: 600; color: var(--faint) }
p { color: var(--faint); margin: .4rem 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 15px/1.7 ui-monospace, monospace; margin: 1.5rem 0;
  border-top: 1px solid var(--line); padding-top: 1rem }
.m { --own: color-mix(in srgb, var(--c) 78%, var(--toward)); color: var(--own) }
.likely { opacity: .7 }
.surprising { font-weight: 700; background: color-mix(in srgb, var(--c) 20%, transparent); border-radius: 3px }
pre span:hover { opacity: 1; outline: 1px solid var(--own) }
pre span:hover::after { content: attr(data-n); position: fixed; left: 1rem; bottom: 1rem; padding: .6rem .9rem;
  background: var(--back); color: var(--text); border: 1px solid var(--faint); border-radius: 6px; white-space: pre;
  font: 13px/1.5 ui-monospace, monospace; z-index: 1 }
"""


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


def page(title: str, report: Mapping[str, Any], heads: Sequence[str], numbers: Sequence[Sequence[str]]) -> str:
    """Return the HTML page of a scored text.

    report: what `--json` prints. numbers: a row for each member, which begins with its name; the mixture comes last.
    """
    names = list(report["bits_per_byte"]["members"])
    places = {name: i % len(PALETTE) for i, name in enumerate(names)}
    colours = "".join(f".m{i} {{ --c: {colour} }}\n" for i, colour in enumerate(PALETTE.values()))
    rows = [_row("th", heads), *(_member(row, places.get(row[0])) for row in numbers)]
    segments = "".join(_segment(segment, places) for segment in report["segments"])
    about = about_unit(report["unit"], len(report["segments"]), report["bytes"])
    return (
        '<!doctype html>\n<html lang="und">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_safe(title)}</title>\n<style>{_PAGE_STYLE}{colours}</style>\n</head>\n<body>\n<h1>{_safe(title)}</h1>\n"
        f"<table>\n{''.join(rows)}</table>\n<p>{_safe(about)}</p>\n"
        "<p>Each segment has the colour of the member most responsible for it. "
        f"{_safe(LEGEND[0].upper() + LEGEND[1:])}. Point at a segment for its numbers.</p>\n"
        f"<pre>{segments}</pre>\n</body>\n</html>\n"
    )


def _member(row: Sequence[str], place: int | None) -> str:
    name = _safe(row[0]) if place is None else f'<span class="m m{place}">{_safe(row[0])}</span>'
    return _row("td", [name, *map(_safe, row[1:])])


def _row(kind: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{kind}>{cell}</{kind}>' for cell in cells)}</tr>\n"


def _segment(segment: Mapping[str, Any], places: Mapping[str, int]) -> str:
    if not segment["text"]:
        return ""
    kind = f"m m{places[responsible(segment)]} {level(segment['logprob'])}"
    width = max(map(len, ("mixture", *places)))
    lines = [f"{'mixture':{width}} {bits(segment['logprob']):7.2f} bits"]
    for name in places:
        share = segment["responsibilities"][name]
        lines.append(f"{name:{width}} {bits(segment['members'][name]):7.2f} bits  {share:4.0%}")
    return f'<span class="{kind}" data-n="{_safe(chr(10).join(lines))}">{_safe(segment["text"])}</span>'


def _safe(text: str) -> str:
    return escape(visible(text))
