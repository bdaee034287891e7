"""`mixlm score`: how likely a text is under each member and under their mixture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from typer import Argument

from mixlm.cli.display import dim, engines_by_member, print_json
from mixlm.cli.inputs import (
    EndsOption,
    check_writable,
    model_identities,
    prompts_and_answers,
    read_texts,
    score_texts,
)
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import NOT_FOR_SCORING, Shared, flag, with_shared
from mixlm.cli.segments import about_unit, page, show_segments
from mixlm.cli.tables import print_lines, print_table
from mixlm.core.options import RULE_OPTIONS
from mixlm.core.rule_options import rule_as_dict
from mixlm.errors import UsageError
from mixlm.option_spec import OptionSpec

if TYPE_CHECKING:
    from mixlm.ensemble import Ensemble
    from mixlm.scoring.passages import Before
    from mixlm.scoring.rule_scores import RuleScorer
    from mixlm.scoring.scores import Scores
    from mixlm.types import Floats

_BEFORE = ("begin", "end")
_HEADS = (
    "",
    "weight",
    "bits per byte",
    "perplexity per token",
    "per word",
    "log-probability",
    "responsible for",
)


@with_shared(
    unused=tuple(name for name in NOT_FOR_SCORING if name not in RULE_OPTIONS), reason="members are scored as they are"
)
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
    check_writable("--html", html)
    if before is not None:
        OptionSpec(choices=_BEFORE).check("--before", before)
    texts = read_texts(files or [])
    pairs = prompts_and_answers(texts, ends=ends, system=shared.system)
    bare = [text for name, text in texts.items() if name not in pairs]
    if before is not None and not bare:
        raise UsageError("--before stands in front of texts, and prompts stand in front of all answers", "omit it")
    from mixlm.loading import check_full_distributions

    check_full_distributions(shared.config(), "mixlm score")
    ensemble = open_ensemble(shared, {})
    from mixlm.scoring.scores import concatenate, router_weights

    rule = _rule_scorer(ensemble)
    models = model_identities(shared.config(), not no_cache)
    arguments: dict[str, Any] = {"ends": ends, "system": shared.system, "before": before or "begin"}
    scores = list(score_texts(ensemble, texts, pairs, models, **arguments).values())
    weights = [router_weights(text_scores, ensemble.router) for text_scores in scores]
    whole = concatenate(scores)
    import numpy as np

    scored = bare + [answer for text_pairs in pairs.values() for _, answer in text_pairs]
    counts = _Counts.of(ensemble, whole, scored)
    report = _report(whole, np.concatenate(weights), counts)
    report["engines"] = engines_by_member(ensemble)
    if rule is not None:
        report["rule"] = _rule_report(ensemble, rule, bare, pairs, arguments)
    report["before"] = _before(ensemble, cast("Before", before or "begin")) if bare else {}
    if html is not None:
        title = ", ".join(Path(name).name for name in texts)
        html.write_text(page(title, report, _HEADS, _numbers(whole, np.concatenate(weights), counts)), encoding="utf-8")
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
    _show(whole, np.concatenate(weights), counts)
    if "rule" in report:
        _show_rule(report["rule"])
    if bare:
        tokens_before = ", ".join(f"{token} for {name}" for name, token in report["before"].items())
        print_lines(f"In front of the text, and of every further passage of it, stands {tokens_before}.")
    if len(texts) > 1:
        _show_files(list(texts), scores, weights)
    return 0


def _rule_scorer(ensemble: Ensemble) -> RuleScorer | None:
    """Return what scores under the rule of the ensemble, None for the average. Raises what `RuleScorer` does."""
    if ensemble.defaults.rule is None:
        return None
    from mixlm.scoring.rule_scores import RuleScorer

    return RuleScorer(ensemble)


def _rule_report(
    ensemble: Ensemble,
    scorer: RuleScorer,
    texts: list[str],
    pairs: Mapping[str, Sequence[tuple[str, str]]],
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the log-probability of all texts and answers under the rule of the ensemble."""
    from mixlm.scoring.passages import answer_passages
    from mixlm.scoring.rule_scores import text_passages

    answers = [pair for file_pairs in pairs.values() for pair in file_pairs]
    ends = arguments["ends"]
    if ends is None:
        ends = not any(member.engine.stops for member in ensemble.members)
    settings = ensemble.settings(**({"system": arguments["system"]} if arguments["system"] is not None else {}))
    passages = text_passages(ensemble, texts, arguments["before"])
    passages += answer_passages(ensemble, answers, settings, ends=ends)
    logprob = float(scorer.logprobs(passages)[0])
    size = sum(len(passage.data) for passage in passages)
    figures: dict[str, float | None] = {"bits_per_byte": -logprob / math.log(2) / size, "logprob": logprob}
    if logprob == -math.inf:
        figures = dict.fromkeys(figures)
    return {**rule_as_dict(ensemble.defaults.rule or "average", ensemble.defaults.rule_parameters), **figures}


def _summary(scores: Scores, weights: Floats) -> dict[str, Any]:
    columns = {name: scores.bits_per_byte(scores.logprobs[:, i]) for i, name in enumerate(scores.names)}
    mixture = scores.bits_per_byte(scores.mixture(weights))
    return {"bytes": scores.size, "bits_per_byte": {"members": columns, "mixture": mixture}}


