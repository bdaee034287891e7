"""Inspect an ensemble: `inspect`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from mixlm.benchmark import BenchPlan, bench
from mixlm.core.options import Options
from mixlm.engines.base import total_weight_bytes
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from mixlm.inspection import static
from mixlm.inspection.measure import (
    ForwardCost,
    SpeedEstimate,
    measure_agreement,
    measure_rule,
    predict_speeds,
    time_forwards,
)
from mixlm.scoring.passages import split_passages
from mixlm.terminal import Progress

QUESTION = "Why is the sky blue?"
# Prose and code, to compare members on both.
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
# Every method is run for this many tokens, unless the prediction says that takes longer than this many seconds.
_TOKENS = 24
_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Inspection:
    """The report of an inspection.

    Attributes:
        text_bytes: Size of the sample text that the members scored; 0 if no model was run.
        unmeasured: Why nothing was measured, if so.
        rule: The combination rule; None for the average.
        router_inputs: What the router looks at beside the text, and which engines can run it; None for the text alone.
    """

    unit: str
    router: str
    question: str
    members: tuple[static.MemberReport, ...]
    weights_bytes: int
    possibilities: tuple[static.Feasibility, ...]
    pairs: tuple[static.PairReport, ...]
    text_bytes: int = 0
    costs: tuple[ForwardCost, ...] = ()
    speeds: tuple[SpeedEstimate, ...] = ()
    unmeasured: str | None = None
    router_inputs: str | None = None
    rule: static.RuleReport | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        return asdict(self)


def inspect(
    ensemble: Ensemble,
    *,
    question: str = QUESTION,
    text: str | None = None,
    measure: bool = True,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Report on an ensemble.

    Args:
        ensemble: The ensemble.
        question: The user message whose prompts are shown.
        text: A sample text, of which at most 4,000 bytes are used, up to an end of line or a space; `TEXT` by default.
        measure: Whether models are run.
        options: Generation options, which determine the methods that are possible.
        progress: Called with what is done, the steps done, and their number.

    Raises:
        ConfigError: The question or the text is empty, or a member's tokens cannot spell the text.
    """
    text = TEXT if text is None else text
    for name, value in (("question", question), ("sample text", text)):
        if not value.strip():
            raise ConfigError(f"the {name} is empty", "omit it for the default")
    chosen: dict[str, Any] = dict(options or {})
    prompt_options = {name: value for name, value in chosen.items() if name in ("system", "seed")}
    inspection = Inspection(
        unit=ensemble.unit.name,
        router=type(ensemble.router).__name__,
        question=question,
        members=static.describe_members(ensemble, question, prompt_options),
        weights_bytes=total_weight_bytes(member.engine for member in ensemble.members),
        possibilities=static.check_feasibility(ensemble, chosen),
        pairs=static.compare_vocabularies(ensemble),
        router_inputs=static.describe_router_inputs(ensemble),
        rule=static.describe_rule(ensemble, chosen),
    )
    if not measure:
        return replace(inspection, unmeasured="no model was run")
    data = split_passages(text.encode(errors="replace"), TEXT_BYTES)[0]
    pairs, text_bytes, unmeasured = inspection.pairs, len(data), None
    partial = [member.name for member in ensemble.members if member.engine.top_k_limit is not None]
    if pairs and partial:
        unmeasured = f"agreement is not measured, since only the most likely tokens are known of {', '.join(partial)}"
        text_bytes = 0
    elif pairs:
        pairs = measure_agreement(ensemble, data, pairs, progress)
    timed = time_forwards(ensemble, data, progress)
    costs = tuple(ForwardCost.of(name, forwards) for name, forwards in zip(ensemble.names, timed, strict=True))
    speeds = predict_speeds(ensemble, ensemble.weights, timed)
    possible = {item.name for item in inspection.possibilities if item.kind == "method" and item.possible}
    methods = list(dict.fromkeys(speed.method for speed in speeds))
    if inspection.rule is not None:
        methods.remove("mixture")  # it samples the average only
        speeds = tuple(speed for speed in speeds if speed.method != "mixture")
    long = sum(2 * _TOKENS / speed.predicted for speed in speeds) > _SECONDS
    # In the unit `byte`, runs count bytes, and predictions count tokens.
    if possible >= set(methods) and not long and not ensemble.unit.traits.counts_bytes:
        plan = BenchPlan(_TOKENS, repeats=1, prompt=question, methods=methods)
        report = bench(ensemble, plan, options=options, progress=progress)
        measured = {(run.method, run.members): run.tokens_per_second for run in report.runs}
        speeds = tuple(replace(speed, measured=measured.get((speed.method, speed.members))) for speed in speeds)
    rule = inspection.rule
    if rule is not None and not long:
        rule = measure_rule(ensemble, rule, question, chosen)
    return replace(
        inspection, text_bytes=text_bytes, unmeasured=unmeasured, pairs=pairs, costs=costs, speeds=speeds, rule=rule
    )
