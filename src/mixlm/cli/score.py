"""`mixlm score`: how likely a text is under each member and under their mixture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from typer import Argument

from mixlm.cli.display import dim, engines_by_member, print_json, print_lines, print_table
from mixlm.cli.inputs import (
    EndsOption,
    check_writable,
    model_identities,
    prompts_and_answers,
    read_texts,
    score_texts,
)
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import NOT_FOR_SCORING, SCORED_AS_THEY_ARE, Shared, flag, with_shared
from mixlm.cli.segments import about_unit, page, show_segments
from mixlm.core.rule_options import rule_as_dict
from mixlm.errors import UsageError
from mixlm.option_spec import OptionSpec

if TYPE_CHECKING:
    from mixlm.ensemble import Ensemble
    from mixlm.scoring.passages import Before, Passage
    from mixlm.scoring.rule_scores import RuleScorer
    from mixlm.scoring.scores import Scores
    from mixlm.types import Floats

_BEFORE = ("begin", "end")
_HEADS = ("", "weight", "bits per byte", "perplexity per token", "per word", "log-probability", "responsible for")


@with_shared(unused=NOT_FOR_SCORING, reason=SCORED_AS_THEY_ARE)
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
        bool, flag("--tokens", "Show the text, each segment in the colour of the member most responsible for it.")
    ] = False,
    html: Annotated[Path | None, flag("--html FILE", "Write the coloured text as an HTML page.")] = None,
    ends: EndsOption = None,
    before: Annotated[
        str | None,
        flag(
            "--before NAME",
            "What stands in front of a text: begin (each member's BOS, or end-of-text if it has none) or end"
            " (end-of-text). Default: begin.",
        ),
    ] = None,
    as_json: Annotated[bool, flag("--json", "Print the scores as one JSON object.")] = False,
    no_cache: Annotated[bool, flag("--no-cache", "Score the text again, without the cache of scores.")] = False,
) -> int:
    """Score text: bits per byte and log-probability under each member and the mixture.

    Members are scored as they are, without sampling options; the mixture uses the ensemble's weights or its router.
    With --rule, the log-probability under that combination is given too, exactly.
    """
    if html is not None:
        check_writable("--html", html)
    if before is not None:
        OptionSpec(choices=_BEFORE).check("--before", before)
    texts = read_texts(files or [])
    pairs = prompts_and_answers(texts, ends=ends, system=shared.system)
    bare = [text for name, text in texts.items() if name not in pairs]
    if before is not None and not bare:
        raise UsageError("--before stands in front of texts, and prompts stand in front of all answers", "omit it")
    from mixlm.loading import check_full_distributions

    config = shared.config()
    check_full_distributions(config, "mixlm score")
    ensemble = open_ensemble(shared, {})
    from mixlm.scoring.passages import answer_passages
    from mixlm.scoring.rule_scores import RuleScorer, text_passages
    from mixlm.scoring.scores import concatenate, router_weights

    rule = None if ensemble.defaults.rule is None else RuleScorer(ensemble)
    in_front = cast("Before", before or "begin")
    models = model_identities(config, not no_cache)
    scores = list(
        score_texts(ensemble, texts, pairs, models, ends=ends, system=shared.system, before=in_front).values()
    )
    weights = [router_weights(text_scores, ensemble.router) for text_scores in scores]
    import numpy as np

    whole, all_weights = concatenate(scores), np.concatenate(weights)
    answers = [pair for text_pairs in pairs.values() for pair in text_pairs]
    report = _report(ensemble, whole, all_weights, [*bare, *(answer for _, answer in answers)])
    if rule is not None:
        if ends is None:
            ends = not any(member.engine.stops for member in ensemble.members)
        passages = text_passages(ensemble, bare, in_front)
        passages += answer_passages(ensemble, answers, ensemble.settings(**shared.options()), ends=ends)
        report["rule"] = _rule_report(ensemble, rule, passages)
    report["before"] = _before(ensemble, in_front) if bare else {}
    numbers = _numbers(whole, all_weights, report)
    if html is not None:
        title = ", ".join(Path(name).name for name in texts)
        html.write_text(page(title, report, _HEADS, numbers), encoding="utf-8")
        dim(f"written to {html}")
    if len(texts) > 1:
        parts = zip(texts, scores, weights, strict=True)
        report["files"] = [{"file": name, **_summary(part, part_weights)} for name, part, part_weights in parts]
    if as_json:
        print_json(report)
    else:
        _show(report, numbers, with_text=tokens)
    return 0


def _report(ensemble: Ensemble, scores: Scores, weights: Floats, texts: Sequence[str]) -> dict[str, Any]:
    """Return the form that `--json` prints. texts: what was scored."""
    names = (*scores.names, "mixture")
    logprobs = [float(column.sum()) for column in _columns(scores, weights)]
    # The end of an answer, where it is scored, is a token too; the mixture has tokens if members share a vocabulary.
    ends = int((scores.starts == scores.ends).sum())
    counts: list[int | None] = [
        sum(len(member.engine.encoder.encode(text.encode(errors="replace")).ids) for text in texts) + ends
        for member in ensemble.members
    ]
    counts.append(len(scores.ends) if scores.unit == "token" else None)
    words = sum(len(text.split()) for text in texts)
    perplexity = {
        "token": dict(zip(names, map(_perplexity, logprobs, counts), strict=True)),
        "word": {name: _perplexity(logprob, words) for name, logprob in zip(names, logprobs, strict=True)},
    }
    summary = {**_summary(scores, weights), "perplexity": perplexity, "segments": scores.table(weights)}
    return {"unit": scores.unit, **summary, "engines": engines_by_member(ensemble)}


def _summary(scores: Scores, weights: Floats) -> dict[str, Any]:
    *members, mixture = (scores.bits_per_byte(column) for column in _columns(scores, weights))
    bits = {"members": dict(zip(scores.names, members, strict=True)), "mixture": mixture}
    return {"bytes": scores.size, "bits_per_byte": bits}


def _columns(scores: Scores, weights: Floats) -> list[Floats]:
    """Return the log-probabilities of the segments under each member, and under the mixture."""
    return [*scores.logprobs.T, scores.mixture(weights)]


def _perplexity(logprob: float, count: int | None) -> float | None:
    """Return the perplexity for the log-probability of `count` tokens or words; None where there are none."""
    return None if not count else math.exp(min(-logprob / count, 700.0))


def _rule_report(ensemble: Ensemble, scorer: RuleScorer, passages: Sequence[Passage]) -> dict[str, Any]:
    """Return the log-probability of all texts and answers under the rule of the ensemble."""
    logprob = float(scorer.logprobs(passages)[0])
    size = sum(len(passage.data) for passage in passages)
    figures: dict[str, float | None] = {"bits_per_byte": -logprob / math.log(2) / size, "logprob": logprob}
    if logprob == -math.inf:
        figures = dict.fromkeys(figures)
    return {**rule_as_dict(ensemble.defaults.rule or "average", ensemble.defaults.rule_parameters), **figures}


def _before(ensemble: Ensemble, before: Before) -> dict[str, str]:
    """Return what stands in front of a text, by member."""
    from mixlm.scoring.passages import text_prefix

    return {
        member.name: "".join(map(member.engine.vocabulary.name, text_prefix(member.engine, before).tolist()))
        for member in ensemble.members
    }


def _numbers(scores: Scores, weights: Floats, report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row of `_HEADS` for each member, and one for the mixture."""
    about = "" if (weights == weights[0]).all() else "~"
    means = [*(f"{about}{weight:.3f}" for weight in weights.mean(axis=0)), ""]
    shares = [*(f"{share:.1%}" for share in scores.responsibilities(weights).mean(axis=0)), ""]
    rows = []
    for name, mean, share, column in zip(
        (*scores.names, "mixture"), means, shares, _columns(scores, weights), strict=True
    ):
        perplexities = (report["perplexity"][count][name] for count in ("token", "word"))
        shown = ("" if value is None else f"{value:.4g}" for value in perplexities)
        rows.append((name, mean, f"{scores.bits_per_byte(column):.4f}", *shown, f"{column.sum():.1f}", share))
    return rows


