"""Training of `a(u)` for the rule `defer`: the log-likelihood of text under deferral, maximised on its scores.

The loss of a token t is `-log(a(t) q_1(t) + (1 − Σ_u a(u) q_1(u)) q_2(t))`, and where forwards of the second member
have a price c, also `c (1 − Σ_u a(u) q_1(u))`: the second member runs with that probability. All of it is known from
the likeliest tokens of the first, outside of which `a` is 0, and from what both members give to t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mixlm.core.mixing import mixture_logprobs
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.fitting.gate_trainer import GateKind, Objective, train_with_validation
from mixlm.routing.base import TOP_K
from mixlm.routing.deferral import DeferralGate, deferral_features
from mixlm.scoring.scores import Scores
from mixlm.types import Floats, Ids

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

    def objective(self, price: float) -> Objective:
        """Return what a gate is trained on. price: of a forward of the second member, in nats."""
        top = self.logprobs.max(axis=1)
        if not np.isfinite(top).all():
            raise ConfigError("no member can write some token of the text, so no gate makes it likely", "leave it out")
        likelihood, probabilities = np.exp(self.logprobs - top[:, None]), np.exp(self.likely)

        def loss(shares: Floats, items: slice | Ids) -> tuple[float, Floats]:
            a, q, place = shares[..., 0], probabilities[items], self.place[items]
            first, second = likelihood[items].T
            tokens, among = np.arange(len(a)), place >= 0
            left = np.maximum(1 - (a * q).sum(axis=1), 0.0)
            kept = np.where(among, a[tokens, np.maximum(place, 0)], 0.0)
            total = np.maximum(kept * first + left * second, np.finfo(np.float64).tiny)
            slope = q * (second / total - price)[:, None]
            slope[tokens[among], place[among]] -= (first / total)[among]
            slope *= a * (1 - a)
            return float((price * left - np.log(total)).sum()), np.stack([slope, -slope], axis=-1)

        return Objective(deferral_features(self.likely), loss)

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


def train_deferral(
    scores: Sequence[Scores],
    kind: GateKind = "linear",
    *,
    price: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> DeferralGate:
    """Train the gate that makes scored texts likely under the rule `defer`.

    Args:
        scores: Texts scored by two members with one vocabulary, with the likely tokens of the first.
        kind: A linear gate, or one with an inner layer.
        price: What a forward of the second member costs, in nats: more of it, and more is kept.
        progress: Called with the trainings done, and their number.

    Raises:
        ConfigError, UnsupportedError: As in `DeferralScores.of`; or the texts are too short.
    """
    gate = train_with_validation(
        scores, lambda part: DeferralScores.of(part).objective(price), _START, kind, progress=progress
    )
    return DeferralGate(gate, scores[0].names)
