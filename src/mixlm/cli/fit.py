"""`mixlm fit`: fit the weights, or a router, to text that every member scores once."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from typer import Argument

from mixlm.cli.accuracy import load_task, measure
from mixlm.cli.display import dim, engines_by_member, print_json, print_lines, print_table
from mixlm.cli.fit_rule import defers, fit_gate, fit_strength, fits_rule, relative_path, split_text, write_ensemble
from mixlm.cli.inputs import (
    EndsOption,
    check_writable,
    model_identities,
    prompts_and_answers,
    read_texts,
    score_texts,
)
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import (
    NOT_FOR_SCORING,
    SCORED_AS_THEY_ARE,
    Shared,
    check_counts,
    flag,
    refuse_options,
    with_shared,
)
from mixlm.cli.segments import about_unit
from mixlm.errors import ConfigError, UsageError
from mixlm.option_spec import OptionSpec
from mixlm.terminal import progress_bars

if TYPE_CHECKING:
    from mixlm.config import EnsembleConfig
    from mixlm.fitting.gate_trainer import GateKind
    from mixlm.fitting.study import FitStudy

accuracy_flag = functools.partial(flag, panel="Accuracy")


@with_shared()
def fit(
    shared: Shared,
    files: Annotated[
        list[Path],
        Argument(
            metavar="FILE", help="Texts, or .jsonl with one prompt and answer per line; one file per kind of text."
        ),
    ],
    output: Annotated[Path | None, flag("--output FILE", "Write an ensemble file with the fitted weights.")] = None,
    router: Annotated[Path | None, flag("--router FILE", "Also train a router, and write it.")] = None,
    features: Annotated[
        str | None,
        flag(
            "--features LIST",
            "What the router looks at: text (character classes), top_k (likely tokens of the observed member),"
            " hidden (its hidden state), or several of them, or all. Default: text.",
        ),
    ] = None,
    gate: Annotated[str | None, flag("--gate KIND", "The router's gate: linear or mlp. Default: linear.")] = None,
    observe: Annotated[
        str | None,
        flag(
            "--observe NAME", "The member that the router observes; it runs at every position. Default: the smallest."
        ),
    ] = None,
    price: Annotated[
        float | None,
        flag(
            "--price NATS",
            "With --rule defer and --router: what a forward of the second member costs, in nats of likelihood."
            " Default: 0.",
        ),
    ] = None,
    grid: Annotated[bool, flag("--grid", "Also search a grid of weights, for comparison.")] = False,
    step: Annotated[float | None, flag("--step S", "The step of the grid; implies --grid. Default: 0.1.")] = None,
    holdout: Annotated[
        float, flag("--holdout X", "The fraction of each text held out for validation; 0 holds out nothing.")
    ] = 0.5,
    bootstrap: Annotated[
        int, flag("--bootstrap N", "The number of bootstrap refits for confidence intervals; 0 for none.")
    ] = 200,
    prompt_bytes: Annotated[
        int,
        flag(
            "--prompt-bytes N",
            "Treat the first N bytes of each passage as its prompt, to compare weights by prompt too.",
            shown=False,
        ),
    ] = 0,
    ends: EndsOption = None,
    accuracy: Annotated[
        str | None,
        accuracy_flag(
            "--accuracy TASK", "Also measure accuracy on a task with the weights; with --grid, at every point."
        ),
    ] = None,
    limit: Annotated[int | None, accuracy_flag("--limit N", "Use only the first N questions of the task.")] = None,
    seeds: Annotated[
        int | None,
        accuracy_flag("--seeds N", "The number of runs of each weighting, if the task generates. Default: 1."),
    ] = None,
    data: Annotated[
        Path | None,
        accuracy_flag("--data DIR", "A folder with gsm8k.jsonl and similar files, instead of the Hugging Face hub."),
    ] = None,
    out: Annotated[
        Path | None,
        accuracy_flag(
            "--out DIR", "Save answers in this folder; an interrupted run resumes. Default: fit-results/TASK."
        ),
    ] = None,
    force: Annotated[bool, flag("--force", "Overwrite the files of --output and --router.")] = False,
    as_json: Annotated[bool, flag("--json", "Print the report as one JSON object.")] = False,
    no_cache: Annotated[bool, flag("--no-cache", "Score the texts again, without the cache of scores.")] = False,
) -> int:
    """Fit the weights, or a router, to text.

    The fit maximises the likelihood of the mixture. Every member scores each text once; EM fits the weights to the
    first part of each text, and the rest validates them. With --rule, the rule's strength is fitted, and the weights of
    geometric and power unless they are given; with --rule defer and --router, a gate that decides which tokens of the
    first member are kept. With --accuracy, the weights are also evaluated on a task,
    and the generation options apply to it.
    """
    groups, kind = _checked_features(router, features, gate, observe, price), cast("GateKind", gate or "linear")
    is_plain = groups == ("text",) and kind == "linear"  # the gate whose file holds its numbers
    of_task = {"--limit": limit, "--seeds": seeds, "--data": data, "--out": out}
    if accuracy is None and (given := _first_given(of_task)):
        raise UsageError(f"{given} is given without --accuracy", "name a task: --accuracy TASK")
    check_counts(limit=limit, seeds=seeds)
    if accuracy is None:
        unused_options = [name for name in NOT_FOR_SCORING if name != "method" or output is None]
        refuse_options(shared, "fit", unused_options, SCORED_AS_THEY_ARE)
    config = shared.config()
    if grid and step is None:
        step = 0.1
    _check(config, holdout, bootstrap, step, prompt_bytes)
    _check_written(files, output, router, numbers=defers(config) or not is_plain, force=force)
    texts = read_texts(files)
    if fits_rule(config):
        unused = {"--router": None if defers(config) else router, "--grid": step, "--features": features}
        unused |= {"--observe": observe, "--accuracy": accuracy, "--prompt-bytes": prompt_bytes or None, "--ends": ends}
        _check_rule_fit(shared, texts, unused)
        parts = {name: split_text(text, holdout) for name, text in texts.items()}
        if router is not None:
            return fit_gate(
                shared, config, parts, router, kind, price or 0.0, cache=not no_cache, output=output, as_json=as_json
            )
        return fit_strength(shared, config, parts, output=output, as_json=as_json)
    if price is not None:
        raise UsageError("--price is of a gate of rule defer", "add --rule defer and --router FILE")
    pairs = prompts_and_answers(texts, ends=ends, system=shared.system if accuracy is None else None)
    task = None if accuracy is None else load_task(shared, accuracy, limit, seeds, data, out)
    ensemble = open_ensemble(shared, {} if task is None else task.options or {})
    from mixlm.fitting.gates import choose_inputs, untrained
    from mixlm.fitting.study import FitPlan, study

    inputs = None if is_plain else choose_inputs(ensemble, groups, observe)
    observing = ensemble.with_weights(ensemble.weights.tolist())  # without a router, whose observations would be scored
    if inputs is not None and inputs.observed is not None:
        observing = ensemble.with_router(untrained(ensemble.names, inputs))
    models = model_identities(config, not no_cache)
    scores = score_texts(observing, texts, pairs, models, ends=ends, system=shared.system)
    weights = None if shared.numbers() is None and config.weights() is None else ensemble.weights
    plan = FitPlan(
        holdout,
        bootstrap,
        step,
        router=router is not None,
        inputs=inputs,
        gate=kind,
        given=weights,
        prompt=prompt_bytes,
    )
    with progress_bars() as progress:
        result = study(scores, plan, progress=progress)
    # Weights are written before the evaluation, which may take long and can be resumed.
    notes = _write(result, config, shared, output, router)
    engines = len({id(member.engine) for member in ensemble.members})
    report = None if task is None else measure(task, ensemble, result, engines, step=step, holdout=holdout)
    if as_json:
        form = {**result.as_dict(engines), "pays": _pays(result), "engines": engines_by_member(ensemble)}
        print_json(form if report is None else {**form, "accuracy": report.as_dict()})
    else:
        _show(result, engines)
        if report is not None:
            report.show()
    for note in notes:
        dim(note)
    return 0


def _check_rule_fit(shared: Shared, texts: Mapping[str, str], unused: Mapping[str, object]) -> None:
    """Raise UsageError for options, and for texts, that the fit of a rule does not use."""
    if given := _first_given(unused):
        raise UsageError(f"{given} is of weights and routers, and --rule fits the strength of a rule", "omit it")
    if pairs := prompts_and_answers(texts, ends=None, system=shared.system):
        raise UsageError(f"{next(iter(pairs))} has prompts and answers, and --rule is fitted to texts", "give a text")


def _first_given(options: Mapping[str, object]) -> str | None:
    return next((name for name, value in options.items() if value is not None), None)


def _checked_features(
    router: Path | None, features: str | None, gate: str | None, observe: str | None, price: float | None
) -> tuple[str, ...]:
    """Return the groups of features that the router looks at.

    Raises:
        UsageError: Options without a router to write, or without what they apply to.
        ConfigError: A value that is none.
    """
    from mixlm.routing.gate_router import GROUPS

    options = {"--features": features, "--gate": gate, "--observe": observe, "--price": price}
    if router is None and (given := _first_given(options)):
        raise UsageError(f"{given} is of a router, and none is trained", "add --router FILE")
    if router is not None and router.suffix == ".safetensors":
        raise ConfigError("--router is a .safetensors file, and is described in JSON", "such as --router gate.json")
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"--price is {price:g}; it must be a number, 0 or more")
    if gate is not None:
        OptionSpec(choices=("linear", "mlp")).check("--gate", gate)
    groups = tuple(part.strip() for part in (features or "text").split(","))
    for group in groups:
        OptionSpec(choices=(*GROUPS, "all")).check("--features", group)
    if groups == ("text",) and observe is not None:
        raise UsageError("--observe names a member, and the features are of the text", "add --features top_k")
    return GROUPS if groups == ("all",) else groups


def _check_written(files: list[Path], output: Path | None, router: Path | None, *, numbers: bool, force: bool) -> None:
    """Check the files that are written, before long work starts. numbers: whether the router's are in one of their own.

    Raises:
        ConfigError: One cannot be written.
        UsageError: One is written twice, or is a text to fit to.
    """
    written = {option: path for option, path in (("--output", output), ("--router", router)) if path is not None}
    if router is not None and numbers:
        from mixlm.routing.gate import numbers_file

        written["--router's numbers"] = numbers_file(router)
    if force and not written:
        raise UsageError("--force is given, and no file is written", "omit it, or add --output FILE")
    texts = {file.resolve() for file in files}
    for option, path in written.items():
        if path.resolve() in texts:
            raise UsageError(f"{option} {path} is a text to fit to", "name another file")
        check_writable(option, path, force=force)
    if len({path.resolve() for path in written.values()}) < len(written):
        raise UsageError(f"--output and --router both write {output}", "name a file for each")


def _check(config: EnsembleConfig, holdout: float, bootstrap: int, step: float | None, prompt_bytes: int) -> None:
    from mixlm.loading import check_full_distributions

    check_full_distributions(config, "mixlm fit")
    if len(config.members) < 2:
        raise ConfigError(
            "a single member has weight 1, so there is nothing to fit", "name two or more members with -m"
        )
    if not 0 <= holdout < 1:
        raise ConfigError(f"--holdout is {holdout:g}; it must be 0 or more, and less than 1", "such as: --holdout 0.5")
    if bootstrap < 0:
        raise ConfigError(f"--bootstrap is {bootstrap}; it must be 0 or more", "0 means no intervals")
    if prompt_bytes < 0:
        raise ConfigError(f"--prompt-bytes is {prompt_bytes}; it must be 0 or more", "0 means no prompts")
    if step is not None:
        from mixlm.fitting.likelihood import grid_points

        grid_points(len(config.members), step)


def _write(
    result: FitStudy, config: EnsembleConfig, shared: Shared, output: Path | None, router: Path | None
) -> list[str]:
    """Write the fitted weights and router. Returns a line about each file."""
    from mixlm.routing import LearnedRouter

    lines = []
    if router is not None and result.router is not None:
        result.router.save(router)
        lines.append(f"router written to {router}")
        if not isinstance(result.router, LearnedRouter):
            inputs = result.router.inputs
            lines[-1] += f", its numbers to {router.with_suffix('.safetensors').name}; it needs {inputs.needs}"
    if output is not None:
        from mixlm.config import RouterConfig

        routed = RouterConfig()
        if router is not None:
            routed = RouterConfig(kind="learned", file=relative_path(router, output))
        changes = {} if shared.system is None else {"system": shared.system or None}
        weights = [round(float(weight), 6) for weight in result.em.weights]
        lines.append(write_ensemble(config, output, weights, router=routed, **changes))
    return lines


def _show(result: FitStudy, engines: int) -> None:
    train = list(result.train.values())
    rows = []
    for i, name in enumerate(result.names):
        interval = "" if result.intervals is None else "{:.3f} to {:.3f}".format(*result.intervals[i])
        rows.append((name, f"{result.em.weights[i]:.3f}", interval))
    heads = ["member", "weight", "95 % interval"][: 2 if result.intervals is None else 3]
    print_table(heads, [row[: len(heads)] for row in rows], right=set(heads[1:]))
    trace = result.em.trace
    ended = "" if result.em.converged else "; not converged, perhaps because the members are too similar"
    about = about_unit(train[0].unit, sum(len(scores.ends) for scores in train), sum(scores.size for scores in train))
    print_lines(
        f"Fitted by EM in {len(trace)} rounds, {result.em.seconds:.3f} s: {trace[0]:.4f} to {trace[-1]:.4f} bits per "
        f"byte{ended}. {about}"
    )
    _show_check(result)
    _show_costs(result, engines)


def _show_check(result: FitStudy) -> None:
    several = len(result.check) > 1
    files = [Path(name).name for name in result.check] if several else []
    heads = ("", *(f"{name} " for name in files), "all texts" if several else "bits per byte", "below best member")
    rows = []
    for row in result.rows:
        by_file = [f"{value:.4f}" for value in row.by_file] if several else []
        rows.append((row.name, *by_file, f"{row.overall:.4f}", f"{result.percent_below(row):+.2f} %"))
    best = min(range(len(result.rows)), key=lambda i: result.rows[i].overall)
    styles = ["bold" if i == best else "" for i in range(len(rows))]
    print_table(heads, rows, right=frozenset(heads[1:]), styles=styles)
    size = sum(scores.size for scores in result.check.values())
    where = f"the {size} bytes of the training text"
    if result.held_out:
        where = f"{size} held-out bytes; all weights, including those in files, are fitted to the other part"
    print_lines(f"Bits per byte on {where}. The best single member is {result.best_member.name}.")
    rows_by_name = {row.name: row.overall for row in result.rows}
    best_name = result.best_member.name
    if _pays(result):
        print_lines("The fitted mixture is better than every member here.")
    elif result.held_out:
        print_lines(
            f"The fitted mixture is not better than {best_name} alone on text that it was not fitted to: use "
            f"{best_name} alone, try other members, or fit to more text of the kind that you need."
        )
    else:
        print_lines(
            f"The fitted mixture is not better than {best_name} alone: use {best_name} alone, or other members."
        )
    if not result.held_out:
        print_lines("Nothing was held out, so this shows the fit, not what it is worth on other text: see --holdout.")
    if result.router is not None and result.held_out and rows_by_name["router"] > rows_by_name["EM"]:
        print_lines("The router is worse than fixed weights here; more text, or more kinds of text, may help.")


def _pays(result: FitStudy) -> bool:
    """Whether the weights by EM are better than the best member, on the held-out text if there is some."""
    em = next(row for row in result.rows if row.name == "EM")
    return em.overall < result.best_member.overall


def _show_costs(result: FitStudy, engines: int) -> None:
    if result.grid is None:
        return
    points = len(result.grid.trace)
    passes, grid_passes = result.passes(engines)
    weights = ", ".join(f"{weight:g}" for weight in result.grid.weights)
    print_lines(
        f"The grid's best weights are {weights}: {min(result.grid.trace):.4f} bits per byte on the training part; "
        f"EM reaches {result.em.trace[-1]:.4f}. Given the scores, its {points} points took {result.grid.seconds:.3f} "
        f"s, EM {result.em.seconds:.3f} s. Both need {passes} passes of a model over a passage; a search that "
        f"evaluates every point with the models needs {grid_passes}."
    )
