"""`mixlm inspect --gain`: what an ensemble could gain on a text, and what it would cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mixlm.cli.display import print_json
from mixlm.cli.inputs import model_identities, prompts_and_answers, read_texts, score_texts
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared
from mixlm.cli.segments import about_unit
from mixlm.cli.tables import print_lines, print_table
from mixlm.errors import ConfigError
from mixlm.terminal import progress_bars

if TYPE_CHECKING:
    from mixlm.inspection.gain import GainReport

_FEW = 100  # segments


def report_gain(shared: Shared, text: Path, *, as_json: bool) -> int:
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
        _show(report)
    return 0


def _show(report: GainReport) -> None:
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
    lines = [
        f"Gain: fixed weights need {report.gain:.1f} % fewer bits than {report.best_member} alone, and no router can "
        f"save more than {report.oracle_gain:.1f} %."
    ]
    if report.gain <= 0:
        lines = [
            f"Gain: none. Fixed weights are not better than {report.best_member} alone; a router could save at most "
            f"{report.oracle_gain:.1f} %."
        ]
    if report.cost is not None:
        speeds = report.tokens_per_second
        lines.append(
            f"Cost: a token by mixture takes {report.cost:.2f} times as long as by {report.best_member} alone "
            f"({speeds['mixture']:.1f} and {speeds['single']:.1f} tokens/s, predicted from forward passes)."
        )
    if (member := report.worth_dropping) is not None:
        lines.append(f"{member} is worth dropping: without it, the best weights are as good.")
    elif several and (least := report.least_useful) is not None and least.without is not None:
        loss = 100 * (least.without / report.fixed - 1)
        lines.append(
            f"The least useful member is {least.name}: without it, the best weights need {loss:.1f} % more bits."
        )
    for line in lines:
        print_lines(line)
