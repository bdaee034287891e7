"""A member's transform `A_i`: from logits to the distribution that is sampled from, in a fixed order.

    mask, bias, repetition penalty, presence and frequency penalty, temperature, top-k, top-p, min-p, renormalize

It has two implementations. The dense functions take and return logits over the whole vocabulary, shape (vocab,), with
-inf for what is masked; they are the reference. `Transform` gives the same distribution as a short list of candidates
and never sorts the whole vocabulary; decoding uses it. A test keeps them equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mixlm.core import slices
from mixlm.types import (
    PLAIN_SAMPLING,
    Candidates,
    Floats,
    Ids,
    LogitBias,
    Logits,
    LogitsRow,
    Sampling,
    TopKFilter,
    TopLogprobs,
)


def top_logprobs(distribution: Candidates, count: int) -> TopLogprobs:
    """Return at most `count` of the most likely ids with their log-probabilities, in descending order."""
    if count == 0:
        return ()
    ids, logprobs = distribution
    top = largest_indices(logprobs, count)
    order = top[np.argsort(-logprobs[top], kind="stable")][:count]
    return tuple(zip(ids[order].tolist(), logprobs[order].tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class TokenHistory:
    """A member's tokens so far, as penalties need them.

    Attributes:
        seen: Distinct ids of prompt and generated text, int64.
        generated: Distinct ids of the generated text, int64 (n,).
        counts: How often each of `generated` occurs, int64 (n,).
    """

    seen: Ids
    generated: Ids
    counts: npt.NDArray[np.int64]

    @classmethod
    def from_tokens(cls, prompt: Ids, generated: Ids) -> TokenHistory:
        """Count the tokens of a prompt and of the text generated so far."""
        distinct, counts = np.unique(generated, return_counts=True)
        return cls(np.unique(np.concatenate([prompt, generated])), distinct, counts.astype(np.int64))


def apply_logit_bias(logits: Logits, bias: LogitBias) -> Logits:
    """Add each token's bias to its logit."""
    out = logits.copy()
    out[bias.ids] += bias.values
    return out


def apply_repetition_penalty(logits: Logits, seen: Ids, penalty: float) -> Logits:
    """Divide the positive and multiply the negative logits of the tokens seen (Keskar et al., 2019)."""
    out = logits.copy()
    values = out[seen]
    out[seen] = np.where(values > 0, values / penalty, values * penalty)
    return out


def apply_count_penalties(logits: Logits, history: TokenHistory, presence: float, frequency: float) -> Logits:
    """Subtract `presence` once and `frequency` per occurrence from the logits of the generated tokens."""
    out = logits.copy()
    out[history.generated] -= presence + frequency * history.counts
    return out


def apply_top_k(logits: Logits, k: int) -> Logits:
    """Keep the k largest logits, and those equal to the k-th."""
    if k >= logits.size:
        return logits
    return np.where(logits < np.partition(logits, -k)[-k], -np.inf, logits)


def apply_top_p(logits: Logits, p: float) -> Logits:
    """Keep the most likely tokens until their mass reaches p (Holtzman et al., 2020); at least one."""
    order = np.argsort(-logits, kind="stable")
    probs = softmax(logits[order].astype(np.float64))
    out = logits.copy()
    out[order[1:][np.cumsum(probs)[:-1] >= p]] = -np.inf
    return out


def apply_min_p(logits: Logits, p: float) -> Logits:
    """Keep tokens of at least p times the probability of the most likely one."""
    return np.where(logits < logits.max() + np.log(p), -np.inf, logits)


def softmax(logits: Logits) -> Floats:
    """Return exp(logits), normalised over the last axis, in float64."""
    weights: Floats = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def log_softmax(logits: Logits) -> Floats:
    """Return the logarithm of `softmax`."""
    logprobs: Floats = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    logprobs -= np.log(np.exp(logprobs).sum(axis=-1, keepdims=True))
    return logprobs


