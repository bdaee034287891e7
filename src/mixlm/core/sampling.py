"""A member's transform `A_i`: from logits to the distribution it is drawn from, in one fixed order.

    mask, bias, repetition penalty, presence and frequency penalty, temperature, top-k, top-p, min-p, renormalise

Two forms of one rule. The dense functions take and return logits over the whole vocabulary, shape (vocab,), with
-inf for what is cut; they are the reference. `Transform` gives the same distribution as a short list of candidates
and never sorts the whole vocabulary; it is what decoding uses. A test holds them together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mixlm.types import Candidates, Floats, Ids, LogitBias, Logits, LogitsRow, Sampling, TopKFilter, TopLogprobs


def top_logprobs(law: Candidates, count: int) -> TopLogprobs:
    """Return the `count` likeliest ids of a law with their log-probabilities, the likeliest first; fewer if it ends."""
    if count == 0:
        return ()
    found = largest(law.logprobs, count)
    order = found[np.argsort(-law.logprobs[found], kind="stable")][:count]
    return tuple(zip(law.ids[order].tolist(), law.logprobs[order].tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class History:
    """The member's tokens so far, for penalties: distinct ids seen anywhere, and counts of those in the reply."""

    seen: Ids
    written: Ids
    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, prompt: Ids, reply: Ids) -> History:
        """Count the tokens of a prompt and of the reply so far."""
        written, counts = np.unique(reply, return_counts=True)
        return cls(np.unique(np.concatenate([prompt, reply])), written, counts.astype(np.int64))


def biased(logits: Logits, bias: LogitBias) -> Logits:
    """Add each token's bias to its logit."""
    out = logits.copy()
    out[bias.ids] += bias.values
    return out


def repetition(logits: Logits, seen: Ids, penalty: float) -> Logits:
    """Divide the positive and multiply the negative logits of the tokens seen (Keskar et al., 2019)."""
    out = logits.copy()
    chosen = out[seen]
    out[seen] = np.where(chosen > 0, chosen / penalty, chosen * penalty)
    return out


def presence_and_frequency(logits: Logits, history: History, presence: float, frequency: float) -> Logits:
    """Subtract `presence` once and `frequency` per occurrence from the logits of the tokens of the reply."""
    out = logits.copy()
    out[history.written] -= presence + frequency * history.counts
    return out


def temperature(logits: Logits, value: float) -> Logits:
    """Divide the logits by a temperature greater than 0."""
    return logits / value


def top_k(logits: Logits, k: int) -> Logits:
    """Keep the k largest logits, and those equal to the k-th."""
    if k >= logits.size:
        return logits
    return np.where(logits < np.partition(logits, -k)[-k], -np.inf, logits)


def top_p(logits: Logits, p: float) -> Logits:
    """Keep the most likely tokens until their mass reaches p (Holtzman et al., 2020); at least one."""
    order = np.argsort(-logits, kind="stable")
    probs = softmax(logits[order].astype(np.float64))
    out = logits.copy()
    out[order[1:][np.cumsum(probs)[:-1] >= p]] = -np.inf
    return out


def min_p(logits: Logits, p: float) -> Logits:
    """Keep tokens of at least p times the probability of the most likely one."""
    return np.where(logits < logits.max() + np.log(p), -np.inf, logits)


def softmax(logits: Logits) -> Floats:
    """Return exp(logits), normalised, in float64."""
    weights: Floats = np.exp(logits.astype(np.float64) - logits.max())
    weights /= weights.sum()
    return weights


def dense(
    logits: Logits, sampling: Sampling, banned: Ids, history: History | None = None, bias: LogitBias | None = None
) -> Floats:
    """Return the transformed distribution over the whole vocabulary, float64 (vocab,): the reference of `Transform`."""
    x: Logits = logits.astype(np.float64)
    x[banned] = -np.inf
    if bias is not None:
        x = biased(x, bias)
    if history is not None:
        x = repetition(x, history.seen, sampling.repetition_penalty)
        x = presence_and_frequency(x, history, sampling.presence_penalty, sampling.frequency_penalty)
    if sampling.temperature != 1:
        x = temperature(x, sampling.temperature)
    if sampling.top_k:
        x = top_k(x, sampling.top_k)
    if sampling.top_p < 1:
        x = top_p(x, sampling.top_p)
    if sampling.min_p > 0:
        x = min_p(x, sampling.min_p)
    return softmax(x)


