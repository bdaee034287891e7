"""Put what `router_study` found into a page of the docs, and draw quality against cost beside it.

    python -m research.scripts.router_page NAME=DIR … [--page docs/weights.md]

DIR is what `router_study --out DIR` wrote. A part of the page begins with `<!-- results: NAME-texts -->` or
`<!-- results: NAME-answers -->` and ends with `<!-- end of results -->`; what stands between is replaced where there
are rows for it, and left alone where there are none. The figure of NAME-texts is `routers/NAME.png` beside the page.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixlm.types import Floats
from research import figures
from research.benchmark.page import fill_page, table
from research.scripts.router_study import CURVE, interval, right_answers, row_log, shares

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
_ROUNDS = 2000  # of the bootstrap
_LEAST_FORWARDS = 0.02  # of the last member, below which a row is not compared
FAMILIES = {
    "members": (lambda name: False, figures.PINK, "o"),
    "fixed weights": (lambda name: name in ("equal", "EM", "EM of each text"), figures.GREEN, "s"),
    "text": (lambda name: name[:2] in ("a:", "f:") and "history" not in name, figures.ORANGE, "^"),
    "observed member": (lambda name: name[:2] in ("b:", "c:", "d:") or name.startswith("k: router"), figures.BLUE, "o"),
    "past of every member": (lambda name: "history" in name or "posterior" in name, figures.SKY, "D"),
    "everything": (lambda name: "everything" in name, figures.RED, "v"),
    "defer, gate": (lambda name: name.startswith("k: defer, gate"), figures.RED, "v"),
    "defer, threshold": (lambda name: name.startswith("k: defer, top"), figures.ORANGE, "^"),
}


def texts_part(name: str, rows: Sequence[Row]) -> str:
    """Return the table of bits per byte, what the best router closes, what gates cost, and the learning curve."""
    about, by_name = rows[0]["about"], {row["name"]: row for row in rows}
    members = about["members"]
    large, em, oracle = int(np.argmax(about["sizes"])), by_name["EM"]["bits"], by_name["oracle"]["bits"]
    cost = by_name.get("cost")
    body, closed = [], {}
    for row in rows:
        if "bits" not in row or "interval" not in row or " of the text" in row["name"]:
            continue
        closed[row["name"]] = (em - row["bits"]) / (em - oracle)
        speed = ""
        if cost is not None and row["name"] != "oracle":
            seconds = float(np.dot(row["forwards"], cost["seconds"])) + cost["gates"].get(row["name"], 0.0)
            speed = f"{1 / seconds:.1f}"
        body.append(
            (
                row["name"],
                *(f"{row['texts'][text]:.3f}" for text in row["texts"]),
                f"{row['bits']:.4f} ({row['interval'][0]:.4f} to {row['interval'][1]:.4f})",
                f"{row['minus_em'][0]:+.4f} to {row['minus_em'][1]:+.4f}",
                f"{closed[row['name']]:+.1%}",
                f"{sum(row['forwards']):.2f}",
                f"{row['forwards'][large]:.2f}",
                speed,
            )
        )
    heads = ("", *about["check"], "all, bits per byte", "minus EM, 95 %", "of EM to oracle", "forwards a token")
    heads = (*heads, f"of {members[large]}", "tokens/s by forwards")
    parts = [_about(about), table(heads, body)]
    # Rows i know every member's forwards at every position, and deferral is no router.
    routers = {name: value for name, value in closed.items() if name[1:2] == ":" and name[0] != "i"}
    routers = {name: value for name, value in routers.items() if not name.startswith("k: defer")}
    if routers:
        best = max(routers, key=lambda key: routers[key])
        parts.append(
            f"The best router, {best}, closes {routers[best]:.1%} of the distance from EM's weights to the best member "
            "of each segment, which no router reaches."
        )
    if cost is not None:
        spent = shares(cost, [row for row in rows if "forwards" in row])
        worst, times = max(spent, key=lambda key: spent[key]), [seconds * 1e6 for seconds in cost["gates"].values()]
        parts.append(
            f"A gate takes {min(times):.0f} to {max(times):.0f} µs a token; that is at most {spent[worst]:.2%} of a "
            f"token's time ({worst})."
        )
    if (equal := at_equal_forwards(rows)) is not None:
        parts.append(equal)
    if (curve := learning_curve(rows)) is not None:
        parts.append(curve)
    parts.append(f"![Bits per byte against forwards of {members[large]} a token](routers/{name}.png)")
    return "\n\n".join(parts)


def _about(about: Mapping[str, Any]) -> str:
    trained = ", ".join(f"{name} {size / 1000:.0f} kB" for name, (size, _) in about["train"].items())
    held = ", ".join(f"{name} {size / 1000:.0f} kB in {count}" for name, (size, count) in about["check"].items())
    return (
        f"Members: {', '.join(about['members'])}; {about['observe']} is observed. Trained on {trained}; held "
        f"out: {held} passages. Intervals: 95 %, bootstrap over passages."
    )


def at_equal_forwards(rows: Sequence[Row]) -> str | None:
    """Return a table of routers, gates and thresholds at the forwards of each gate of defer; None without any."""
    kinds = ("k: router", "k: defer, gate", "k: defer, top")
    curves = {
        kind: sorted((row["forwards"][-1], row["bits"]) for row in rows if row["name"].startswith(kind))
        for kind in kinds
    }
    if not all(len(curve) > 1 for curve in curves.values()):
        return None
    body = []
    for spent, bits in curves["k: defer, gate"]:
        if spent < _LEAST_FORWARDS:
            continue
        others = []
        for kind in ("k: router", "k: defer, top"):
            places, values = zip(*curves[kind], strict=True)
            inside = places[0] <= spent <= places[-1]
            others.append(f"{np.interp(spent, places, values):.4f}" if inside else "")
        body.append((f"{spent:.2f}", f"{bits:.4f}", *others))
    last = rows[0]["about"]["members"][-1]
    heads = (f"forwards of {last} a token", "defer, gate", "router, between its prices", "defer, between thresholds")
    return f"At equal forwards, bits per byte:\n\n{table(heads, body)}"


def learning_curve(rows: Sequence[Row]) -> str | None:
    """Return a table of bits per byte by how much of the text trained; None where that was not measured."""
    bits = {row["name"]: row["bits"] for row in rows if "bits" in row}
    shares_of = [share for share in (8, 4, 2) if f"{CURVE[0]}, 1/{share} of the text" in bits]
    if not shares_of:
        return None
    body = [
        (
            name,
            *(f"{bits.get(f'{name}, 1/{share} of the text', float('nan')):.4f}" for share in shares_of),
            f"{bits[name]:.4f}",
        )
        for name in CURVE
        if name in bits
    ]
    return table(("bits per byte, trained on", *(f"1/{share} of the text" for share in shares_of), "all"), body)


def answers_part(tasks: Mapping[str, Sequence[Row]]) -> str:
    """Return the table of right answers: a row a way to weigh, a column a task, and one for all of them."""
    about = next(iter(tasks.values()))[0]["about"]
    members, large = about["members"], int(np.argmax(about["sizes"]))
    right = {task: {row["name"]: right_answers(row) for row in rows} for task, rows in tasks.items()}
    names = [name for name in next(iter(right.values())) if all(name in rows for rows in right.values())]
    right["all"] = {name: np.concatenate([rows[name] for rows in right.values()]) for name in names}
    heads, columns = [""], []
    for task, rows in right.items():
        heads.append(f"{task} ({len(rows[names[0]])})")
        best = rows[max(members, key=lambda name: rows[name].sum())]
        columns.append({name: shown_accuracy(rows[name], best) for name in names})
    forwards = {
        name: np.mean([row["forwards"] for rows in tasks.values() for row in rows if row["name"] == name], axis=0)
        for name in names
    }
    body = [
        (name, *(column[name] for column in columns), f"{forwards[name].sum():.2f}", f"{forwards[name][large]:.2f}")
        for name in names
    ]
    heads += ["forwards a token", f"of {members[large]}"]
    file, count = about["fit"]
    return (
        f"Members: {', '.join(members)}; {about['observe']} is observed. Weights and gates are fitted to {count} other "
        f"questions ({file}).\n\n{table(heads, body)}\n\nIn parentheses: minus the best member of the column, 95 % "
        "paired interval; bold where it lies above 0."
    )


def shown_accuracy(correct: Floats, best: Floats) -> str:
    """Return a share of right answers, and the 95 % paired interval of what it is above another; bold if above 0.

    correct, best: 1.0 for each question that was answered right, else 0.0. Where they are the same, no interval.
    """
    if np.array_equal(correct, best):
        return f"{correct.mean():.1%}"
    low, high = interval(correct - best, np.ones(len(correct)), _ROUNDS)
    sure = "**" if low > 0 else ""
    return f"{sure}{correct.mean():.1%}{sure} ({low:+.1%} to {high:+.1%})"


def draw(rows: Sequence[Row]) -> Figure:
    """Draw bits per byte against the largest member's forwards a token."""
    import matplotlib.pyplot as plt

    about = rows[0]["about"]
    large = int(np.argmax(about["sizes"]))
    shown = [row for row in rows if "interval" in row and " of the text" not in row["name"]]
    with plt.rc_context(figures.STYLE):
        figure, axes = plt.subplots(figsize=(5.6, 3.4))
        for family, (belongs, colour, mark) in FAMILIES.items():
            picked = [
                row
                for row in shown
                if belongs(row["name"]) or (family == "members" and row["name"] in about["members"])
            ]
            if not picked:
                continue
            x, y = [row["forwards"][large] for row in picked], [row["bits"] for row in picked]
            axes.scatter(x, y, s=22, color=colour, marker=mark, label=family, zorder=3)
        by_name = {row["name"]: row for row in shown}
        for name, style in (("EM", ":"), ("oracle", "--")):
            axes.axhline(by_name[name]["bits"], color="#777777", linewidth=0.9, linestyle=style)
            axes.annotate(
                name, (1.0, by_name[name]["bits"]), xytext=(-2, 2), textcoords="offset points", ha="right", fontsize=7
            )
        # Weak members would squeeze what is compared.
        best = min(by_name[name]["bits"] for name in about["members"] if name in by_name)
        low, high = by_name["oracle"]["bits"], max(best, by_name["equal"]["bits"], by_name["EM"]["bits"])
        axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
        axes.set_xlabel(f"forwards of {about['members'][large]} a token")
        axes.set_ylabel("bits per byte, held out")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def main(given: Sequence[str] | None = None) -> None:
    """Fill the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--page", type=Path, default=Path("docs/weights.md"))
    arguments = parser.parse_args(given)
    parts: dict[str, str] = {}
    for study in arguments.studies:
        name, _, folder = study.partition("=")
        files = {path.stem: list(row_log(path).records.values()) for path in sorted(Path(folder).glob("*.jsonl"))}
        if (rows := files.pop("texts", None)) is not None:
            parts[f"{name}-texts"] = texts_part(name, rows)
            figures.require()
            (arguments.page.parent / "routers").mkdir(exist_ok=True)
            figures.save(draw(rows), arguments.page.parent / "routers" / f"{name}.png")
        if files:
            parts[f"{name}-answers"] = answers_part(files)
    fill_page(arguments.page, parts)


if __name__ == "__main__":
    main()