def dense_distribution(
    logits: Logits, sampling: Sampling, banned: Ids, history: TokenHistory | None = None, bias: LogitBias | None = None
) -> Floats:
    """Return the transformed distribution over the whole vocabulary, float64 (vocab,): the reference of `Transform`."""
    x: Logits = logits.astype(np.float64)
    x[banned] = -np.inf
    if bias is not None:
        x = apply_logit_bias(x, bias)
    if history is not None:
        x = apply_repetition_penalty(x, history.seen, sampling.repetition_penalty)
        x = apply_count_penalties(x, history, sampling.presence_penalty, sampling.frequency_penalty)
    x = x / sampling.temperature
    if sampling.top_k:
        x = apply_top_k(x, sampling.top_k)
    if sampling.top_p < 1:
        x = apply_top_p(x, sampling.top_p)
    if sampling.min_p > 0:
        x = apply_min_p(x, sampling.min_p)
    return softmax(x)


def largest_indices(x: Logits, k: int) -> Ids:
    """Return the indices of the k largest values and of those equal to the k-th, unsorted, without a full sort.

    The values are arranged in columns of `block`. The k-th largest of the columns' maxima is a lower bound of the k-th
    largest value, so smaller values are out. (Columns, not rows: a maximum over the first axis is vectorized.)
    """
    block = 64
    if k >= x.size:
        return np.flatnonzero(x > -np.inf)
    whole = x.size - x.size % block
    if k * block * 4 < whole:
        maxima = x[:whole].reshape(block, -1).max(axis=0)
        floor = np.partition(maxima, -k)[-k]
        shortlist = np.flatnonzero(x >= floor)
        shortlist = shortlist[x[shortlist] > -np.inf]
    else:
        shortlist = np.flatnonzero(x > -np.inf)
    if shortlist.size <= k:
        return shortlist
    values = x[shortlist]
    largest: Ids = shortlist[values >= np.partition(values, -k)[-k]]
    return largest


class Transform:
    """The transform `A_i` of one member.

    Attributes:
        sampling: The member's sampling options.
        banned: Ids that are never sampled, int64, distinct, ascending.
        bias: What is added to the logits first.
        top_k_filter: The part of the logits that the distribution depends on; None for all of them.
    """

    def __init__(self, sampling: Sampling, banned: Ids, bias: LogitBias | None = None) -> None:
        self.sampling = sampling
        self.banned = banned
        self.bias = bias
        needs_all = not sampling.top_k or sampling.has_penalties or bias is not None
        self.top_k_filter = None if needs_all else TopKFilter(sampling.top_k, banned)
        self._unbanned: Ids | None = None

    def __call__(
        self,
        logits: LogitsRow,
        history: TokenHistory | None = None,
        allowed: npt.NDArray[np.bool_] | None = None,
        *,
        normalize: bool = True,
    ) -> Candidates:
        """Return the distribution to sample from; an empty one if no allowed token has any probability.

        Args:
            logits: All logits, (vocab,), any float type, not changed; or those that `top_k_filter` keeps.
            history: The tokens so far, for penalties.
            allowed: Which ids may be sampled, bool (vocab,), in addition to `banned`; what is filtered has no others.
            normalize: Whether probabilities are to sum to 1; if not, they are in proportion to the likeliest.
        """
        options = self.sampling
        if isinstance(logits, Candidates):
            return _normalize(_truncate(*logits, options)) if logits.ids.size else logits
        x = logits
        if self.banned.size or allowed is not None:
            x = logits.copy()
            x[self.banned] = -np.inf
        if allowed is not None:
            x[~allowed] = -np.inf
        if x.max() == -np.inf:
            return Candidates(np.zeros(0, dtype=np.int64), np.zeros(0))
        if self.bias is not None:
            x = apply_logit_bias(x, self.bias)
        if history is not None and options.has_penalties:
            x = apply_repetition_penalty(x, history.seen, options.repetition_penalty)
            x = apply_count_penalties(x, history, options.presence_penalty, options.frequency_penalty)
        # A temperature keeps the order, so top-k can come first, and the rest works on few values.
        if options.top_k:
            ids = largest_indices(x, options.top_k)
            candidates = _truncate(ids, x[ids], options)
        elif options.top_p < 1:
            candidates = self._nucleus(x)
        else:
            possible = x > -np.inf
            if options.min_p > 0:
                possible &= x >= x.max() + options.temperature * np.log(options.min_p)
            ids = self._indices(possible)
            candidates = Candidates(ids, x[ids].astype(np.float64, copy=False))
            if options.temperature != 1:
                np.divide(candidates.logprobs, options.temperature, out=candidates.logprobs)
        return _normalize(candidates, proportions=not normalize)

    def _indices(self, possible: npt.NDArray[np.bool_]) -> Ids:
        """Return the indices of what is possible: the same array wherever that is all but what is banned."""
        if np.count_nonzero(possible) < possible.size - self.banned.size:
            return np.flatnonzero(possible)
        unbanned = self._unbanned
        if unbanned is None or unbanned.size + self.banned.size != possible.size:
            unbanned = self._unbanned = np.flatnonzero(possible)
        return unbanned

    def _nucleus(self, x: Logits) -> Candidates:
        """Apply top-p to a whole vocabulary: take more and more of the largest values until they hold the mass."""
        options = self.sampling
        scaled = x.astype(np.float64) / options.temperature
        total = exp_sum(scaled - scaled.max())
        count = 256
        while True:
            ids = largest_indices(x, count)
            mass = np.exp(scaled[ids] - scaled.max()).sum() / total
            if mass >= options.top_p or count >= x.size:
                return _truncate(ids, x[ids], options, share=mass)
            count *= 8


