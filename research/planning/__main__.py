"""`python -m research.planning`: how fast, how soon, on how many machines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option, Typer

from mixlm.cli.display import console, dim, print_json, print_table
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared, with_shared
from mixlm.cli.run import run_app
from mixlm.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from research.planning.costs import PlanCosts
    from research.planning.plan import PlanPoint


@with_shared()
def plan(
    *,
    shared: Shared,
    file: Annotated[Path, Argument(help="The file of costs (TOML).", show_default=False)],
    measure: Annotated[
        bool, Option("--measure", help="Measure the members' costs and write them to the file; then plan.")
    ] = False,
    rate: Annotated[
        str | None,
        Option("--rate", metavar="R[,R]", help="Completions requested per second. Default: --at-once at any time."),
    ] = None,
    at_once: Annotated[int, Option("--at-once", metavar="N", help="Completions generated together at most.")] = 16,
    prompt: Annotated[int, Option("--prompt", metavar="N", help="Tokens of a prompt.")] = 100,
    length: Annotated[float, Option("--reply", metavar="N", help="Tokens of a completion, on average.")] = 200,
    fixed: Annotated[
        bool,
        Option("--fixed", help="All completions have that length; without it, lengths have a geometric distribution."),
    ] = False,
    coin: Annotated[
        float, Option("--coin", metavar="N", help="Tokens that a coin decides on average: 1, or those of a word.")
    ] = 1.0,
    replicas: Annotated[
        list[str] | None, Option("--replicas", metavar="NAME=N", help="Machines of a member. Can be repeated.")
    ] = None,
    need: Annotated[bool, Option("--need", help="Find how many machines each member needs.")] = False,
    first: Annotated[
        float | None, Option("--first", metavar="S", help="With --need: 95 in 100 first tokens within S seconds.")
    ] = None,
    busy: Annotated[
        float, Option("--busy", metavar="SHARE", help="With --need: the share of time that a machine may work.")
    ] = 0.85,
    count: Annotated[int, Option("--replies", metavar="N", help="How many completions are simulated.")] = 1000,
    plot: Annotated[Path | None, Option("--plot", metavar="FILE", help="Draw the rates: .png or .svg.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Predict tokens/s, the time to the first token, and the machines that each member needs.

    Completions, mixlm and the members' machines are simulated as queues. The file has the costs of runs, in seconds.

        \\[router]               # mixlm itself
        seconds = 0.002        # of one processor, for each request
                               # also: delay = 0.0, processes = 1
        \\[members.NAME]
        weight = 0.6
        forward = 0.010        # one sequence, one token
        sequence = 0.002       # each further sequence in a forward
        token = 0.003          # each further token: of a prompt or of other members
                               # also: slots = 256, replicas = 1,
                               # runs = false, device = "shared"

    With --measure, it is made from the members given by -m or -e, such as servers that run.
    """
    from research.planning.costs import read_costs, write_costs
    from research.planning.plan import PlanTarget, needed, sweep
    from research.planning.simulation import Workload

    rates = _rates(rate)
    _check({"--at-once": at_once, "--prompt": prompt, "--reply": length, "--replies": count, "--coin": coin})
    if plot is not None:
        from research.figures import require
        from research.planning.chart import save

        require(plot)
        if need or len(rates) < 2:
            raise UsageError("--plot draws several rates", "give them: --rate 0.5,1,2")
    if measure:
        from research.planning.measure import measure as measured

        options = shared.options()
        ensemble = open_ensemble(shared, {**options, "top_k": options.get("top_k", 10)})
        costs = measured(ensemble, max_batch=min(at_once, 32), progress=dim)
        write_costs(costs, file)
    elif shared.model or shared.ensemble is not None:
        raise UsageError("members are given, and the costs come from the file", "measure them: --measure")
    else:
        costs = read_costs(file)
    costs = costs.with_replicas(_replicas(replicas or []))
    load = Workload(rates[0], prompt, length, at_once, "fixed" if fixed else "geometric", coin)
    if need:
        points = [needed(costs, load, PlanTarget(first, busy), count=count)]
    else:
        points = sweep(costs, load, rates, count=count)
    if plot is not None:
        save(points, plot)
    if as_json:
        print_json({"costs": costs.model_dump(), "points": [point.as_dict() for point in points]})
    else:
        _show(costs, points)
    return 0


def _show(costs: PlanCosts, points: list[PlanPoint]) -> None:
    heads = [
        "requests/s",
        "tokens/s",
        "completions/s",
        "first token s",
        "95 % within",
        "completion s",
        "95 % within",
        "busy",
    ]
    rows = []
    for point in points:
        form = point.as_dict()
        shares = [f"{name} × {point.replicas[name]}: {share:.0%}" for name, share in form["busy"].items()]
        shares.append(f"mixlm × {point.processes}: {point.seen.router:.0%}")
        times = [form[what][share] for what in ("first_token", "whole_reply") for share in ("p50", "p95")]
        rows.append(
            [
                "always full" if point.rate is None else f"{point.rate:g}",
                f"{form['tokens_per_second']:.1f}",
                f"{form['replies_per_second']:.3g}",
                *(f"{time:.3g}" for time in times),
                ", ".join(shares) + ("" if point.keeps_up else "; cannot keep up"),
            ]
        )
    print_table(heads, rows, right=heads[:-1])
    if not all(point.keeps_up for point in points):
        console().print("Where it cannot keep up, the times grow with the completions simulated. See --need.")


def _rates(text: str | None) -> list[float | None]:
    if text is None:
        return [None]
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--rate is {text!r}; it must be numbers with commas between them") from None
    if not all(0 < rate < float("inf") for rate in rates):
        raise ConfigError(f"--rate is {text!r}; rates must be more than 0")
    return list(rates)


def _replicas(texts: list[str]) -> dict[str, int]:
    replicas = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        if not name or not number.isdigit():
            raise ConfigError(f"--replicas is {text!r}; it must be a member's name and a number", "such as: smollm2=3")
        replicas[name] = int(number)
    return replicas


def _check(values: dict[str, float]) -> None:
    for name, value in values.items():
        if not 1 <= value < float("inf"):
            raise ConfigError(f"{name} is {value:g}; it must be 1 or more")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    app = Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(plan)
    return run_app(app, "python -m research.planning", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
