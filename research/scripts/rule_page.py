"""Put what `rule_speed` measured into a page of the docs, and draw forwards a token beside it.

    python -m research.scripts.rule_page NAME=FILE … [--page docs/performance.md]

FILE is what `rule_speed --json FILE` wrote. A part of the page begins with `<!-- results: rules-NAME -->` and ends with
`<!-- end of results -->`. The figure of all files is `performance/rules.png` beside the page.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research import figures
from research.benchmark.page import fill_page, number, table
from research.benchmark.plots import machine
from research.scripts.rule_speed import RULES, row_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Mapping[str, Mapping[str, Any]]  # by rule
_HEADS = (
    "rule",
    "forwards a token",
    "without drafts",
    "by the formula",
    "drafts accepted",
    "by the formula",
    "tokens/s",
    "of `conventional`",
    "of one member",
)


def rules_part(rows: Rows) -> str:
    """Return the command, the table, and what it was measured on."""
    last = list(rows.values())[-1]
    where = {**last["environment"], **last["about"]}
    engines = [engine for row in rows.values() for engine in row["environment"]["engines"].values()]
    kinds = sorted({str(engine["dtype"]) for engine in engines if "dtype" in engine})
    versions = [f"{package} {where['versions'][package]}" for package in ("torch", "transformers")]
    amount = "{repeats} × 3 texts of {tokens} tokens".format(**where["settings"])
    return "\n\n".join(
        [
            f"```sh\n{_command(where['settings'], list(rows))}\n```",
            table(_HEADS, [_row(name, row) for name, row in rows.items()]),
            " · ".join([machine(where), *kinds, ", ".join(versions), amount]),
        ]
    )


def _command(settings: Mapping[str, Any], rules: list[str]) -> str:
    words = ["python", "-m", "research.scripts.rule_speed", *(Path(model).name for model in settings["models"])]
    words += ["--rules", ",".join(rules)] if rules != list(RULES) else []
    words += ["--tokens", str(settings["tokens"]), "--repeats", str(settings["repeats"])]
    return shlex.join([*words, "--dtype", settings["dtype"]] if settings["dtype"] != "auto" else words)


def _row(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    layered, formulas = row["layered"], row["predicted"]
    speed = layered["tokens_per_second"]
    return (
        name,
        number(layered["forwards"], ".2f"),
        number(row["no draft"]["forwards"], ".2f"),
        number(formulas["forwards"], ".2f"),
        number(layered.get("accepted"), ".0%"),
        number(formulas["accepted"], ".0%"),
        number(speed),
        number(speed / row["conventional"]["tokens_per_second"], ".2f"),
        number(speed / row["single"]["tokens_per_second"], ".2f"),
    )


def draw(reports: Mapping[str, Rows]) -> Figure:
    """Draw each rule's forwards a token, a bar for each report, and what the formula says without drafts."""
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for rows in reports.values() for name in rows))
    height = 0.8 / len(reports)
    with plt.rc_context(figures.STYLE):
        figure, axes = plt.subplots(figsize=(5.6, 0.32 * len(names) + 0.8))
        for i, ((label, by_rule), color) in enumerate(zip(reports.items(), (figures.BLUE, figures.SKY), strict=False)):
            places = [names.index(name) + i * height - 0.4 + height / 2 for name in by_rule]
            rows = list(by_rule.values())
            more = [row["layered"]["forwards"] - 1 for row in rows]
            axes.barh(places, more, height * 0.9, left=1, color=color, label=label)
            marks = [row["predicted"]["forwards"] for row in rows]
            without = "by the formula, without drafts" if i == 0 else None
            axes.plot(marks, places, "|", color=figures.RED, markersize=9, label=without)
        axes.axvline(2, color="#888888", linewidth=1, linestyle="--")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(1, None)
        axes.set_xlabel("forwards of members a token (conventional: 2)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.18), ncols=3, fontsize=8)
    return figure


def main(given: Sequence[str] | None = None) -> None:
    """Fill the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--page", type=Path, default=Path("docs/performance.md"))
    arguments = parser.parse_args(given)
    pairs = [report.partition("=") for report in arguments.reports]
    reports = {name: row_log(Path(file)).records for name, _, file in pairs}
    fill_page(arguments.page, {f"rules-{name}": rules_part(rows) for name, rows in reports.items()})
    figures.require()
    (arguments.page.parent / "performance").mkdir(exist_ok=True)
    figures.save(draw(reports), arguments.page.parent / "performance" / "rules.png")


if __name__ == "__main__":
    main()
