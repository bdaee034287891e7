"""`mixlm check`: a statistical test that all methods sample from one distribution, on the user's own models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument

from mixlm.cli.display import console, engines_by_member, engines_text, print_json, print_lines, print_table
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared, flag, with_shared
from mixlm.errors import ConfigError, UsageError
from mixlm.terminal import progress_bars

if TYPE_CHECKING:
    from mixlm.config import EnsembleConfig
    from mixlm.ensemble import Ensemble
    from mixlm.verification.check import CheckReport

_PROMPT = "Why is the sky blue?"
_HEADS = ("unit", "comparison", "symbol", "distance", "expected", "p-value", "verdict")


@with_shared(
    unused=("method", "max_tokens", "stop", "draft"), reason="it tests the first symbols of every method and its drafts"
)
def check(
    shared: Shared,
    prompt: Annotated[str, Argument(help="The prompt.", show_default=False)] = _PROMPT,
    samples: Annotated[int, flag("--samples N", "The number of completions that each method starts.")] = 2000,
    exact: Annotated[
        list[str] | None,
        flag(
            "--exact MODEL",
            "Compute the reference distribution with this model, run by transformers in float32, instead of a"
            " member. Give one for each member, in order.",
        ),
    ] = None,
    tolerance: Annotated[
        float, flag("--tolerance D", "Allowed total variation between members and --exact, per symbol.")
    ] = 0.0,
    every_unit: Annotated[
        bool, flag("--every-unit", "Check the units token, piece, word and byte, as far as the members support them.")
    ] = False,
    as_json: Annotated[bool, flag("--json", "Print the report as one JSON object.")] = False,
) -> int:
    """Test that every method samples from the distribution it promises.

    The exit code is 1 if a difference is found. Models are loaded in float32 unless --dtype or the ensemble file sets
    another dtype.
    """
    if not prompt.strip():
        raise ConfigError("the prompt is empty", "omit it for the default")
    if every_unit and (shared.unit is not None or exact):
        other = "--exact" if exact else "--unit"
        raise UsageError(f"--every-unit and {other} are both given", "omit one")
    options = shared.options()
    ensemble = open_ensemble(shared, options, dtype="float32")
    from mixlm.verification import check as equivalence

    reference = None
    if exact:
        config = shared.config(dtype="float32")
        reference = equivalence.ReferenceSetup(_as_reference(config, exact, shared.numbers()), tolerance)
    elif tolerance:
        raise ConfigError("--tolerance is given without --exact", "it is the allowed distance from --exact")
    skipped: dict[str, str] = {}
    with progress_bars() as progress:
        arguments: dict[str, Any] = {"samples": samples, "options": options, "progress": progress}
        if every_unit:
            report, skipped = equivalence.check_units(ensemble, prompt, **arguments)
        else:
            report = equivalence.check(ensemble, prompt, reference=reference, **arguments)
    if as_json:
        form = {**report.as_dict(), "engines": engines_by_member(ensemble)}
        print_json({**form, "left_out": skipped} if every_unit else form)
    else:
        _show(report)
        print_lines(f"Members run in {engines_text(ensemble)}.")
        for unit, reason in skipped.items():
            print_lines(f"The unit {unit} is not checked: {reason}.")
    return 0 if report.equal else 1


def _as_reference(config: EnsembleConfig, models: list[str], weights: list[float] | None) -> Ensemble:
    """Load the same ensemble of these models, in transformers and float32."""
    from mixlm.loading import load_config

    if len(models) != len(config.members):
        raise ConfigError(
            f"--exact names {len(models)} models for {len(config.members)} members",
            "name one for each member, in order",
        )
    changes = {"engine": "hf", "dtype": "float32", "device": "auto", "tokenizer": None}
    members = tuple(
        member.model_copy(update={**changes, "model": model})
        for member, model in zip(config.members, models, strict=True)
    )
    return load_config(config.model_copy(update={"members": members}), weights=weights)


def _show(report: CheckReport) -> None:
    units = list(dict.fromkeys(comparison.unit for comparison in report.comparisons))
    rows = [
        (
            comparison.unit,
            f"{comparison.left} / {comparison.right}",
            str(comparison.position),
            f"{comparison.total_variation:.4f}",
            f"{comparison.expected_total_variation:.4f}",
            f"{comparison.p_value:.3g}",
            "equal" if comparison.equal else "different",
        )
        for comparison in report.comparisons
    ]
    styles = ["green" if comparison.equal else "bold red" for comparison in report.comparisons]
    first = 0 if len(units) > 1 else 1  # without a column for a single unit
    print_table(_HEADS[first:], [row[first:] for row in rows], right=set(_HEADS[2:-1]), styles=styles)
    samples = max(comparison.samples for comparison in report.comparisons)
    scope = f"{samples} completions per method, unit{'s' if len(units) > 1 else ''} {', '.join(units)}"
    outcome = "No difference was found" if report.equal else "The methods do not sample from one distribution"
    console().print(f"{outcome}: {scope}.", style="green" if report.equal else "bold red")
