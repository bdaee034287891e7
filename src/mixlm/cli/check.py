"""`mixlm check`: the statistical proof that the methods sample one law, on the user's own models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from mixlm.cli.display import print_json
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared, with_shared
from mixlm.cli.tables import console, print_lines, print_table
from mixlm.errors import ConfigError, UsageError
from mixlm.terminal import progress_bars

if TYPE_CHECKING:
    from mixlm.config import EnsembleConfig
    from mixlm.ensemble import Ensemble
    from mixlm.verification.check import Report

_PROMPT = "Why is the sky blue?"
_HEADS = ("comparison", "symbol", "distance", "expected", "p-value", "verdict")
_NUMBERS = frozenset(("symbol", "distance", "expected", "p-value"))


@with_shared
def check(
    shared: Shared,
    prompt: Annotated[str, Argument(help="What the replies answer.")] = _PROMPT,
    samples: Annotated[int, Option("--samples", metavar="N", help="How many replies each method begins.")] = 2000,
    exact: Annotated[
        list[str] | None,
        Option(
            "--exact",
            metavar="MODEL",
            help="Take the exact law from this model in place of a member, run by transformers in float32. Once for"
            " each member, in order.",
        ),
    ] = None,
    tolerance: Annotated[
        float,
        Option("--tolerance", metavar="D", help="Total variation that members may have from --exact, for each symbol."),
    ] = 0.0,
    every_unit: Annotated[
        bool, Option("--every-unit", help="Check the units token, piece, word and byte, as far as members allow.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print the report as one JSON object.")] = False,
) -> int:
    """Test that every method samples from the distribution it promises.

    The exit code is 1 if a difference is found. Models are loaded in float32 unless --dtype or the ensemble file sets
    another dtype.
    """
    if not prompt.strip():
        raise ConfigError("the prompt is empty", "leave it out to take the default")
    if every_unit and (shared.unit is not None or exact):
        other = "--exact" if exact else "--unit"
        raise UsageError(f"--every-unit and {other} are both given", "leave one out")
    options = shared.options()
    ensemble = open_ensemble(shared, options, dtype="float32")
    from mixlm.verification import check as equivalence

    reference = None
    if exact:
        config = shared.config(dtype="float32")
        reference = equivalence.Reference(_as_reference(config, exact, shared.numbers()), tolerance)
    elif tolerance:
        raise ConfigError("--tolerance is given without --exact", "members have no distance from themselves")
    left_out: dict[str, str] = {}
    with progress_bars() as progress:
        about: dict[str, Any] = {"samples": samples, "options": options, "progress": progress}
        if every_unit:
            report, left_out = equivalence.check_units(ensemble, prompt, **about)
        else:
            report = equivalence.check(ensemble, prompt, reference=reference, **about)
    if as_json:
        print_json(report.as_dict() | ({"left_out": left_out} if every_unit else {}))
    else:
        _show(report)
        for unit, reason in left_out.items():
            print_lines(f"The unit {unit} is left out: {reason}.")
    return 0 if report.equal else 1


def _as_reference(config: EnsembleConfig, models: list[str], weights: list[float] | None) -> Ensemble:
    """Load the same ensemble of these models, in transformers and float32."""
    from mixlm.loading import load_config

    if len(models) != len(config.members):
        raise ConfigError(
            f"--exact names {len(models)} models for {len(config.members)} members", "name one for each, in order"
        )
    own = {"engine": "hf", "dtype": "float32", "device": "auto", "tokenizer": None}
    members = tuple(
        member.model_copy(update={**own, "model": model}) for member, model in zip(config.members, models, strict=True)
    )
    return load_config(config.model_copy(update={"members": members}), weights=weights)


def _show(report: Report) -> None:
    units = list(dict.fromkeys(one.unit for one in report.comparisons))
    several = len(units) > 1
    rows = [
        (
            *([one.unit] if several else []),
            f"{one.left} / {one.right}",
            str(one.position),
            f"{one.total_variation:.4f}",
            f"{one.expected_total_variation:.4f}",
            f"{one.p_value:.3g}",
            "equal" if one.equal else "different",
        )
        for one in report.comparisons
    ]
    styles = ["green" if one.equal else "bold red" for one in report.comparisons]
    print_table(("unit", *_HEADS) if several else _HEADS, rows, right=_NUMBERS, styles=styles)
    samples = max(one.samples for one in report.comparisons)
    about = f"{samples} replies a method, {'units' if several else 'unit'} {', '.join(units)}"
    if report.equal:
        console().print(f"No difference was found: {about}.", style="green")
    else:
        console().print(f"The methods do not sample one law: {about}.", style="bold red")