@dataclass(frozen=True)
class _Counts:
    """What perplexities are divided by.

    Attributes:
        tokens: The number of each member's own tokens, and of the mixture's if members share a vocabulary.
        words: The number of words between white space.
    """

    tokens: list[int | None]
    words: int

    @classmethod
    def of(cls, ensemble: Ensemble, scores: Scores, texts: list[str]) -> _Counts:
        """Count the tokens and words of scored texts; an end of an answer that is scored is a token."""
        ends = int((scores.starts == scores.ends).sum())
        data = [text.encode(errors="replace") for text in texts]
        encoders = [member.engine.encoder for member in ensemble.members]
        tokens: list[int | None] = [sum(len(encoder.encode(part).ids) for part in data) + ends for encoder in encoders]
        return cls(
            [*tokens, len(scores.ends) if scores.unit == "token" else None], sum(len(text.split()) for text in texts)
        )


def _perplexity(logprob: float, count: int | None) -> float | None:
    """Return the perplexity for the log-probability of `count` tokens or words; None where there are none."""
    return None if not count else math.exp(min(-logprob / count, 700.0))


def _before(ensemble: Ensemble, before: Before) -> dict[str, str]:
    """Return what stands in front of a text, by member."""
    from mixlm.scoring.passages import text_prefix

    engines = {member.name: member.engine for member in ensemble.members}
    return {
        name: "".join(engine.vocabulary.name(token) for token in text_prefix(engine, before).tolist())
        for name, engine in engines.items()
    }


def _report(scores: Scores, weights: Floats, counts: _Counts) -> dict[str, Any]:
    """Return the form that `--json` prints."""
    logprobs = [*scores.logprobs.sum(axis=0).tolist(), float(scores.mixture(weights).sum())]
    names = (*scores.names, "mixture")
    perplexity = {
        "token": {
            name: _perplexity(logprob, count)
            for name, logprob, count in zip(names, logprobs, counts.tokens, strict=True)
        },
        "word": {name: _perplexity(logprob, counts.words) for name, logprob in zip(names, logprobs, strict=True)},
    }
    summary = _summary(scores, weights)
    return {"unit": scores.unit, **summary, "perplexity": perplexity, "segments": scores.table(weights)}


def _numbers(scores: Scores, weights: Floats, counts: _Counts) -> list[tuple[str, ...]]:
    """Return a row of `_HEADS` for each member, and one for the mixture."""
    mean = weights.mean(axis=0)
    shares = scores.responsibilities(weights).mean(axis=0)
    constant = bool((weights == weights[0]).all())
    rows: list[tuple[str, ...]] = []
    for i, name in enumerate(scores.names):
        column = scores.logprobs[:, i]
        weight = f"{'' if constant else '~'}{mean[i]:.3f}"
        bits = f"{scores.bits_per_byte(column):.4f}"
        perplexities = _perplexities(float(column.sum()), counts.tokens[i], counts.words)
        rows.append((name, weight, bits, *perplexities, f"{column.sum():.1f}", f"{shares[i]:.1%}"))
    mixed = scores.mixture(weights)
    perplexities = _perplexities(float(mixed.sum()), counts.tokens[-1], counts.words)
    rows.append(("mixture", "", f"{scores.bits_per_byte(mixed):.4f}", *perplexities, f"{mixed.sum():.1f}", ""))
    return rows


def _perplexities(logprob: float, tokens: int | None, words: int) -> tuple[str, str]:
    values = (_perplexity(logprob, tokens), _perplexity(logprob, words))
    per_token, per_word = ("" if value is None else f"{value:.4g}" for value in values)
    return per_token, per_word


def _show(scores: Scores, weights: Floats, counts: _Counts) -> None:
    rows = _numbers(scores, weights, counts)
    best = min(range(len(rows)), key=lambda i: float(rows[i][2]))
    styles = ["bold" if i == best else "" for i in range(len(rows))]
    print_table(_HEADS, rows, right=frozenset(_HEADS[1:]), styles=styles)
    print_lines(about_unit(scores.unit, len(scores.ends), scores.size))


def _show_rule(rule: Mapping[str, Any]) -> None:
    result = "it gives some token no probability"
    if rule["bits_per_byte"] is not None:
        result = f"{rule['bits_per_byte']:.4f} bits per byte, log-probability {rule['logprob']:.1f}"
    print_lines(f"Under rule {rule['name']}: {result}.")


def _show_files(names: list[str], scores: list[Scores], weights: list[Floats]) -> None:
    heads = ("file", "bytes", *(f"{name} " for name in scores[0].names), "mixture")
    rows = []
    for name, text_scores, text_weights in zip(names, scores, weights, strict=True):
        bits = _summary(text_scores, text_weights)["bits_per_byte"]
        columns = [f"{value:.4f}" for value in (*bits["members"].values(), bits["mixture"])]
        rows.append((name, str(text_scores.size), *columns))
    print_table(heads, rows, right=frozenset(heads[1:]))
