"""What an ensemble of these members could gain on a text, from one scoring pass, and what it would cost.

The weights are fitted to the first half of the text and judged on the second. The oracle picks the best member of each
segment after the fact: no weights reach it, so it bounds what any router can gain.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from mixlm.fitting.likelihood import equal_weights, expectation_maximisation
from mixlm.inspection.measure import predict_speeds, time_forwards
from mixlm.scoring.scores import Scores, split_holdout
from mixlm.terminal import Progress

_HALF = 0.5
_COST_BYTES = 4000
_NO_LOSS = 1.001  # of the bits of all members, below which a member is worth dropping


@dataclass(frozen=True, slots=True)
class MemberGain:
    """One member's part: bits per byte alone, its weight, and bits per byte of the best weights without it."""

    name: str
    bits_per_byte: float
    weight: float
    without: float | None


@dataclass(frozen=True, slots=True)
class GainReport:
    """What an ensemble could gain on a text.

    Attributes:
        bytes, segments: What was judged; the weights are fitted to others.
        best_member: The one with the fewest bits per byte alone.
        equal: Bits per byte of equal weights.
        fixed: Bits per byte of the best fixed weights, fitted by EM.
        oracle: Bits per byte of the best member of each segment, which no weights reach.
        tokens_per_second: What one forward at a time predicts: of the best member alone, of the mixture with these
            weights, and of running every member.
    """

    bytes: int
    segments: int
    unit: str
    members: tuple[MemberGain, ...]
    best_member: str
    equal: float
    fixed: float
    oracle: float
    tokens_per_second: dict[str, float]

    @property
    def best(self) -> float:
        """Bits per byte of the best member alone."""
        return min(member.bits_per_byte for member in self.members)

    @property
    def least_useful(self) -> MemberGain | None:
        """The member whose absence costs the fewest bits; None of fewer than three, which leave no ensemble."""
        members = [member for member in self.members if member.without is not None]
        return min(members, key=lambda member: member.without or 0.0, default=None)

    @property
    def worth_dropping(self) -> str | None:
        """A member without which the best weights lose less than a thousandth of the bits."""
        member = self.least_useful
        if member is None or member.without is None or member.without >= _NO_LOSS * self.fixed:
            return None
        return member.name

    @property
    def gain(self) -> float:
        """How many percent fewer bits the best fixed weights need than the best member."""
        return 100 * (1 - self.fixed / self.best)

    @property
    def oracle_gain(self) -> float:
        """How many percent fewer bits the oracle needs than the best member."""
        return 100 * (1 - self.oracle / self.best)

    @property
    def cost(self) -> float | None:
        """Seconds of a token by the mixture, over those of the best member alone; None where that is not predicted."""
        speeds = self.tokens_per_second
        return speeds["single"] / speeds["mixture"] if "mixture" in speeds else None

    def as_dict(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        percent = {"gain_percent": self.gain, "oracle_percent": self.oracle_gain}
        return {**asdict(self), **percent, "cost": self.cost, "worth_dropping": self.worth_dropping}


def measure_gain(ensemble: Ensemble, scores: Scores, *, progress: Progress | None = None) -> GainReport:
    """Report what an ensemble of two members or more could gain on a text that every member has scored.

    Raises:
        ConfigError: The text is a single segment.
    """
    train, check = split_holdout(scores, _HALF)
    em = expectation_maximisation(train).weights
    alone = [check.bits_per_byte(check.logprobs[:, i]) for i in range(len(scores.names))]
    members = tuple(
        MemberGain(name, alone[i], float(em[i]), _without(train, check, i) if len(alone) > 2 else None)
        for i, name in enumerate(scores.names)
    )
    best = int(np.argmin(alone))
    estimates = predict_speeds(ensemble, em, time_forwards(ensemble, scores.text[:_COST_BYTES], progress))
    speeds = {item.method: item.predicted for item in estimates if item.method != "single"}
    speeds["single"] = estimates[best].predicted  # the members alone come first
    return GainReport(
        bytes=check.size,
        segments=len(check.ends),
        unit=check.unit,
        members=members,
        best_member=scores.names[best],
        equal=check.bits_per_byte(check.mixture(equal_weights(check))),
        fixed=check.bits_per_byte(check.mixture(em)),
        oracle=check.bits_per_byte(check.logprobs.max(axis=1)),
        tokens_per_second=speeds,
    )


def _without(train: Scores, check: Scores, member: int) -> float | None:
    """Return the bits per byte of the best weights without a member; None where the others cannot write the text."""
    rest = np.delete(np.arange(len(train.names)), member)
    names = tuple(train.names[int(i)] for i in rest)
    part = replace(train, names=names, logprobs=train.logprobs[:, rest], prompt_bits=train.prompt_bits[:, rest])
    weights = np.zeros(len(train.names))
    try:
        weights[rest] = expectation_maximisation(part).weights
    except ConfigError:
        return None
    bits = check.bits_per_byte(check.mixture(weights))
    return bits if np.isfinite(bits) else None
