"""`python -m research.paper`: the tables and figures of the paper, run anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, Typer

from mixlm.cli.display import dim, print_json
from mixlm.cli.run import run_app
from mixlm.errors import ConfigError, UsageError
from mixlm.terminal import progress_bars


def paper(
    name: Annotated[str, Argument(help="table2, table3, table4, figure2, figure3 or figure4.", show_default=False)],
    ensemble: Annotated[
        list[Path] | None,
        Option("-e", "--ensemble", metavar="FILE", help="An ensemble file, in place of the paper's. Can be repeated."),
    ] = None,
    tasks: Annotated[str | None, Option("--tasks", metavar="A,B", help="Tasks, in place of the paper's.")] = None,
    limit: Annotated[
        int | None, Option("--limit", metavar="N", help="Only the first N questions of a task.", show_default=False)
    ] = None,
    seeds: Annotated[
        int | None, Option("--seeds", metavar="N", help="Runs of each method. Default: 5.", show_default=False)
    ] = None,
    top_k: Annotated[
        str | None,
        Option("--top-k", metavar="K,K", help="Default: 5; tables 2 and 3 also 10.", show_default=False),
    ] = None,
    search: Annotated[
        bool,
        Option("--search", help="Tables 2 and 3: take the best weights of a grid in steps of 0.1, as the paper does."),
    ] = False,
    data: Annotated[
        Path | None,
        Option("--data", metavar="DIR", help="A folder with gsm8k.jsonl and the like, in place of the hub."),
    ] = None,
    out: Annotated[
        Path | None,
        Option("--out", metavar="DIR", help="Where results go. Default: paper-results/NAME.", show_default=False),
    ] = None,
    quick: Annotated[
        bool,
        Option("--quick", help="The demo pair (or --ensemble) and small sizes, said so in every output."),
    ] = False,
    add: Annotated[
        list[Path] | None,
        Option("--add", metavar="FILE", help="figure3: results of another machine. Can be repeated."),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print all numbers as one JSON object.")] = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> int:
    """Run a table or figure of the paper anew, and set its numbers beside the new ones.

    Without --quick: the paper's models from the Hugging Face hub and its sizes, which takes GPUs and days. What is
    finished is kept, and not run again.
    """
    from research.paper import ResultStore, joined, make, run, write
    from research.paper.findings import read

    experiment = make(name, quick=quick)
    changes: dict[str, Any] = {
        "search": search or None,
        "seeds": seeds,
        "limit": limit,
        "data": None if data is None else str(data),
    }
    if tasks is not None:
        changes["tasks"] = _tasks(tasks)
    if top_k is not None:
        changes["top_k"] = _numbers(top_k)
    if ensemble:
        changes["lineups"] = _lineups(ensemble)
    for option in ("tasks", "limit", "seeds", "data"):
        if changes.get(option) is not None and not experiment.methods:
            raise UsageError(f"--{option} is given, and {name} measures speed alone", "leave it out")
    if add and name != "figure3":
        raise UsageError(f"--add is given, and {name} is of one machine", "only figure3 puts machines side by side")
    experiment = replace(experiment, **{key: value for key, value in changes.items() if value is not None})
    for file in add or ():
        read(file)
    if name.startswith("figure"):
        from research.figures import require

        require()
    store = ResultStore(out if out is not None else Path("paper-results") / name)
    dim(f"{experiment.title}{f' ({experiment.reduced})' if experiment.reduced else ''}")
    with _Bars() as bars:
        findings = run(experiment, store, progress=bars.show, say=bars.say)
    findings = joined(findings, add or ())
    paths = write(findings, store)
    if as_json:
        print_json(findings.as_dict())
    else:
        print(paths[-1].read_text(encoding="utf-8"), end="")
    for path in paths:
        dim(f"written to {path}")
    return 0


def _lineups(files: list[Path]) -> tuple[Any, ...]:
    from mixlm.config import read_config
    from research.paper.experiments import distinct, lineup

    return tuple(distinct([lineup(read_config(path)) for path in files]))


def _tasks(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise ConfigError("--tasks names nothing", "mixlm eval --list shows mixlm's own tasks")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ConfigError(
            f"--top-k is {text!r}; it must be whole numbers with commas between them", "such as: --top-k 5,10"
        ) from None


class _Bars:
    """A bar for the run that is at work, and a line for each that begins, which takes the bar's place."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._show: Callable[[str, int, int], None] | None = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def show(self, label: str, done: int, total: int) -> None:
        if self._show is None:
            self._show = self._open.enter_context(progress_bars(single=True)) or (lambda *_: None)
        self._show(label, done, total)

    def say(self, line: str) -> None:
        self._open.close()
        self._show = None
        dim(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    app = Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(paper)
    return run_app(app, "python -m research.paper", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
