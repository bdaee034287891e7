"""What a forward of each member takes, and the expected seconds of a token by each method.

A forward of q tokens takes c·(1 + s·(q - 1)) seconds: at these lengths the weights are what has to be read, and a
further token costs little. With weights λ, a token takes

    single        c_i
    conventional  Σ_i c_i
    mixture       Σ_i λ_i c_i (1 + s_i (1/λ_i - 1)): member i runs every 1/λ_i tokens, and catches up with as many

With the draft d and acceptance rate β, a block of m verified positions of `speculative` yields
(1 - β^(m+1)) / (1 - β) / (1 - λ_d) tokens, for (m + 1) / (1 - λ_d) - 1 forwards of the draft and one forward of each
member that has a position in it. A block of m proposals of greedy decoding yields (1 - β^(m+1)) / (1 - β) tokens, for
m + 1 forwards of the draft, whose distribution the last token needs too, and one of m + 1 tokens by each other member.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np

from mixlm.engines.requests import Forward
from mixlm.generation.sequence import SpeculationStats
from mixlm.types import Floats

BLOCKS = (1, 2, 3, 4, 6, 8)  # lengths of blocks that plans may have
MIN_GAIN = 0.97  # a plan must be this much cheaper than one without drafts, or its forwards are not worth the variance
TRIAL_INTERVAL = 64  # steps after which plans are estimated with at least the acceptance rate of a trial
_TRIAL_ACCEPTANCE = 0.9
_DEFAULT_SLOPE = 0.02  # of a further token, until forwards of several lengths have been seen
_WINDOW = 64  # forwards, the latest of each member
_MAX_TOKENS = 16  # longer forwards are prefills and tell little about decoding
_MIN_FORWARDS = 4  # of a length, below which they say nothing


@dataclass(frozen=True)
class ForwardCosts:
    """c in seconds and s of each member, float64 (members,); c is NaN where it is not known.

    batch_keys: members of equal ones run in one forward; () for none.
    """

    seconds: Floats
    slopes: Floats
    batch_keys: Sequence[Hashable] = ()

    def __call__(self, member: int, tokens: float = 1) -> float:
        """Return the seconds of a forward of a member over so many tokens."""
        return float(self.seconds[member] * (1 + self.slopes[member] * (tokens - 1)))

    def together(self, members: Sequence[int], tokens: float = 1, chances: Sequence[float] | None = None) -> float:
        """Return the seconds of one forward of each of several members; chances: with which each of them runs."""
        by_key: dict[Hashable, float] = {}
        for member, chance in zip(members, chances or [1.0] * len(members), strict=True):
            key = self.batch_keys[member] if self.batch_keys else member
            by_key[key] = max(chance * self(member, tokens), by_key.get(key, 0.0))
        return sum(by_key.values())


class DraftPlan(NamedTuple):
    """The member that drafts, how many proposals of a block are verified, and the share of them that is accepted."""

    member: int
    block: int
    acceptance: float


def smoothed_acceptance(stats: SpeculationStats, *, is_trial: bool) -> float:
    """Return a draft's acceptance rate so far, smoothed towards that of a trial."""
    measured = (stats.accepted + 4 * _TRIAL_ACCEPTANCE) / (stats.drafted + 4)
    return max(measured, _TRIAL_ACCEPTANCE) if is_trial else measured


class ForwardCostEstimator:
    """Estimates what a forward of each member takes from its own forwards; from the size of its weights before any.

    Args:
        forwards: Returns each member's forwards so far.
        sizes: Bytes of each member's weights.
        batch_keys: Members of equal ones are one model, and their forwards take equally long; () for none.
    """

    def __init__(
        self,
        forwards: Callable[[], Sequence[Sequence[Forward]]],
        sizes: Sequence[int],
        batch_keys: Sequence[Hashable] = (),
    ) -> None:
        self._forwards = forwards
        self._sizes = [max(size, 1) for size in sizes]
        self._batch_keys = batch_keys or range(len(sizes))
        self._slopes = dict.fromkeys(self._batch_keys, _DEFAULT_SLOPE)  # the latest that was measured

    def estimate(self) -> ForwardCosts:
        """Return the costs as of now. Before any forward, only their ratios mean something."""
        by_key: dict[Hashable, list[Forward]] = {key: [] for key in self._batch_keys}
        for key, log in zip(self._batch_keys, self._forwards(), strict=True):
            by_key[key] += (forward for forward in log[-_WINDOW:] if _is_decoding(forward))
        logs = [by_key[key] for key in self._batch_keys]
        self._slopes |= {key: slope for key, log in by_key.items() if (slope := _median_slope(log)) is not None}
        slopes = np.array([self._slopes[key] for key in self._batch_keys])
        measured = [
            median(forward.seconds / (1 + slope * (forward.tokens - 1)) for forward in log) if log else np.nan
            for log, slope in zip(logs, slopes, strict=True)
        ]
        seconds, sizes = np.array(measured, dtype=np.float64), np.array(self._sizes)
        known = np.isfinite(seconds)
        rate = np.median(seconds[known] / sizes[known]) if known.any() else 1.0
        return ForwardCosts(np.where(known, seconds, rate * sizes), slopes, self._batch_keys)


def fit_forward_costs(logs: Sequence[Sequence[Forward]]) -> ForwardCosts:
    """Fit c and s to all forwards of a finished run, of each member; c is NaN where none ran one token alone."""
    pairs = [_fit(log) for log in logs]
    return ForwardCosts(np.array([seconds for seconds, _ in pairs]), np.array([slope for _, slope in pairs]))


