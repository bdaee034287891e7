"""`mixlm inspect`: a report on an ensemble before anything is generated."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument

from mixlm.cli.display import dim, member_colours, print_json, print_lines, print_table
from mixlm.cli.inputs import (
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
    flag,
    option_flag,
    refuse_options,
    with_shared,
)
from mixlm.cli.segments import about_unit
from mixlm.core.options import RULE_OPTIONS
from mixlm.errors import ConfigError, UsageError
from mixlm.terminal import progress_bars, styled, visible

if TYPE_CHECKING:
    from mixlm.inspection import Inspection
    from mixlm.inspection.gain import GainReport
    from mixlm.inspection.static import MemberReport, RuleReport

_QUESTION = "Why is the sky blue?"
_FEW = 100  # segments


@with_shared(
    unused=("method", "max_tokens", "stop", "draft", "block", "on_failure"), reason="it reports on every method"
)
def inspect(
    shared: Shared,
    question: Annotated[str, Argument(help="The user message whose prompts are shown.")] = _QUESTION,
    text: Annotated[
        Path | None,
        flag(
            "--text FILE",
            "Measure agreement on the first 4,000 bytes of this text; '-' reads standard input. Default: prose and"
            " code.",
        ),
    ] = None,
    gain: Annotated[
        Path | None,
        flag(
            "--gain FILE",
            "Report instead what an ensemble of these members could gain on this text, and what it would cost.",
        ),
    ] = None,
    no_measure: Annotated[bool, flag("--no-measure", "Run no model, for a quick report.")] = False,
    as_json: Annotated[bool, flag("--json", "Print the report as one JSON object.")] = False,
) -> int:
    """Report on an ensemble: members, memory, possible methods, agreement and speed.

    The report covers the members with their tokenizers, prompts and memory; the units and methods that are possible,
    and why others are not; the vocabulary that members share and the distance between their predictions on a text;
    the cost of forward passes, and the speed it predicts.
    """
    if text is not None and no_measure:
        raise UsageError("--text and --no-measure are both given", "a text is only used to measure")
    if gain is not None:
        if text is not None or no_measure:
            raise UsageError("--gain is a report of its own, by scores of a text", "omit --text and --no-measure")
        refuse_options(shared, "inspect --gain", [*NOT_FOR_SCORING, "system"], SCORED_AS_THEY_ARE)
        if rule := next((name for name in RULE_OPTIONS if name in shared.generation), None):
            raise UsageError(
                f"--gain is of the average, and does not use {option_flag(rule)}", "omit it, or see mixlm fit --rule"
            )
        return _report_gain(shared, gain, as_json=as_json)
    sample = next(iter(read_texts([text]).values())) if text is not None else None
    from mixlm.inspection import inspect as inspect_ensemble
    from mixlm.inspection.unloaded import load_described

    ensemble = open_ensemble(shared, {}, load_engine=load_described if no_measure else None)
    with progress_bars(single=True) as progress:
        report = inspect_ensemble(
            ensemble,
            question=question,
            text=sample,
            measure=not no_measure,
            options=shared.options(),
            progress=progress,
        )
    if as_json:
        print_json(report.as_dict())
        return 0
    _show_members(report)
    _show_prompts(report)
    _show_possibilities(report)
    if report.pairs:
        _show_pairs(report)
    if report.costs:
        _show_costs(report)
    if report.rule is not None:
        _show_rule(report.rule)
    if report.unmeasured is not None:
        dim(report.unmeasured)
    return 0


def _show_members(report: Inspection) -> None:
    """Show a column for each member."""
    columns = {member.name: _facts(member) for member in report.members}
    facts = dict.fromkeys(fact for column in columns.values() for fact in column)
    rows = [(fact, *(column.get(fact, "") for column in columns.values())) for fact in facts]
    styles = {name: f"color({code})" for name, code in member_colours(list(columns)).items()}
    print_table(("", *columns), [row for row in rows if any(row[1:])], head_styles=styles)
    print_lines(f"unit {report.unit} · weights in memory {_size(report.weights_bytes)}")
    if report.router_inputs is not None:
        print_lines(f"the router looks at {report.router_inputs}")


def _facts(member: MemberReport) -> dict[str, str]:
    shared = f", shared with {member.shares}" if member.shares else ""
    return {
        "weight": f"{member.weight:.3g}",
        "vocabulary": f"{member.rows:,} rows, {member.pieces:,} pieces",
        "tokenizer": member.reading.get("family", ""),
        "normaliser": member.reading.get("normaliser", ""),
        "leading space": member.reading.get("leading space", ""),
        "control tokens": f"{member.control:,}",
        "ends of text": " ".join(member.ends),
        "template": member.reading.get("template", ""),
        "stops": " ".join(repr(stop) for stop in member.stops),
        "prompt": f"{member.prompt_tokens} tokens",
        "context": f"{member.context_length:,} tokens",
        **member.details,
        "weights": f"{_size(member.weights_bytes)}{shared}",
    }


def _show_prompts(report: Inspection) -> None:
    """Show each member's prompt for the question."""
    colours = member_colours([member.name for member in report.members])
    for member in report.members:
        name = styled(visible(member.name), f"38;5;{colours[member.name]}", sys.stdout)
        print(f"\nPrompt of {name} for {visible(report.question)!r}:")
        print("\n".join(f"  {line}" for line in visible(member.prompt).rstrip("\n").split("\n")))


