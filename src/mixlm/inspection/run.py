"""A whole inspection."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from mixlm.benchmark import bench
from mixlm.core.options import Options
from mixlm.engines.base import total_weight_bytes
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from mixlm.inspection import static
from mixlm.inspection.measure import Progress, agreement, costs, predicted, with_measured
from mixlm.inspection.report import Inspection
from mixlm.scoring.passages import split_passages

QUESTION = "Why is the sky blue?"
# Prose and code, so that members show what they know of both.
TEXT = '''\
The ferry left the harbour a little after six, when the fog had lifted from the water and the gulls were already
quarrelling over what the fishermen had thrown away. Most of the passengers stood at the rail with their collars up;
two of them, who had never seen the islands, asked the captain how long the crossing would take. "Forty minutes," he
said, "if the tide is kind." In 1962 it had taken three hours, and nobody complained.

def crossing_time(distance_km: float, speed_kmh: float, current_kmh: float = 0.0) -> float:
    """Return the minutes that a crossing takes, with or against a current."""
    effective = speed_kmh + current_kmh
    if effective <= 0:
        raise ValueError("the current is stronger than the boat")
    return 60 * distance_km / effective
'''
TEXT_BYTES = 4000
# A short run of every method, unless it would take longer than this by the prediction.
_TOKENS = 24
_SECONDS = 30.0
_NOT_MEASURED = ("method", "max_tokens", "stop")


def inspect(
    ensemble: Ensemble,
    *,
    question: str = QUESTION,
    text: str = TEXT,
    measure: bool = True,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Report on an ensemble. Of the text, at most the first 4,000 bytes are read, up to an end of line or a space.

    measure: false to run no model. options: of the replies to be written; they decide which methods are possible.
    progress: called with what is being done, steps done, steps. Raises ConfigError for an empty question or text, and
    for a text that a member's tokens do not spell exactly.
    """
    for name, value in (("question", question), ("sample text", text)):
        if not value.strip():
            raise ConfigError(f"the {name} is empty", "leave it out to take the default")
    given: dict[str, Any] = dict(options or {})
    of_prompts = {name: value for name, value in given.items() if name in ("system", "seed")}
    members = static.members(ensemble, question, of_prompts)
    found = Inspection(
        unit=ensemble.unit.name,
        router=type(ensemble.router).__name__,
        question=question,
        members=members,
        weights_bytes=total_weight_bytes(one.engine for one in ensemble.members),
        possibilities=static.possibilities(ensemble, given),
        pairs=static.pairs(ensemble),
    )
    partial = [one.name for one in ensemble.members if one.engine.top_k_limit is not None]
    if measure and partial:
        reason = f"{', '.join(partial)} cannot tell a whole distribution, so agreement and forwards are not measured"
        return replace(found, unmeasured=reason)
    if not measure:
        return replace(found, unmeasured="no model was run")
    data = split_passages(text.encode(errors="replace"), TEXT_BYTES)[0]
    pairs = agreement(ensemble, data, found.pairs, progress) if len(members) > 1 else ()
    timed = costs(ensemble, data, progress)
    speeds = predicted(ensemble.names, ensemble.weights, timed, ensemble.unit.name)
    possible = {one.name for one in found.possibilities if one.kind == "method" and one.possible}
    methods = list(dict.fromkeys(one.method for one in speeds))
    long = sum(2 * _TOKENS / one.predicted for one in speeds) > _SECONDS
    # In the unit `byte` what is written is counted in bytes, and what forwards promise in tokens.
    if possible >= set(methods) and not long and ensemble.unit.name != "byte":
        allowed = cast(Options, {name: value for name, value in given.items() if name not in _NOT_MEASURED})
        report = bench(
            ensemble,
            tokens=_TOKENS,
            repeats=1,
            prompt=question,
            methods=methods,
            options=allowed,
            progress=progress,
        )
        speeds = with_measured(speeds, {(one.method, one.members): one.tokens_per_second for one in report.runs})
    return replace(found, text_bytes=len(data), pairs=pairs, costs=timed, speeds=speeds)