def _fit(log: Sequence[Forward]) -> tuple[float, float]:
    forwards = [forward for forward in log if _is_decoding(forward) and forward.batch_size == 1]
    single = [forward.seconds for forward in forwards if forward.tokens == 1]
    longer = [forward for forward in forwards if forward.tokens > 1]
    if not single:
        return float("nan"), _DEFAULT_SLOPE
    base = median(single)
    if len(longer) < _MIN_FORWARDS or base <= 0:
        return base, _DEFAULT_SLOPE
    # Least squares through c: long forwards say most about what a further token costs. Of each length the median, since
    # the first of a length may take many times as long (on a GPU, until its graph is captured).
    lengths, counts = np.unique([forward.tokens for forward in longer], return_counts=True)
    relative = np.array([median(f.seconds for f in longer if f.tokens == length) / base - 1 for length in lengths])
    further = lengths - 1.0
    return base, float(np.clip((counts * further * relative).sum() / (counts * further**2).sum(), 0.0, 1.0))


def _is_decoding(forward: Forward) -> bool:
    return forward.cached > 0 and forward.tokens <= _MAX_TOKENS


def _median_slope(log: Sequence[Forward]) -> float | None:
    """Return s by the median of forwards of several tokens: it follows a machine whose speed changes. None of few."""
    single = [forward.seconds for forward in log if forward.tokens == 1]
    longer = [forward for forward in log if forward.tokens > 1]
    if len(single) < _MIN_FORWARDS or len(longer) < _MIN_FORWARDS:
        return None
    base = median(single)
    slopes = [(forward.seconds / base - 1) / (forward.tokens - 1) for forward in longer]
    return float(np.clip(median(slopes), 0.0, 1.0))


def conventional_seconds(weights: Floats, costs: ForwardCosts) -> float:
    """Return the expected seconds of a token by `conventional`: one forward of every member that has weight."""
    return sum(costs(i) for i, weight in enumerate(weights) if weight > 0)


def mixture_seconds(weights: Floats, costs: ForwardCosts) -> float:
    """Return the expected seconds of a token by `mixture`: a member of weight λ catches up with 1/λ tokens."""
    return sum(float(weight) * costs(i, 1 / float(weight)) for i, weight in enumerate(weights) if weight > 0)


def speculative_seconds(weights: Floats, costs: ForwardCosts, plan: DraftPlan) -> float:
    """Return the expected seconds of a token by `speculative`."""
    member, block, _ = plan
    others = 1 - weights[member]
    if others <= 0:
        return costs(member)
    tokens = _expected_accepted(plan) / others
    length = (block + 1) / others
    seconds = (length - 1) * costs(member)
    for i, weight in enumerate(weights):
        if i != member and weight > 0:
            runs = 1 - (1 - weight / others) ** (block + 1)
            # What it catches up with: its part of this block's text, and the blocks in which it did not run.
            seconds += runs * costs(i, tokens / runs + length - tokens)
    return float(seconds / tokens)


def drafted_greedy_seconds(weights: Floats, costs: ForwardCosts, plan: DraftPlan) -> float:
    """Return the expected seconds of a token by `greedy` with a member as the draft."""
    seconds = (plan.block + 1) * costs(plan.member)
    for i, weight in enumerate(weights):
        if i != plan.member and weight > 0:
            seconds += costs(i, plan.block + 1)
    return float(seconds / _expected_accepted(plan))


def layered_seconds(members: Sequence[int], first: Floats, decided: Floats, costs: ForwardCosts) -> float:
    """Return the expected seconds of a token by `layered` without drafts.

    Args:
        members: Those that take part.
        first: The probability that each of them runs first, float64 (members,).
        decided: The share of such positions that it decides alone, float64 (members,); 0 everywhere for a rule that
            needs all members, which then run at once.
        costs: Of forwards.
    """
    if not decided.any():
        return costs.together(members)
    seconds = 0.0
    for member, share, stops in zip(members, first.tolist(), decided.tolist(), strict=True):
        rest = costs.together([other for other in members if other != member])
        seconds += share * (costs(member) + (1 - stops) * rest)
    return seconds


def layered_drafted_seconds(members: Sequence[int], costs: ForwardCosts, plan: DraftPlan, decided: float) -> float:
    """Return the expected seconds of a token where a member drafts that decides a share of the positions alone.

    A block has (m + 1) / (1 - decided) positions, of which all but the undecided need neither a guess nor a
    verification; the draft runs at each, every other member once.
    """
    undecided = max(1 - decided, 0.03)
    positions, tokens = (plan.block + 1) / undecided, _expected_accepted(plan) / undecided
    others = [member for member in members if member != plan.member]
    return (positions * costs(plan.member) + costs.together(others, positions)) / tokens


def layered_lookup_seconds(
    members: Sequence[int], first: Floats, decided: Floats, costs: ForwardCosts, plan: DraftPlan
) -> float:
    """Return the expected seconds of a token where proposals of a plan that cost nothing are verified, by `layered`.

    A member runs over all the positions of a block where one of them needs it. Arguments as in `layered_seconds`.
    """
    needed = first + first @ (1 - decided) - first * (1 - decided)
    chances = (1 - (1 - needed) ** (plan.block + 1)).tolist()
    return costs.together(members, plan.block + 1, chances) / _expected_accepted(plan)


def _expected_accepted(plan: DraftPlan) -> float:
    """Return the expected symbols of a block: the accepted proposals, and the one after them."""
    return sum(plan.acceptance**count for count in range(plan.block + 1))