def _show(report: Mapping[str, Any], numbers: Sequence[Sequence[str]], *, with_text: bool) -> None:
    if with_text:
        show_segments(report)
    best = min(range(len(numbers)), key=lambda i: float(numbers[i][2]))
    styles = ["bold" if i == best else "" for i in range(len(numbers))]
    print_table(_HEADS, numbers, right=frozenset(_HEADS[1:]), styles=styles)
    print_lines(about_unit(report["unit"], len(report["segments"]), report["bytes"]))
    if (rule := report.get("rule")) is not None:
        result = "it gives some token no probability"
        if rule["bits_per_byte"] is not None:
            result = f"{rule['bits_per_byte']:.4f} bits per byte, log-probability {rule['logprob']:.1f}"
        print_lines(f"Under rule {rule['name']}: {result}.")
    if report["before"]:
        tokens = ", ".join(f"{token} for {name}" for name, token in report["before"].items())
        print_lines(f"In front of the text, and of every further passage of it, stands {tokens}.")
    if "files" in report:
        heads = ("file", "bytes", *(f"{name} " for name in report["bits_per_byte"]["members"]), "mixture")
        rows = []
        for file in report["files"]:
            bits = (*file["bits_per_byte"]["members"].values(), file["bits_per_byte"]["mixture"])
            rows.append((file["file"], str(file["bytes"]), *(f"{value:.4f}" for value in bits)))
        print_table(heads, rows, right=frozenset(heads[1:]))
