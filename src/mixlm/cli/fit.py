"""`mixlm fit`: weights, or a router, from text that the members score once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from mixlm.cli.accuracy import AccuracyOptions, accuracy_option
from mixlm.cli.display import dim, print_json
from mixlm.cli.inputs import (
    EndsOption,
    check_writable,
    model_identities,
    prompts_and_answers,
    read_texts,
    refuse_generation_options,
    score_texts,
)
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared, with_shared
from mixlm.cli.segments import about_unit
from mixlm.cli.tables import print_lines, print_table
from mixlm.errors import ConfigError
from mixlm.terminal import progress_bars

if TYPE_CHECKING:
    from mixlm.config import EnsembleConfig, MemberConfig
    from mixlm.fitting.study import Study


@with_shared
def fit(
    shared: Shared,
    files: Annotated[
        list[Path],
        Argument(metavar="FILE", help="Texts, or .jsonl with a prompt and an answer a line; one file a kind of text."),
    ],
    output: Annotated[
        Path | None, Option("--output", metavar="FILE", help="Write an ensemble file with the weights.")
    ] = None,
    router: Annotated[
        Path | None, Option("--router", metavar="FILE", help="Train a router as well, and write it.")
    ] = None,
    grid: Annotated[bool, Option("--grid", help="Search a grid of weights as well, to compare.")] = False,
    step: Annotated[
        float | None,
        Option("--step", metavar="S", help="Step of the grid, which it asks for. Default: 0.1.", show_default=False),
    ] = None,
    holdout: Annotated[
        float, Option("--holdout", metavar="X", help="Share of each text for the check; 0 keeps all for the fit.")
    ] = 0.5,
    bootstrap: Annotated[
        int, Option("--bootstrap", metavar="N", help="Refits for the weights' intervals; 0 for none.")
    ] = 200,
    prompt_bytes: Annotated[
        int,
        Option(
            "--prompt-bytes",
            metavar="N",
            help="Take the first N bytes of each passage of a text as its prompt, to compare weights by prompt too.",
            show_default=False,
        ),
    ] = 0,
    ends: EndsOption = None,
    accuracy: Annotated[
        str | None,
        accuracy_option(
            "--accuracy", "TASK", "Measure accuracy on a task with these weights too; with --grid, at every point."
        ),
    ] = None,
    limit: Annotated[int | None, accuracy_option("--limit", "N", "Only the first N questions of the task.")] = None,
    seeds: Annotated[
        int | None, accuracy_option("--seeds", "N", "Runs of each way, where texts are written. Default: 1.")
    ] = None,
    data: Annotated[
        Path | None, accuracy_option("--data", "DIR", "A folder with gsm8k.jsonl and the like, in place of the hub.")
    ] = None,
    out: Annotated[
        Path | None,
        accuracy_option("--out", "DIR", "Keep answers here; a run that stopped goes on. Default: fit-results/TASK."),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print the report as one JSON object.")] = False,
    no_cache: Annotated[bool, Option("--no-cache", help="Read the texts anew, and keep no scores.")] = False,
) -> int:
    """Fit the weights, or a router, to text.

    The fit maximises the likelihood of the mixture. Every member scores each text once; EM fits the weights to the
    first part of each text, and the rest validates them. With --accuracy, the weights are also evaluated on a task,
    and the generation options apply to it.
    """
    asked = AccuracyOptions(accuracy, limit, seeds, data, out)
    asked.check()
    refuse_generation_options(shared, "fit", allowed=("method", "system", *(shared.options() if accuracy else ())))
    config = shared.config()
    if grid and step is None:
        step = 0.1
    _check(config, holdout, bootstrap, step)
    if prompt_bytes < 0:
        raise ConfigError(f"--prompt-bytes is {prompt_bytes}; it must be 0 or more", "0 takes no prompts")
    check_writable("--output", output)
    check_writable("--router", router)
    texts = read_texts(files)
    pairs = prompts_and_answers(texts, ends=ends, system=shared.system if accuracy is None else None)
    task = asked.load(shared)
    ensemble = open_ensemble(shared, {})
    from mixlm.fitting.study import Plan, study

    scores = score_texts(
        ensemble, texts, pairs, model_identities(config, not no_cache), ends=ends, system=shared.system
    )
    given = None if shared.numbers() is None and config.weights() is None else ensemble.weights
    plan = Plan(holdout, bootstrap, step, router is not None, given, prompt_bytes)
    with progress_bars() as progress:
        found = study(scores, plan, progress=progress)
    # Weights are kept before questions are asked: that may take long, and can be taken up again.
    written = _write(found, config, shared, output, router)
    engines = len({id(one.engine) for one in ensemble.members})
    report = None
    if task is not None:
        report = asked.measure(task, ensemble, found, shared, step=step, holdout=holdout)
    if as_json:
        print_json({**found.as_dict(engines), **({} if report is None else {"accuracy": report.as_dict()})})
    else:
        _show(found, engines)
        if report is not None:
            report.show()
    for line in written:
        dim(line)
    return 0


def _check(config: EnsembleConfig, holdout: float, bootstrap: int, step: float | None) -> None:
    if len(config.members) < 2:
        raise ConfigError("one member has weight 1, and nothing is to fit", "name two members or more with -m")
    if not 0 <= holdout < 1:
        raise ConfigError(f"--holdout is {holdout:g}; it must be 0 or more, and less than 1", "such as: --holdout 0.5")
    if bootstrap < 0:
        raise ConfigError(f"--bootstrap is {bootstrap}; it must be 0 or more", "0 leaves the intervals out")
    if step is not None:
        from mixlm.fitting.em import grid_points

        grid_points(len(config.members), step)


def _write(found: Study, config: EnsembleConfig, shared: Shared, output: Path | None, router: Path | None) -> list[str]:
    """Write what was fitted. Returns a line about each file."""
    lines = []
    if router is not None and found.router is not None:
        found.router.save(router)
        lines.append(f"router written to {router}")
    if output is not None:
        from mixlm.config import RouterConfig, write_config

        weights = [round(float(one), 6) for one in found.em.weights]
        members = tuple(_as_written(one, weight) for one, weight in zip(config.members, weights, strict=True))
        routed = RouterConfig()
        if router is not None:
            # An ensemble file names files from its own folder.
            routed = RouterConfig(kind="learned", file=os.path.relpath(router.resolve(), output.resolve().parent))
        changes = {"members": members, "router": routed}
        if shared.system is not None:
            changes["system"] = shared.system or None
        write_config(config.model_copy(update=changes), output)
        lines.append(f"ensemble written to {output}: use it with -e {output}")
    return lines


def _as_written(member: MemberConfig, weight: float) -> MemberConfig:
    """Return a member with its weight, named so that it is found from any folder."""
    path = Path(member.model).expanduser()
    local = (path / "config.json").is_file() or path.is_file()
    # The text of a template file has been read, and stands for it.
    return member.model_copy(
        update={"weight": weight, "model": str(path.absolute()) if local else member.model, "template_file": None}
    )


def _show(found: Study, engines: int) -> None:
    train = list(found.train.values())
    rows = []
    for i, name in enumerate(found.names):
        interval = "" if found.intervals is None else "{:.3f} to {:.3f}".format(*found.intervals[i])
        rows.append((name, f"{found.em.weights[i]:.3f}", interval))
    heads = ["member", "weight", "95 % interval"][: 2 if found.intervals is None else 3]
    print_table(heads, [one[: len(heads)] for one in rows], right=set(heads[1:]))
    trace = found.em.trace
    ended = "" if found.em.converged else "; not converged, the members may be too much alike"
    about = about_unit(train[0].unit, sum(len(one.ends) for one in train), sum(one.size for one in train))
    print_lines(
        f"Fitted by EM in {len(trace)} rounds, {found.em.seconds:.3f} s: {trace[0]:.4f} to {trace[-1]:.4f} bits per "
        f"byte{ended}. {about}"
    )
    _show_check(found)
    _show_costs(found, engines)


def _show_check(found: Study) -> None:
    several = len(found.check) > 1
    files = [Path(name).name for name in found.check] if several else []
    heads = ("", *(f"{one} " for one in files), "all texts" if several else "bits per byte", "below best member")
    rows = []
    for one in found.rows:
        each = [f"{value:.4f}" for value in one.files] if several else []
        rows.append((one.name, *each, f"{one.all:.4f}", f"{found.below(one):+.2f} %"))
    best = min(range(len(found.rows)), key=lambda at: found.rows[at].all)
    styles = ["bold" if at == best else "" for at in range(len(rows))]
    print_table(heads, rows, right=frozenset(heads[1:]), styles=styles)
    size = sum(one.size for one in found.check.values())
    where = f"the {size} bytes of the fit itself"
    if found.held_out:
        where = f"{size} bytes that were held out; all weights, written ones too, are those fitted on the other part"
    print_lines(f"Bits per byte on {where}. The best single member is {found.best_member.name}.")
    rows_by_name = {one.name: one.all for one in found.rows}
    if found.router is not None and found.held_out and rows_by_name["router"] > rows_by_name["EM"]:
        print_lines("The router does worse than fixed weights here: more text, or text of more kinds, may train it.")


def _show_costs(found: Study, engines: int) -> None:
    if found.grid is None:
        return
    points = len(found.grid.trace)
    once, anew = found.readings(engines)
    weights = ", ".join(f"{one:g}" for one in found.grid.weights)
    print_lines(
        f"The grid's best weights are {weights}: {min(found.grid.trace):.4f} bits per byte on the training part, where "
        f"EM has {found.em.trace[-1]:.4f}. On known scores its {points} points took {found.grid.seconds:.3f} s, EM "
        f"{found.em.seconds:.3f} s. Either needs {once} readings of a passage by a model; a search that evaluates "
        f"every point anew needs {anew}."
    )