class ReportTransform(Transform):
    """The transform of a member whose engine reports its likeliest tokens alone, without truncation of its own.

    It returns a lower bound of the distribution: what is reported, without what is never sampled, in proportion.

    Args:
        banned: As of `Transform`.
        count: How many tokens are requested first.
    """

    def __init__(self, banned: Ids, count: int) -> None:
        super().__init__(PLAIN_SAMPLING, banned)
        self.top_k_filter = TopKFilter(count, np.zeros(0, dtype=np.int64), normalized=True)
        self._sampled = TopKFilter(count, banned)

    def __call__(self, logits: LogitsRow, *_: Any, **__: Any) -> Candidates:
        """Return the reported part of the distribution; its probabilities sum to less than 1."""
        assert isinstance(logits, Candidates)
        ids, logprobs = logits
        may_be = self._sampled.allows(ids)
        excluded = min(float(np.exp(logprobs[~may_be]).sum()), 1 - 1e-12)
        may_be &= logprobs > -np.inf
        return Candidates(ids[may_be], logprobs[may_be].astype(np.float64) - np.log1p(-excluded))


def _truncate(ids: Ids, logits: Logits, options: Sampling, share: float = 1.0) -> Candidates:
    """Sort candidates, which hold `share` of the mass, by probability, and truncate them by top-p and min-p."""
    values = logits.astype(np.float64) / options.temperature
    order = np.argsort(-values, kind="stable")
    ids, values = ids[order], values[order]
    keep = np.ones(ids.size, dtype=bool)
    if options.top_p < 1:
        keep[1:] = np.cumsum(softmax(values))[:-1] * share < options.top_p
    if options.min_p > 0:
        keep &= values >= values[0] + np.log(options.min_p)
    return Candidates(ids[keep], values[keep])


def _normalize(candidates: Candidates, *, proportions: bool = False) -> Candidates:
    """Normalise candidates in place, to a sum of 1 or a maximum of 1."""
    values = candidates.logprobs
    values -= values.max()
    if not proportions:
        values -= np.log(exp_sum(values))
    return candidates


def exp_sum(values: Floats) -> float:
    """Return `Σ exp(values)`."""
    return sum(float(np.exp(values[elements]).sum()) for elements in slices(values.size))
