"""Training of `a(u)` for the rule `defer`: the log-likelihood of text under deferral, maximised on its scores.

The loss of a token t is `-log(a(t) q_1(t) + (1 − Σ_u a(u) q_1(u)) q_2(t))`, and where forwards of the second member
have a price c, also `c (1 − Σ_u a(u) q_1(u))`: the second member runs with that probability. All of it is known from
the likeliest tokens of the first, outside of which `a` is 0, and from what both members give to t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixlm.core.mixing import mixture_logprobs
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.fitting.gate_trainer import GateKind, OnEpoch, train_with_validation
from mixlm.routing.base import TOP_K
from mixlm.routing.deferral import DeferralGate, deferral_features
from mixlm.routing.gate import Array, Gate
from mixlm.scoring.scores import Scores, concatenate, split_holdout
from mixlm.types import Floats, Ids

_VALIDATION = 0.25  # of each text
_STRENGTHS = tuple(np.linspace(0.05, 1.0, 20).round(2).tolist())  # of the largest probability
_START = np.array([0.5, 0.5])


def check_members(count: int, *, one_vocabulary: bool = True) -> None:
    """Raise ConfigError or UnsupportedError for members that no gate of rule defer can be trained for."""
    if count != 2:
        raise ConfigError(
            f"a gate of rule defer is for two members, and there are {count} of them",
            "name the one that is kept, and the one that is asked",
        )
    if not one_vocabulary:
        raise UnsupportedError(
            "a gate of rule defer is trained on members with one vocabulary, and these meet at few of their tokens",
            "fit its strength, without --router",
        )


@dataclass(frozen=True)
class DeferralScores:
    """What deferral from one member to another makes of scored tokens.

    Attributes:
        likely: Log-probabilities of the first member's likeliest tokens, descending, float64 (tokens, TOP_K).
        place: Which of them each token is, int64 (tokens,); -1 for none.
        logprobs: Its log-probability under both members, float64 (tokens, 2).
        size: Bytes of the text.
    """

    likely: Floats
    place: Ids
    logprobs: Floats
    size: int

    @classmethod
    def of(cls, scores: Scores) -> DeferralScores:
        """Take them from scores with observations of the first of two members.

        Raises:
            ConfigError: There are not two members, or nothing was observed of the first.
            UnsupportedError: Segments are not tokens of both.
        """
        check_members(len(scores.names), one_vocabulary=scores.unit == "token")
        observed = scores.observed
        if observed is None or observed.name != scores.names[0] or observed.mass is None or observed.following is None:
            raise ConfigError(f"these scores hold no likely tokens of {scores.names[0]}", "score the text anew")
        likely = observed.logprobs[:, :TOP_K] + np.log(observed.mass)[:, None]
        same = observed.ids[:, :TOP_K] == observed.following[:, None]
        place = np.where(same.any(axis=1), same.argmax(axis=1), -1)
        return cls(likely, place, scores.logprobs, scores.size)

    def kept(self, gate: DeferralGate) -> Floats:
        """Return how much of the first member's distribution is kept at each token, float64 (tokens,)."""
        kept: Floats = (gate.kept(self.likely) * np.exp(self.likely)).sum(axis=1)
        return kept

    def deferred(self, gate: DeferralGate) -> Floats:
        """Return the log-probability of each token under deferral, float64 (tokens,)."""
        a = gate.kept(self.likely)
        kept = np.where(self.place >= 0, a[np.arange(len(a)), np.maximum(self.place, 0)], 0.0)
        left = np.maximum(1 - (a * np.exp(self.likely)).sum(axis=1), 0.0)
        with np.errstate(divide="ignore"):
            mixed: Floats = np.logaddexp(np.log(kept) + self.logprobs[:, 0], np.log(left) + self.logprobs[:, 1])
        return mixed

    def by_top(self, strength: float) -> tuple[Floats, float]:
        """Return the log-probability of each token where all is kept of a likely enough one, and the mean kept."""
        keeps = np.exp(self.likely[:, 0]) >= strength
        return np.where(keeps, self.logprobs[:, 0], self.logprobs[:, 1]), float(keeps.mean())


@dataclass(frozen=True)
class DeferralRow:
    """One way to use two members: bits per byte, and forwards of the second member a token."""

    name: str
    bits_per_byte: float
    forwards: float


