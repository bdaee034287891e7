"""`mixlm inspect`: what an ensemble is and what it will cost, before anything is generated."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from mixlm.cli.display import dim, member_colours, print_json
from mixlm.cli.inputs import read_texts
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared, with_shared
from mixlm.cli.tables import print_lines, print_table
from mixlm.errors import UsageError
from mixlm.terminal import progress_bars, styled, visible

if TYPE_CHECKING:
    from mixlm.inspection import Inspection
    from mixlm.inspection.report import MemberReport

_QUESTION = "Why is the sky blue?"


@with_shared
def inspect(
    shared: Shared,
    question: Annotated[str, Argument(help="What the prompts that are shown ask.")] = _QUESTION,
    text: Annotated[
        Path | None,
        Option(
            "--text",
            metavar="FILE",
            help="Measure how far members agree on this text ('-': standard input); its first 4,000 bytes are read. "
            "Default: some prose and code.",
            show_default=False,
        ),
    ] = None,
    no_measure: Annotated[bool, Option("--no-measure", help="Run no model: a quick look.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the report as one JSON object.")] = False,
) -> int:
    """Report on an ensemble: members, memory, possible methods, agreement and speed.

    The report covers the members with their tokenizers, prompts and memory; the units and methods that are possible,
    and why others are not; the vocabulary that members share and the distance between their predictions on a text;
    the cost of forward passes, and the speed it predicts.
    """
    if text is not None and no_measure:
        raise UsageError("--text and --no-measure are both given", "a text is read by running the models")
    sample = next(iter(read_texts([text]).values())) if text is not None else None
    ensemble = open_ensemble(shared, {})
    from mixlm.inspection import inspect as look

    more: dict[str, Any] = {} if sample is None else {"text": sample}
    with progress_bars(single=True) as progress:
        found = look(
            ensemble,
            question=question,
            measure=not no_measure,
            options=shared.options(),
            progress=progress,
            **more,
        )
    if as_json:
        print_json(found.as_dict())
        return 0
    _show_members(found)
    _show_prompts(found)
    _show_possibilities(found)
    if found.pairs:
        _show_pairs(found)
    if found.costs:
        _show_costs(found)
    if found.unmeasured is not None:
        dim(f"{found.unmeasured}; mixlm bench measures speed" if not no_measure else found.unmeasured)
    return 0


def _show_members(found: Inspection) -> None:
    """Show a column for each member."""
    named = [(one.name, _facts(one)) for one in found.members]
    rows = [
        (fact, *(facts.get(fact, "") for _, facts in named))
        for fact in dict.fromkeys(fact for _, facts in named for fact in facts)
        if any(facts.get(fact) for _, facts in named)
    ]
    colours = member_colours([name for name, _ in named])
    heads = ("", *(name for name, _ in named))
    print_table(heads, rows, head_styles={name: f"color({code})" for name, code in colours.items()})
    print_lines(f"unit {found.unit} · weights in memory {_size(found.weights_bytes)}")


def _facts(one: MemberReport) -> dict[str, str]:
    shared = f", shared with {one.shares}" if one.shares else ""
    return {
        "weight": f"{one.weight:.3g}",
        "vocabulary": f"{one.rows:,} rows, {one.pieces:,} pieces",
        "tokenizer": one.reading.get("family", ""),
        "normaliser": one.reading.get("normaliser", ""),
        "leading space": one.reading.get("leading space", ""),
        "control tokens": f"{one.control:,}",
        "ends of text": " ".join(one.ends),
        "template": one.reading.get("template", ""),
        "stops": " ".join(repr(stop) for stop in one.stops),
        "prompt": f"{one.prompt_tokens} tokens",
        "context": f"{one.context_length:,} tokens",
        **one.details,
        "weights": f"{_size(one.weights_bytes)}{shared}",
    }


def _show_prompts(found: Inspection) -> None:
    """Show what each member reads for the question."""
    colours = member_colours([one.name for one in found.members])
    for one in found.members:
        head = styled(visible(one.name), f"38;5;{colours[one.name]}", sys.stdout)
        print(f"\n{head} reads, for {visible(found.question)!r}:")
        print("\n".join(f"  {line}" for line in visible(one.prompt).rstrip("\n").split("\n")))


def _show_possibilities(found: Inspection) -> None:
    print()
    rows = [(one.kind, one.name, "yes" if one.possible else f"no: {one.reason}") for one in found.possibilities]
    styles = ["green" if one.possible else "red" for one in found.possibilities]
    print_table(("", "name", "possible"), rows, styles=styles)


def _show_pairs(found: Inspection) -> None:
    """Show two lines for each pair: what either has of the other."""
    heads = ["pieces of", "also in", "pieces", "of its own"]
    if found.text_bytes:
        heads += ["of its probability", "distance", "places"]
    rows = []
    for pair in found.pairs:
        for at in (0, 1):
            row = [pair.members[at], pair.members[1 - at], f"{pair.common:,}", f"{pair.share[at]:.1%}"]
            if pair.mass is not None and pair.distance is not None:
                row += [f"{pair.mass[at]:.1%}", *(["", ""] if at else [f"{pair.distance:.3f}", str(pair.places)])]
            rows.append(row)
    print_table(heads, rows, right=frozenset(heads[2:]))
    if found.text_bytes:
        print_lines(
            f"Measured on {found.text_bytes} bytes of text. distance: total variation between the two next-token "
            "distributions, the mean over the places where both have a token boundary."
        )


def _show_costs(found: Inspection) -> None:
    lengths = sorted(found.costs[0].seconds)
    heads = ["forward of", *(f"{length} token{'' if length == 1 else 's'}" for length in lengths)]
    rows = [(one.member, *(f"{1e3 * one.seconds[length]:.1f} ms" for length in lengths)) for one in found.costs]
    print_table(heads, rows, right=frozenset(heads[1:]))
    measured = any(one.measured is not None for one in found.speeds)
    heads = ["tokens/s", "predicted", *(["measured"] if measured else [])]
    table = []
    for speed in found.speeds:
        label = f"single {', '.join(speed.members)}" if speed.method == "single" else speed.method
        table.append([label, f"{speed.predicted:.1f}", *([] if speed.measured is None else [f"{speed.measured:.1f}"])])
    print_table(heads, table, right=frozenset(heads[1:]))
    how = "Measured in one short run; mixlm bench does it well." if measured else "mixlm bench measures."
    print_lines(f"Predicted from the cost of forwards alone, with the weights as they stand. {how}")


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
