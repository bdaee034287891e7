"""Put what was measured into docs/performance.md: each report in docs/performance between the marks of its name.

Its figure is drawn beside it.

    python -m research.benchmark.page [PAGE [FOLDER]]

A part of the page begins with `<!-- results: NAME -->` and ends with `<!-- end of results -->`; what stands between is
replaced where FOLDER/NAME.json is there, and left alone where it is not.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.benchmark import plots

ROOT = Path(__file__).resolve().parents[2]
_PART = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
_REPORTS = ("--output", "--json", "--plot")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column is text, the others are numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, form: str = ".1f") -> str:
    """Format a number; empty where there is none."""
    return "" if value is None else format(value, form)


def runs(report: dict[str, Any]) -> str:
    """The runs of a benchmark, and how many times as fast they are as each other."""
    rows = [
        (
            run["label"],
            f"{number(run['tokens_per_second'])} "
            f"({number(run['slowest_tokens_per_second'])} to {number(run['fastest_tokens_per_second'])})",
            number(run["predicted_tokens_per_second"]),
            number(run["outside_forwards_share"], ".1%"),
            " + ".join(
                f"{count / report['environment']['settings']['tokens']:.2f}" for count in run["forwards"].values()
            ),
            number(run["acceptance"], ".0%"),
            number(run["seconds_to_first_token"], ".2f"),
            number(None if run["memory_bytes"] is None else run["memory_bytes"] / 1e9, ".2f"),
        )
        for run in report["runs"]
    ]
    heads = (
        "method",
        "tokens/s",
        "by the cost model",
        "outside forwards",
        "forwards a token",
        "drafts accepted",
        "s to first token",
        "GB in use",
    )
    return f"{table(heads, rows)}\n\n{ratios(report['ratios'])}"


def ratios(values: dict[str, float]) -> str:
    """How many times as fast: a row what is compared, a column what it is compared with."""
    pairs = {tuple(name.split("/", 1)): ratio for name, ratio in values.items()}
    bases = list(dict.fromkeys(base for _, base in pairs))
    rows = [
        (name, *(number(pairs.get((name, base)), ".2f") for base in bases))
        for name in dict.fromkeys(name for name, _ in pairs)
    ]
    return table(("speed over that of", *bases), rows)


def points(report: dict[str, Any]) -> str:
    """The points of a sweep: a row a place, a column a method."""
    points = report["points"]
    series = list(dict.fromkeys(point["series"] for point in points))
    by_place = {(point["x"], point["series"]): point for point in points}
    rows = []
    for x in dict.fromkeys(point["x"] for point in points):
        row = [x if isinstance(x, str) else f"{x:g}"]
        for name in series:
            point = by_place.get((x, name))
            expected = f" ({number(point['predicted'])})" if point and point["predicted"] is not None else ""
            row.append("" if point is None else number(point["tokens_per_second"]) + expected)
        if "conventional" in series and "mixture" in series:
            both = [by_place.get((x, name)) for name in ("mixture", "conventional")]
            speeds = [point["tokens_per_second"] for point in both if point is not None]
            row.append(number(speeds[0] / speeds[1], ".2f") if len(speeds) == 2 else "")
        rows.append(row)
    heads = [report["axis"], *(f"{name}, tokens/s" for name in series)]
    heads += ["mixture/conventional"] if len(rows[0]) > len(heads) else []
    return table(heads, rows)


def part(name: str, report: dict[str, Any]) -> str:
    """What is said of one report: the command, the table, the machine, notes, and its figure."""
    where = report["environment"]
    arguments = shlex.split(where["command"])[1:]
    words = ["python", "-m", "research.benchmark", *arguments[arguments[:1] == ["bench"] :]]
    for option in _REPORTS:
        if option in words:
            i = words.index(option)
            del words[i : i + 2]
    machine = where.get("accelerator") or f"{where['processor']}, {where['cores']} cores"
    kinds = sorted({engine["dtype"] for engine in where["engines"].values() if "dtype" in engine})
    versions = ", ".join(
        f"{package} {where['versions'][package]}"
        for package in ("torch", "transformers")
        if package in where["versions"]
    )
    about = [machine, *kinds, versions, f"peak memory {where['peak_memory_bytes'] / 1e9:.1f} GB"]
    lines = [
        f"```sh\n{shlex.join(words)}\n```",
        points(report) if "sweep" in report else runs(report),
        " · ".join(text for text in about if text),
        *(f"- {note}" for note in report.get("notes", [])),
        f"![{name}](performance/{name}.png)",
    ]
    return "\n\n".join(lines)


def fill(page: str, parts: Mapping[str, str]) -> str:
    """The page with every part in the place of its name."""

    def put(match: re.Match[str]) -> str:
        text = parts.get(match[2])
        return match[0] if text is None else f"{match[1]}\n{text}\n\n{match[3]}"

    return _PART.sub(put, page)


def fill_page(page: Path, parts: Mapping[str, str]) -> None:
    """Write every part into a page, in the place of its name, and print which parts have one."""
    text = page.read_text(encoding="utf-8")
    page.write_text(fill(text, parts), encoding="utf-8")
    places = {match[2] for match in _PART.finditer(text)}
    for name in parts:
        print(f"{name}: {'in the page' if name in places else 'the page has no place for it'}")


def main(page: Path, folder: Path) -> None:
    """Fill the page with the reports of a folder, and draw their figures beside them."""
    reports = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    places = [match[2] for match in _PART.finditer(page.read_text(encoding="utf-8"))]
    for name in places:
        if name in reports:
            plots.save(reports[name], folder / f"{name}.png")
        else:
            print(f"{name}: not measured")
    fill_page(page, {name: part(name, report) for name, report in reports.items()})


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]]
    main(*paths, *[ROOT / "docs" / "performance.md", ROOT / "docs" / "performance"][len(paths) :])