def compare(
    names: Sequence[str], train: DeferralScores, check: DeferralScores, gate: DeferralGate, weights: Floats
) -> list[DeferralRow]:
    """Return what the members alone, their average, the best threshold and the gate make of a text.

    Args:
        names: The two members'.
        train: Chooses the threshold of the largest probability.
        check: The text.
        gate: The gate.
        weights: Of the average, float64 (2,).
    """

    def row(name: str, logprobs: Floats, forwards: float) -> DeferralRow:
        return DeferralRow(name, float(-logprobs.sum() / np.log(2) / check.size), float(forwards))

    strength = max(_STRENGTHS, key=lambda strength: train.by_top(strength)[0].sum())
    by_top, kept = check.by_top(strength)
    return [
        *(row(name, check.logprobs[:, i], float(i)) for i, name in enumerate(names)),
        row("average", mixture_logprobs(check.logprobs, weights), weights[1]),
        row(f"defer, strength {strength:g}", by_top, 1 - kept),
        row("defer, gate", check.deferred(gate), 1 - check.kept(gate).mean()),
    ]


class _Deferral:
    """The bits of deferral, and the price of the second member's forwards. inputs: (tokens, TOP_K, inputs)."""

    def __init__(self, scores: DeferralScores, price: float) -> None:
        self.inputs = deferral_features(scores.likely)
        self._probabilities = np.exp(scores.likely).astype(np.float32)
        self._top = scores.logprobs.max(axis=1)
        if not np.isfinite(self._top).all():
            raise ConfigError("no member can write some token of the text, so no gate makes it likely", "leave it out")
        self._likelihood = np.exp(scores.logprobs - self._top[:, None]).astype(np.float32)
        self._place = scores.place
        self._size, self._price = scores.size, price

    def slopes(self, shares: Array, items: Ids) -> Array:
        return deferral_slopes(
            shares, self._probabilities[items], self._place[items], self._likelihood[items], self._price
        )

    def loss(self, gate: Gate) -> float:
        items = np.arange(len(self._place))
        a = gate.weights(self.inputs)[..., 0]
        left = np.maximum(1 - (a * self._probabilities).sum(axis=1), 0.0)
        own = np.where(self._place >= 0, a[items, np.maximum(self._place, 0)], 0.0)
        mixed = own * self._likelihood[:, 0] + left * self._likelihood[:, 1]
        tiny = np.finfo(np.float64).tiny
        nats = -(np.log(np.maximum(mixed, tiny)) + self._top).sum() + self._price * left.sum()
        return float(nats / np.log(2) / self._size)


def deferral_slopes(shares: Array, probabilities: Array, place: Ids, likelihood: Array, price: float) -> Array:
    """Return the gradient of the mean loss with respect to a gate's scores, (tokens, TOP_K, 2).

    Args:
        shares: The gate's, `a` and 1 − a, (tokens, TOP_K, 2).
        probabilities: Of the first member's likeliest tokens, (tokens, TOP_K).
        place: Which of them the token is, (tokens,); -1 for none.
        likelihood: The token's under both members, of any scale, (tokens, 2).
        price: Of a forward of the second member, in nats.
    """
    a, items = shares[..., 0], np.arange(len(place))
    left = np.maximum(1 - (a * probabilities).sum(axis=1), 0.0)
    among = place >= 0
    own = np.where(among, a[items, np.maximum(place, 0)], 0.0)
    total = own * likelihood[:, 0] + left * likelihood[:, 1]
    total = np.maximum(total, np.finfo(np.float32).tiny)
    slope = probabilities * (likelihood[:, 1] / total - price)[:, None]
    slope[items[among], place[among]] -= (likelihood[:, 0] / total)[among]
    slope *= a * (1 - a) / len(place)
    return np.stack([slope, -slope], axis=-1).astype(np.float32)


def train_deferral(
    scores: Sequence[Scores],
    kind: GateKind = "linear",
    *,
    price: float = 0.0,
    progress: OnEpoch | None = None,
) -> DeferralGate:
    """Train the gate that makes scored texts likely under the rule `defer`.

    Args:
        scores: Texts scored by two members with one vocabulary, with the likely tokens of the first.
        kind: A linear gate, or one with an inner layer.
        price: What a forward of the second member costs, in nats: more of it, and more is kept.
        progress: Called with the epochs so far and the bits per byte of the validation text.

    Raises:
        ConfigError, UnsupportedError: As in `DeferralScores.of`; or the texts are too short.
    """
    parts = [split_holdout(part, _VALIDATION) for part in scores if part.is_divisible]
    if not parts:
        raise ConfigError("there is too little text to train a gate", "give texts of a few kilobytes")

    def objective(part: Sequence[Scores]) -> _Deferral:
        return _Deferral(DeferralScores.of(concatenate(part)), price)

    objectives = (objective([part for part, _ in parts]), objective([part for _, part in parts]), objective(scores))
    choice = train_with_validation(objectives, _START, kind, progress=progress)
    return DeferralGate(choice.gate, scores[0].names)