def _show_possibilities(report: Inspection) -> None:
    print()
    rows = [(item.kind, item.name, "yes" if item.possible else f"no: {item.reason}") for item in report.possibilities]
    styles = ["green" if item.possible else "red" for item in report.possibilities]
    print_table(("", "name", "possible"), rows, styles=styles)


def _show_rule(rule: RuleReport) -> None:
    """Show what the rule needs, and what it costs on a sample."""
    print_lines(f"rule {rule.name} needs {'; '.join(rule.needs)}; {rule.bounds}")
    if rule.roles:
        print_lines(", ".join(f"{member} is the {role}" for role, member in rule.roles.items()))
    if rule.tokens:
        drafts = f", {rule.accepted} of {rule.drafted} drafts accepted" if rule.drafted else ""
        print_lines(
            f"Measured on {rule.tokens} tokens: {rule.forwards:.2f} forwards a token by layered{drafts}; "
            f"without drafts, {rule.stopped:.0%} of the other members' forwards are not needed; "
            f"{rule.tokens_per_second:.1f} tokens/s, conventional {rule.conventional_tokens_per_second:.1f}"
        )


def _show_pairs(report: Inspection) -> None:
    """Show two lines for each pair: what each member shares with the other."""
    heads = ["pieces of", "also in", "number", "share"]
    if report.text_bytes:
        heads += ["probability mass", "distance", "positions"]
    rows = []
    for pair in report.pairs:
        for i in (0, 1):
            row = [pair.members[i], pair.members[1 - i], f"{pair.common:,}", f"{pair.share[i]:.1%}"]
            if pair.mass is not None and pair.distance is not None:
                row += [f"{pair.mass[i]:.1%}", *(["", ""] if i else [f"{pair.distance:.3f}", str(pair.places)])]
            rows.append(row)
    print_table(heads, rows, right=frozenset(heads[2:]))
    if report.text_bytes:
        print_lines(
            f"Measured on {report.text_bytes} bytes of text. distance: mean total variation between the two "
            "next-token distributions, over the positions where both have a token boundary."
        )


