"""`mixlm score`: how likely a text is under each member and under their mixture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

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
from mixlm.cli.page import page
from mixlm.cli.segments import about_unit, show_segments
from mixlm.cli.tables import print_lines, print_table

if TYPE_CHECKING:
    from mixlm.scoring.scores import Scores
    from mixlm.types import Floats


@with_shared
def score(
    shared: Shared,
    files: Annotated[
        list[Path] | None,
        Argument(
            metavar="FILE",
            help="Texts, or .jsonl with one prompt and answer per line. Omit it, or write '-', to read standard input.",
        ),
    ] = None,
    tokens: Annotated[
        bool,
        Option("--tokens", help="Show the text, each segment in the colour of the member most responsible for it."),
    ] = False,
    html: Annotated[
        Path | None,
        Option("--html", metavar="FILE", help="Write the coloured text as an HTML page.", show_default=False),
    ] = None,
    ends: EndsOption = None,
    as_json: Annotated[bool, Option("--json", help="Print the scores as one JSON object.")] = False,
    no_cache: Annotated[bool, Option("--no-cache", help="Score the text again, without the cache of scores.")] = False,
) -> int:
    """Score text: bits per byte and log-probability under each member and the mixture.

    Members are scored as they are, without sampling options; the mixture uses the ensemble's weights or its router.
    """
    refuse_generation_options(shared, "score", allowed=("system",))
    check_writable("--html", html)
    texts = read_texts(files or [])
    pairs = prompts_and_answers(texts, ends=ends, system=shared.system)
    ensemble = open_ensemble(shared, {})
    from mixlm.scoring.scores import concatenate, router_weights

    models = model_identities(shared.config(), not no_cache)
    scores = list(score_texts(ensemble, texts, pairs, models, ends=ends, system=shared.system).values())
    weights = [router_weights(text_scores, ensemble.router) for text_scores in scores]
    whole = concatenate(scores)
    import numpy as np

    report = _report(whole, np.concatenate(weights))
    if html is not None:
        title = ", ".join(Path(name).name for name in texts)
        html.write_text(page(title, report, _numbers(whole, np.concatenate(weights))), encoding="utf-8")
        dim(f"written to {html}")
    if as_json:
        if len(texts) > 1:
            parts = zip(texts, scores, weights, strict=True)
            report["files"] = [
                {"file": name, **_summary(text_scores, text_weights)} for name, text_scores, text_weights in parts
            ]
        print_json(report)
        return 0
    if tokens:
        show_segments(report)
    _show(whole, np.concatenate(weights))
    if len(texts) > 1:
        _show_files(list(texts), scores, weights)
    return 0


def _summary(scores: Scores, weights: Floats) -> dict[str, Any]:
    columns = {name: scores.bits_per_byte(scores.logprobs[:, i]) for i, name in enumerate(scores.names)}
    mixture = scores.bits_per_byte(scores.mixture(weights))
    return {"bytes": scores.size, "bits_per_byte": {"members": columns, "mixture": mixture}}


def _report(scores: Scores, weights: Floats) -> dict[str, Any]:
    """Return the form that `--json` prints."""
    return {"unit": scores.unit, **_summary(scores, weights), "segments": scores.table(weights)}


def _numbers(scores: Scores, weights: Floats) -> list[tuple[str, str, str, str, str]]:
    """Return a row for each member and one for the mixture: name, weight, bits per byte, log-probability, share."""
    mean = weights.mean(axis=0)
    shares = scores.responsibilities(weights).mean(axis=0)
    constant = bool((weights == weights[0]).all())
    rows = []
    for i, name in enumerate(scores.names):
        column = scores.logprobs[:, i]
        weight = f"{'' if constant else '~'}{mean[i]:.3f}"
        bits = f"{scores.bits_per_byte(column):.4f}"
        rows.append((name, weight, bits, f"{column.sum():.1f}", f"{shares[i]:.1%}"))
    mixed = scores.mixture(weights)
    rows.append(("mixture", "", f"{scores.bits_per_byte(mixed):.4f}", f"{mixed.sum():.1f}", ""))
    return rows


def _show(scores: Scores, weights: Floats) -> None:
    heads = ("", "weight", "bits per byte", "log-probability", "responsible for")
    rows = _numbers(scores, weights)
    best = min(range(len(rows)), key=lambda i: float(rows[i][2]))
    styles = ["bold" if i == best else "" for i in range(len(rows))]
    print_table(heads, rows, right=frozenset(heads[1:]), styles=styles)
    print_lines(about_unit(scores.unit, len(scores.ends), scores.size))


def _show_files(names: list[str], scores: list[Scores], weights: list[Floats]) -> None:
    heads = ("file", "bytes", *(f"{name} " for name in scores[0].names), "mixture")
    rows = []
    for name, text_scores, text_weights in zip(names, scores, weights, strict=True):
        bits = _summary(text_scores, text_weights)["bits_per_byte"]
        columns = [f"{value:.4f}" for value in (*bits["members"].values(), bits["mixture"])]
        rows.append((name, str(text_scores.size), *columns))
    print_table(heads, rows, right=frozenset(heads[1:]))
