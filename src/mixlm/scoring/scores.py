"""Scored text: the log-probability of each part under each member, and what follows from that without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mixlm.core.mixing import mixture_logprobs, segment_responsibilities
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.routing import Router
from mixlm.routing.base import observed_by
from mixlm.routing.given_text import features_along, segments_by_passage, weights_along
from mixlm.routing.observation import ObservedStates
from mixlm.scoring.passages import Passage
from mixlm.tokenization.segments import Offsets, segment_strings
from mixlm.types import Floats

_BY_SEGMENT = ("starts", "ends", "passage_starts", "logprobs", "prompt_bits")
# How far from the requested share, as a share of all bytes, a text may be split to keep its passages whole.
_TOLERANCE = 0.1


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of a text's segments under each member.

    Attributes:
        names: The members'.
        unit: "token" where segments are shared tokens, "word" or "byte" in these units, otherwise "segment".
        text: UTF-8; in front of a passage that has a prompt, the prompt, which is not scored.
        starts: Where each segment begins in `text`, int64 (segments,).
        ends: Where it ends, int64 (segments,). A segment of no bytes after an answer is its end-of-text.
        passage_starts: Where the passage of each segment begins, prompt included, int64 (segments,).
        logprobs: Natural log-probability of each segment under each member given all of its passage before it, float64
            (segments, members).
        prompt_bits: Bits per byte of the prompt in front of each segment's passage under each member, template
            included; 0 where there is no prompt, float64 (segments, members).
        seconds: Time the members took.
        observed: What a router observes of one member before each segment, where that was scored too.
    """

    names: tuple[str, ...]
    unit: str
    text: bytes
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    passage_starts: npt.NDArray[np.int64]
    logprobs: Floats
    prompt_bits: Floats
    seconds: float = 0.0
    observed: ObservedStates | None = None

    @classmethod
    def of_passage(
        cls, names: tuple[str, ...], unit: str, passage: Passage, starts: Offsets, logprobs: Floats, prompt_bits: Floats
    ) -> Scores:
        """Return the scores of one passage. starts: where its segments begin in its data. prompt_bits: (members,)."""
        before = len(passage.prompt)
        return cls(
            names,
            unit,
            passage.prompt + passage.data,
            starts + before,
            np.append(starts[1:], len(passage.data)) + before,
            np.zeros(len(starts), dtype=np.int64),
            logprobs,
            np.tile(prompt_bits, (len(starts), 1)),
        )

    @property
    def size(self) -> int:
        """Number of bytes in all segments."""
        return int((self.ends - self.starts).sum())

    @property
    def is_divisible(self) -> bool:
        """Whether a part can be held out: at least two segments have bytes."""
        return int(np.count_nonzero(self.ends > self.starts)) > 1

    @property
    def passages(self) -> int:
        """Number of passages that the segments lie in."""
        return len(np.unique(self.passage_starts))

    def mixture(self, weights: Floats) -> Floats:
        """Return the mixture's log-probability of each segment. weights: (members,) or (segments, members)."""
        return mixture_logprobs(self.logprobs, weights)

    def responsibilities(self, weights: Floats) -> Floats:
        """Return the probability, given the text, that each member generated each segment: (segments, members).

        A segment that no member can generate says nothing about them, and leaves them their weights.
        """
        return segment_responsibilities(self.logprobs, weights)

    def bits_per_byte(self, logprobs: Floats) -> float:
        """Return bits per byte of the text for log-probabilities of its segments, (segments,)."""
        return float(-logprobs.sum() / np.log(2) / self.size)

    def select(self, segments: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Scores:
        """Return the scores of some of the segments, by mask or by index. The text stays whole.

        Seconds are divided by bytes.
        """
        selected = replace(self, **{name: getattr(self, name)[segments] for name in _BY_SEGMENT})
        if self.observed is not None:
            selected = replace(selected, observed=self.observed.select(segments))
        return replace(selected, seconds=self.seconds * selected.size / max(self.size, 1))

    def strings(self) -> list[str]:
        """Return the text of each segment, as `segment_strings` decodes it."""
        return segment_strings(self.text, self.starts, self.ends)

    def table(self, weights: Floats) -> list[dict[str, object]]:
        """Return a row for each segment: text, the mixture's and each member's log-probability, responsibilities."""
        mixture, shares = self.mixture(weights), self.responsibilities(weights)
        return [
            {
                "text": text,
                "logprob": float(mixture[segment]),
                "members": dict(zip(self.names, self.logprobs[segment].tolist(), strict=True)),
                "responsibilities": dict(zip(self.names, shares[segment].tolist(), strict=True)),
            }
            for segment, text in enumerate(self.strings())
        ]


def concatenate(scores: Sequence[Scores]) -> Scores:
    """Return several texts that were scored by the same members as one."""
    first = scores[0]
    if any(part.names != first.names for part in scores):
        raise ConfigError("texts that were scored by different members cannot be joined")
    text_starts = np.cumsum([0, *(len(part.text) for part in scores)])[:-1]
    unit = first.unit if all(part.unit == first.unit for part in scores) else "segment"
    offsets = {
        name: np.concatenate([getattr(part, name) + start for part, start in zip(scores, text_starts, strict=True)])
        for name in ("starts", "ends", "passage_starts")
    }
    tables = {name: np.concatenate([getattr(part, name) for part in scores]) for name in ("logprobs", "prompt_bits")}
    text, seconds = b"".join(part.text for part in scores), sum(part.seconds for part in scores)
    observed = [part.observed for part in scores if part.observed is not None]
    states = ObservedStates.concatenate(observed) if len(observed) == len(scores) else None
    return Scores(first.names, unit, text, **offsets, **tables, seconds=seconds, observed=states)


def split_holdout(scores: Scores, holdout: float) -> tuple[Scores, Scores]:
    """Split scored text into a part to fit and a last part to hold out.

    The text is split between passages where one ends near the requested share, otherwise between segments: the last
    part may depend on the text before it, but is never fitted to.

    Args:
        scores: The whole text.
        holdout: The last part's share of its bytes, between 0 and 1.

    Raises:
        ConfigError: The share is out of range, or the text is a single segment.
    """
    if not 0 < holdout < 1:
        raise ConfigError(f"the share to hold out is {holdout}; it must lie between 0 and 1")
    if not scores.is_divisible:
        raise ConfigError("the text is a single segment, and nothing of it can be held out", "give a longer text")
    share_before = np.cumsum(scores.ends - scores.starts)[:-1] / scores.size
    has_both = (share_before > 0) & (share_before < 1)  # an end of a text has no bytes
    distance = np.where(has_both, np.abs(share_before - (1 - holdout)), np.inf)
    between_passages = np.diff(scores.passage_starts) > 0
    near = between_passages & (distance <= _TOLERANCE)
    cut = int(np.argmin(np.where(near, distance, np.inf) if near.any() else distance)) + 1
    return scores.select(np.arange(cut)), scores.select(np.arange(cut, len(scores.ends)))


def with_leading_prompts(scores: Scores, size: int) -> Scores:
    """Return scores in which the first bytes of every passage without a prompt are its prompt, and no longer scored.

    What the members scored there becomes the prompt's bits per byte. A passage whose first segment is longer stays as
    it is.

    Args:
        scores: The whole text.
        size: Bytes of a prompt, at most half of a passage, up to the last common boundary.
    """
    remaining = np.ones(len(scores.ends), dtype=np.bool_)
    prompt_bits = scores.prompt_bits.copy()
    for segments in segments_by_passage(scores.passage_starts):
        begin, end = int(scores.passage_starts[segments[0]]), int(scores.ends[segments].max())
        prompt = segments[scores.ends[segments] - begin <= min(size, (end - begin) // 2)]
        if int(scores.starts[segments].min()) > begin or not prompt.size:
            continue
        remaining[prompt] = False
        prompt_bytes = int(scores.ends[prompt].max()) - begin
        prompt_bits[segments] = -scores.logprobs[prompt].sum(axis=0) / np.log(2) / prompt_bytes
    return replace(scores, prompt_bits=prompt_bits).select(remaining)


def context_features(scores: Scores) -> Floats:
    """Return the features of the text before each segment, within its passage: float64 (segments, FEATURES)."""
    return features_along(scores.text, scores.starts, scores.passage_starts)


def router_weights(scores: Scores, router: Router) -> Floats:
    """Return the weights that a router gives before each segment: float64 (segments, members).

    The scores are those of whole passages, so that the bytes in front of a passage's first segment are its prompt.

    Raises:
        UnsupportedError: The router needs what scores do not hold.
    """
    observes, observed = observed_by(router, len(scores.names)), scores.observed
    if observes is not None and observed is not None and observed.name != scores.names[observes.member]:
        raise UnsupportedError(
            f"the router observes {scores.names[observes.member]}, and these scores hold observations of "
            f"{observed.name}",
            "score the text anew",
        )
    return weights_along(router, scores.text, scores.starts, scores.passage_starts, scores.prompt_bits, observed)