def _show_costs(report: Inspection) -> None:
    lengths = sorted(report.costs[0].seconds)
    heads = ["forward pass of", *(f"{length} token{'' if length == 1 else 's'}" for length in lengths)]
    rows = [(cost.member, *(f"{1e3 * cost.seconds[length]:.1f} ms" for length in lengths)) for cost in report.costs]
    print_table(heads, rows, right=frozenset(heads[1:]))
    heads, how = ["tokens/s", "predicted"], "mixlm bench measures the speed."
    if any(speed.measured is not None for speed in report.speeds):
        heads, how = [*heads, "measured"], "Measured in one short run; mixlm bench measures more precisely."
    table = []
    for speed in report.speeds:
        label = f"single {', '.join(speed.members)}" if speed.method == "single" else speed.method
        table.append([label, f"{speed.predicted:.1f}", *([] if speed.measured is None else [f"{speed.measured:.1f}"])])
    print_table(heads, table, right=frozenset(heads[1:]))
    print_lines(f"Predicted from forward passes alone, with the current weights. {how}")


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _report_gain(shared: Shared, text: Path, *, as_json: bool) -> int:
    """Score a text under every member, and report what an ensemble of them could gain on it."""
    config = shared.config()
    if len(config.members) < 2:
        raise ConfigError("a single member is no ensemble, and gains nothing", "name two or more members with -m")
    from mixlm.loading import check_full_distributions

    check_full_distributions(config, "mixlm inspect --gain")
    texts = read_texts([text])
    pairs = prompts_and_answers(texts, ends=None, system=None)
    ensemble = open_ensemble(shared, {})
    ensemble = ensemble.with_weights(ensemble.weights.tolist())  # what a router observes is not scored
    from mixlm.inspection.gain import measure_gain

    scores = score_texts(ensemble, texts, pairs, model_identities(config, cache=True), ends=None, system=None)
    with progress_bars(single=True) as progress:
        report = measure_gain(ensemble, next(iter(scores.values())), progress=progress)
    if as_json:
        print_json(report.as_dict())
    else:
        _show_gain(report)
    return 0


def _show_gain(report: GainReport) -> None:
    several = len(report.members) > 2
    heads = ["", "bits per byte", "below best member", "weight", *(["best weights without it"] if several else [])]

    def row(name: str, bits: float, weight: str = "", without: float | None = None) -> tuple[str, ...]:
        below = f"{100 * (1 - bits / report.best):+.2f} %"
        return (name, f"{bits:.4f}", below, weight, *([f"{without:.4f}" if without else ""] if several else []))

    rows = [row(item.name, item.bits_per_byte, f"{item.weight:.3f}", item.without) for item in report.members]
    rows.append(row("equal weights", report.equal))
    rows.append(row("best fixed weights (EM)", report.fixed))
    rows.append(row("oracle: the best member of each segment", report.oracle))
    print_table(tuple(heads), rows, right=frozenset(heads[1:]))
    print_lines(
        f"Judged on the last half of the text, to whose first half the weights are fitted. "
        f"{about_unit(report.unit, report.segments, report.bytes)}"
    )
    if report.segments < _FEW:
        print_lines("So short a text decides nothing: give one of a few kilobytes.")
    if report.gain > 0:
        print_lines(
            f"Gain: fixed weights need {report.gain:.1f} % fewer bits than {report.best_member} alone, and no router "
            f"can save more than {report.oracle_gain:.1f} %."
        )
    else:
        print_lines(
            f"Gain: none. Fixed weights are not better than {report.best_member} alone; a router could save at most "
            f"{report.oracle_gain:.1f} %."
        )
    if report.cost is not None:
        speeds = report.tokens_per_second
        print_lines(
            f"Cost: a token by mixture takes {report.cost:.2f} times as long as by {report.best_member} alone "
            f"({speeds['mixture']:.1f} and {speeds['single']:.1f} tokens/s, predicted from forward passes)."
        )
    if report.worth_dropping is not None:
        print_lines(f"{report.worth_dropping} is worth dropping: without it, the best weights are as good.")
    elif (least := report.least_useful) is not None and least.without is not None:
        loss = 100 * (least.without / report.fixed - 1)
        print_lines(
            f"The least useful member is {least.name}: without it, the best weights need {loss:.1f} % more bits."
        )
