"""What the gates of `router_study` look at, beside what `mixlm fit --router` offers; and why each of it is allowed.

Weights must be a function of the text: then the mixture samples from the average. So they may follow from the text,
from a member that runs at every position, and from members that run at positions that the text alone decides. They may
not follow from which member wrote what, nor from a member that ran only because its coin fell.

`history`: how well each member predicted the text so far. What a member gives to the tokens of the past is a function
of the text: its tokens of it, and a forward. It is not known where the member has not caught up, and where it has
depends on the coins. So every member reads the text whenever that passes a multiple of `block` bytes, whoever wrote it,
and these numbers change there and only there. That is a forward of a block's tokens, about as long as one of a single
token, in those positions where the member does not run anyway: `refreshes` counts them, and the study adds them to the
forwards. With a block of 1 every member runs at every position, which is what `conventional` costs. The prompt is read
by every member before the first token, so its bits per byte are known too.
`copies`: how long a stretch of the passage repeats itself just here, and what followed it: the text alone.
`shapes`: of which kind the likely tokens of the observed member are: that member runs at every position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mixlm.core.sampling import softmax
from mixlm.routing.gate import Array
from mixlm.routing.gate_router import top_k_features
from mixlm.routing.given_text import segments_by_passage
from mixlm.scoring.scores import Scores, context_features
from mixlm.types import Floats

LENGTHS = np.array([16.0, 64.0, 256.0, 1024.0, 4096.0])  # bytes after which the past counts 1/e
_FLOOR = -20.0  # of a log-probability
_KEY = 5  # bytes that a repeated stretch has at least
_LONGEST = 64
_KINDS = 10  # of tokens, and of what follows a repeated stretch
Kinds = npt.NDArray[np.int64]


def known_until(scores: Scores, block: int) -> npt.NDArray[np.int64]:
    """Return up to where every member has read a passage in front of each segment: bytes after its prompt."""
    until = np.empty(len(scores.starts), dtype=np.int64)
    for segments in segments_by_passage(scores.passage_starts):
        begin = int(scores.starts[segments].min())
        until[segments] = (scores.starts[segments] - begin) // block * block
    return until


def refreshes(scores: Scores, block: int) -> float:
    """Return in which share of the positions every member reads the text up to here."""
    until = known_until(scores, block)
    later = (np.diff(until) != 0) & (np.diff(scores.passage_starts) == 0)
    return float(later.mean()) if len(later) else 0.0


def decayed_sums(scores: Scores, block: int) -> Floats:
    """Return `Σ exp(-age / length)` × log-probability of the past segments: float64 (segments, LENGTHS, members + 1).

    Of each member over the members' mean, and last that mean itself.
    """
    until = known_until(scores, block)
    clipped = np.maximum(scores.logprobs, _FLOOR)
    mean = clipped.mean(axis=1, keepdims=True)
    values = np.hstack([clipped - mean, mean])
    out = np.empty((len(values), len(LENGTHS), values.shape[1]))
    for segments in segments_by_passage(scores.passage_starts):
        ends = scores.ends[segments] - int(scores.starts[segments].min())
        factors = np.exp(-np.diff(ends, prepend=0)[:, None] / LENGTHS)[:, :, None]
        sums = np.zeros((len(segments) + 1, *out.shape[1:]))
        for place, segment in enumerate(segments):
            sums[place + 1] = sums[place] * factors[place] + values[segment]
        count = np.searchsorted(ends, until[segments], side="right")
        age = until[segments] - np.where(count > 0, ends[np.maximum(count - 1, 0)], 0)
        out[segments] = sums[count] * np.exp(-age[:, None] / LENGTHS)[:, :, None]
    return out


def history(scores: Scores, block: int) -> Array:
    """Return how well each member predicted what is known of the past: float32 (segments, n).

    The sums of `decayed_sums`, so that a linear gate can be a posterior with any decay; the same by the byte; and the
    bits per byte of the prompt.
    """
    sums = decayed_sums(scores, block)
    covered = np.minimum(known_until(scores, block)[:, None] + 1.0, LENGTHS)[:, :, None]
    prompt = scores.prompt_bits - scores.prompt_bits.mean(axis=1, keepdims=True)
    count = len(sums)
    parts = [sums.reshape(count, -1), (sums / covered).reshape(count, -1), np.clip(prompt, -20.0, 20.0)]
    return np.hstack(parts).astype(np.float32)


def posterior(sums: Floats, weights: Floats, length: int, power: float) -> Floats:
    """Return `λ_i Π p_i(past)^power` with a decay, normalised: float64 (segments, members).

    sums: `decayed_sums`. length: an index of LENGTHS.
    """
    return softmax(np.log(np.maximum(weights, 1e-9)) + power * sums[:, length, :-1])


def copies(scores: Scores) -> Array:
    """Return how long a stretch of the passage repeats itself in front of each segment, and what followed it."""
    out = np.zeros((len(scores.starts), _KINDS + 4), dtype=np.float32)
    for segments in segments_by_passage(scores.passage_starts):
        begin = int(scores.passage_starts[segments[0]])
        text = scores.text[begin : int(scores.starts[segments].max())]
        latest: dict[bytes, int] = {}  # where each stretch of _KEY bytes ended last
        noted = _KEY
        for segment in segments:
            place = int(scores.starts[segment]) - begin
            for end in range(noted, place):
                latest[text[end - _KEY : end]] = end
            noted = max(noted, place)
            match = latest.get(text[place - _KEY : place]) if place >= _KEY else None
            if match is None:
                continue
            length = _KEY
            while length < min(match, _LONGEST) and text[match - length - 1] == text[place - length - 1]:
                length += 1
            # What followed it, as far as that lies in front of this place.
            out[segment, kind(text[match : min(match + 4, place)])] = 1.0
            out[segment, _KINDS:] = np.log(length), length >= 8, length >= 16, length >= 32
    return out


def kind(token: bytes) -> int:
    """Return the kind of a token by the way it begins."""
    if not token:
        return 0
    first = token[:1]
    if first == b"\n":
        return 1
    if first == b" ":
        rest = token[1:2]
        if not rest or rest.isspace():
            return 2
        return 3 if rest.islower() else 4 if rest.isupper() else 5
    if first.isalpha():
        return 6 if first.islower() else 7
    return 8 if first.isdigit() else 9


def token_kinds(tokens: Sequence[bytes]) -> Kinds:
    """Return the kind of each token of a vocabulary, times 100, plus its bytes up to 20: int64 (tokens,)."""
    return np.array([kind(token) * 100 + min(len(token), 20) for token in tokens], dtype=np.int64)


def shapes(scores: Scores, kinds: Kinds) -> Array:
    """Return which kinds of tokens the observed member expects, and how long ones: float32 (segments, _KINDS + 2)."""
    observed = scores.observed
    if observed is None:
        raise ValueError("these scores hold no observations")
    probabilities = np.where(observed.ids >= 0, np.exp(observed.logprobs), 0.0)
    codes = kinds[np.clip(observed.ids, 0, len(kinds) - 1)]
    out = np.empty((len(codes), _KINDS + 2), dtype=np.float32)
    for number in range(_KINDS):
        out[:, number] = np.where(codes // 100 == number, probabilities, 0.0).sum(axis=1)
    out[:, -2] = (codes % 100 * probabilities).sum(axis=1)
    out[:, -1] = codes[:, 0] % 100
    return out


def stack(scores: Scores, groups: Sequence[str], block: int, kinds: Kinds) -> Array:
    """Return the inputs of a gate in front of each segment, float32 (segments, inputs)."""
    observed = scores.observed
    parts: list[npt.NDArray[np.floating]] = []
    for group in groups:
        if group == "text":
            parts.append(context_features(scores))
        elif group == "history":
            parts.append(history(scores, block))
        elif group == "copies":
            parts.append(copies(scores))
        elif group == "shapes":
            parts.append(shapes(scores, kinds))
        elif observed is not None and group == "top_k":
            parts.append(top_k_features(observed.logprobs))
        elif observed is not None and observed.hidden is not None and group == "hidden":
            parts.append(observed.hidden)
        else:
            raise ValueError(f"these scores hold nothing for {group}")
    return np.hstack([part.astype(np.float32) for part in parts])