def largest(x: Logits, k: int) -> Ids:
    """Return the indices of the k largest values and of those equal to the k-th, unsorted, without a full sort.

    The values fall into columns of `block`; the k-th largest of the columns' maxima is a lower bound of the k-th
    largest value, so what lies below it is out. (Columns, not rows: a maximum over the first axis is vectorised.)
    """
    block = 64
    if k >= x.size:
        return np.flatnonzero(x > -np.inf)
    whole = x.size - x.size % block
    if k * block * 4 < whole:
        maxima = x[:whole].reshape(block, -1).max(axis=0)
        floor = np.partition(maxima, -k)[-k]
        short = np.flatnonzero(x >= floor)
        short = short[x[short] > -np.inf]
    else:
        short = np.flatnonzero(x > -np.inf)
    if short.size <= k:
        return short
    values = x[short]
    kept: Ids = short[values >= np.partition(values, -k)[-k]]
    return kept


class Transform:
    """`A_i` for one member: options, the ids that it may never draw (`banned`, int64, distinct), and a bias.

    cut: what of the logits the distribution depends on, None for all of them.
    """

    def __init__(self, sampling: Sampling, banned: Ids, bias: LogitBias | None = None) -> None:
        self.sampling = sampling
        self.banned = banned
        self.bias = bias
        whole = not sampling.top_k or sampling.penalises or bias is not None
        self.top_k_filter = None if whole else TopKFilter(sampling.top_k, banned)

    def __call__(
        self, logits: LogitsRow, history: History | None = None, allowed: npt.NDArray[np.bool_] | None = None
    ) -> Candidates:
        """Return the distribution to draw from; an empty one where nothing that is allowed has any probability.

        logits: (vocab,), any float, not changed; or what `cut` leaves. allowed: ids that may be drawn, (vocab,), for
        whole logits.
        """
        options = self.sampling
        if isinstance(logits, Candidates):
            return _normalised(_order(*logits, options))
        x = logits.copy()
        x[self.banned] = -np.inf
        if allowed is not None:
            x[~allowed] = -np.inf
            if x.max() == -np.inf:
                return Candidates(np.zeros(0, dtype=np.int64), np.zeros(0))
        if self.bias is not None:
            x = biased(x, self.bias)
        if history is not None and options.penalises:
            x = repetition(x, history.seen, options.repetition_penalty)
            x = presence_and_frequency(x, history, options.presence_penalty, options.frequency_penalty)
        # Dividing by a temperature keeps the order, so the cut by rank comes first and the rest works on few values.
        if options.top_k:
            ids = largest(x, options.top_k)
            kept = _order(ids, x[ids], options)
        elif options.top_p < 1:
            kept = self._nucleus(x)
        else:
            floor = x.max() + options.temperature * np.log(options.min_p) if options.min_p > 0 else -np.inf
            ids = np.flatnonzero((x >= floor) & (x > -np.inf))
            kept = Candidates(ids, x[ids].astype(np.float64) / options.temperature)
        return _normalised(kept)

    def _nucleus(self, x: Logits) -> Candidates:
        """Apply top-p to a whole vocabulary: look at ever more of the largest values until they hold the mass."""
        options = self.sampling
        scaled = x.astype(np.float64) / options.temperature
        total = np.exp(scaled - scaled.max()).sum()
        count = 256
        while True:
            ids = largest(x, count)
            mass = np.exp(scaled[ids] - scaled.max()).sum() / total
            if mass >= options.top_p or count >= x.size:
                return _order(ids, x[ids], options, share=mass)
            count *= 8


def _order(ids: Ids, logits: Logits, options: Sampling, share: float = 1.0) -> Candidates:
    """Sort candidates that hold `share` of the mass by probability, and cut them by top-p and min-p."""
    values = logits.astype(np.float64) / options.temperature
    order = np.argsort(-values, kind="stable")
    ids, values = ids[order], values[order]
    keep = np.ones(ids.size, dtype=bool)
    if options.top_p < 1:
        keep[1:] = np.cumsum(softmax(values))[:-1] * share < options.top_p
    if options.min_p > 0:
        keep &= values >= values[0] + np.log(options.min_p)
    return Candidates(ids[keep], values[keep])


def _normalised(kept: Candidates) -> Candidates:
    values = kept.logprobs - kept.logprobs.max()
    return Candidates(kept.ids, values - np.log(np.exp(values).sum()))
