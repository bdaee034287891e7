"""Text that has been scored: what each member thinks of each part of it, and what follows from that without a model."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from mixlm.errors import ConfigError, UnsupportedError
from mixlm.routing import FixedRouter, LearnedRouter, PromptContext, PromptRouter, Router
from mixlm.routing.features import FEATURES, features
from mixlm.routing.learned import gate
from mixlm.types import Floats, Ids

_ARRAYS = ("starts", "ends", "begins", "logprobs", "prompts")
# How far from the wanted place, as a share of all bytes, a text may be cut to keep its passages whole.
_NEAR = 0.1


@dataclass(frozen=True)
class Scores:
    """What each member thinks of a text.

    text: its bytes, and of an answer also the prompt in front of it, which is not scored. starts, ends: where each
    segment lies in it, int64 (segments,). begins: where the passage of each segment begins, prompt included, int64
    (segments,). logprobs: natural log-probability of each segment under each member given all before it in its
    passage, float64 (segments, members). prompts: how well each member predicted the prompt in front of a
    segment's passage, template included, in bits per byte of the prompt, 0 where there is none, float64 (segments,
    members). unit: "token" where segments are shared tokens, else "segment". seconds: what the members took to read it.

    A segment of no bytes, behind an answer, is its end: the mass of the members' ends of text.
    """

    names: tuple[str, ...]
    unit: str
    text: bytes
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    begins: npt.NDArray[np.int64]
    logprobs: Floats
    prompts: Floats
    seconds: float = 0.0

    @property
    def size(self) -> int:
        """Bytes of all segments."""
        return int((self.ends - self.starts).sum())

    @property
    def passages(self) -> int:
        """How many passages the segments lie in."""
        return len(np.unique(self.begins))

    def mixture(self, weights: Floats) -> Floats:
        """Return the mixture's log-probability of each segment. weights: (members,) or (segments, members)."""
        out: Floats = np.logaddexp.reduce(self._joint(weights), axis=1)
        return out

    def responsibilities(self, weights: Floats) -> Floats:
        """Return the probability that each member wrote each segment, given the text: (segments, members).

        A segment that no member can write says nothing about them, and leaves them their weights.
        """
        joint, mixed = self._joint(weights), self.mixture(weights)
        possible = np.isfinite(mixed)
        out: Floats = np.array(np.broadcast_to(weights, joint.shape), dtype=np.float64)
        out[possible] = np.exp(joint[possible] - mixed[possible, None])
        return out

    def _joint(self, weights: Floats) -> Floats:
        with np.errstate(divide="ignore"):
            out: Floats = self.logprobs + np.log(weights)
        return out

    def bits_per_byte(self, logprobs: Floats) -> float:
        """Return bits per byte of the text for log-probabilities of its segments, (segments,)."""
        return float(-logprobs.sum() / np.log(2) / self.size)

    def part(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Scores:
        """Return the scores of some of the segments, by mask or by number; the text stays whole.

        Seconds are shared out by bytes.
        """
        out = replace(self, **{name: getattr(self, name)[chosen] for name in _ARRAYS})
        return replace(out, seconds=self.seconds * out.size / max(self.size, 1))

    def strings(self) -> list[str]:
        """Return the text of each segment. A character that a segment's end cuts counts to the one that completes it.

        What is no UTF-8 is shown by replacement characters.
        """
        out: list[str] = []
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        last = len(self.starts) - 1
        for at, (start, end) in enumerate(zip(self.starts, self.ends, strict=True)):
            broken_off = bool(at == last or self.starts[at + 1] != end)
            out.append(decoder.decode(self.text[start:end], broken_off))
        return out

    def table(self, weights: Floats) -> list[dict[str, object]]:
        """Return a row for each segment: text, the mixture's and each member's log-probability, responsibilities."""
        mixed, shares = self.mixture(weights), self.responsibilities(weights)
        return [
            {
                "text": text,
                "logprob": float(mixed[at]),
                "members": dict(zip(self.names, self.logprobs[at].tolist(), strict=True)),
                "responsibilities": dict(zip(self.names, shares[at].tolist(), strict=True)),
            }
            for at, text in enumerate(self.strings())
        ]

    def save(self, path: str | Path) -> None:
        """Write the scores as an npz file."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        text = np.frombuffer(self.text, dtype=np.uint8)
        with open(path, "wb") as file:
            names, unit, seconds = np.array(self.names), np.array(self.unit), np.array(self.seconds)
            np.savez(file, names=names, unit=unit, text=text, seconds=seconds, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote. Raises ConfigError when the file cannot be read or holds something else."""
        try:
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = {name: file[name] for name in _ARRAYS}
                names = tuple(str(one) for one in file["names"])
                about = {"seconds": float(file["seconds"]), **arrays}
                found = cls(names, str(file["unit"]), file["text"].tobytes(), **about)
        except OSError as error:
            raise ConfigError(f"the scores in {path} cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, EOFError, AttributeError, TypeError, BadZipFile) as error:
            raise ConfigError(f"{path} holds no scores: {error}") from error
        count = len(found.starts)
        tables = {found.logprobs.shape, found.prompts.shape}
        if tables != {(count, len(names))} or len(found.ends) != count or len(found.begins) != count:
            raise ConfigError(f"{path} holds no scores: its arrays do not fit each other")
        return found


def joined(scores: Sequence[Scores]) -> Scores:
    """Return several texts that were scored by the same members as one."""
    first = scores[0]
    if any(one.names != first.names for one in scores):
        raise ConfigError("texts that were scored by different members cannot be joined")
    offsets = np.cumsum([0, *(len(one.text) for one in scores)])[:-1]
    unit = first.unit if all(one.unit == first.unit for one in scores) else "segment"
    places = {
        name: np.concatenate([getattr(one, name) + offset for one, offset in zip(scores, offsets, strict=True)])
        for name in ("starts", "ends", "begins")
    }
    tables = {name: np.concatenate([getattr(one, name) for one in scores]) for name in ("logprobs", "prompts")}
    text, seconds = b"".join(one.text for one in scores), sum(one.seconds for one in scores)
    return Scores(first.names, unit, text, **places, **tables, seconds=seconds)


def split(scores: Scores, holdout: float) -> tuple[Scores, Scores]:
    """Split scored text into a first part, and a last part of about a share of `holdout` of its bytes.

    It is cut between passages where one ends near that place, else between segments: the last part may read what is in
    front of it, but is never fitted to. Raises ConfigError for a single segment.
    """
    if not 0 < holdout < 1:
        raise ConfigError(f"the share to hold out is {holdout}; it must lie between 0 and 1")
    if len(scores.ends) < 2:
        raise ConfigError("the text is a single segment, and nothing of it can be held out", "give a longer text")
    before = np.cumsum(scores.ends - scores.starts)[:-1] / scores.size
    distance = np.abs(before - (1 - holdout))
    between = np.diff(scores.begins) > 0
    near = between & (distance <= _NEAR)
    cut = int(np.argmin(np.where(near, distance, np.inf) if near.any() else distance)) + 1
    return scores.part(np.arange(cut)), scores.part(np.arange(cut, len(scores.ends)))


def prompted(scores: Scores, size: int) -> Scores:
    """Return scores in which the first bytes of every passage without a prompt are its prompt, and no longer scored.

    size: how many bytes, at most half of a passage, up to the last place where members meet. What a member scored there
    is how well it predicted the prompt. A passage that begins with a longer segment stays as it is.
    """
    kept = np.ones(len(scores.ends), dtype=np.bool_)
    prompts = scores.prompts.copy()
    for rows in _by_passage(scores):
        begin, end = int(scores.begins[rows[0]]), int(scores.ends[rows].max())
        inside = rows[scores.ends[rows] - begin <= min(size, (end - begin) // 2)]
        if int(scores.starts[rows].min()) > begin or not inside.size:
            continue
        kept[inside] = False
        read = int(scores.ends[inside].max()) - begin
        prompts[rows] = -scores.logprobs[inside].sum(axis=0) / np.log(2) / read
    return replace(scores, prompts=prompts).part(kept)


def context_features(scores: Scores) -> Floats:
    """Return the features of the text before each segment, within its passage: float64 (segments, FEATURES)."""
    out = np.empty((len(scores.ends), FEATURES))
    for rows in _by_passage(scores):
        begin, starts = int(scores.begins[rows[0]]), scores.starts[rows]
        out[rows] = features(scores.text[begin : int(starts.max())], starts - begin)
    return out


def router_weights(scores: Scores, router: Router) -> Floats:
    """Return the weights that a router gives for each segment: float64 (segments, members).

    The scores are those of whole passages, so that what lies between a passage's beginning and its first segment is its
    prompt. A router that asks how well the members predicted the prompt is told what they scored. Raises
    UnsupportedError for a router that needs what scores do not hold.
    """
    if isinstance(router, LearnedRouter):
        return gate(context_features(scores), router.matrix)
    out = np.empty(scores.logprobs.shape)
    for rows in _by_passage(scores):
        begin = int(scores.begins[rows[0]])
        prompt = scores.text[begin : int(scores.starts[rows].min())]
        route = router.begin(PromptContext(prompt, partial(np.copy, scores.prompts[rows[0]])))
        if isinstance(router, FixedRouter | PromptRouter):
            out[rows] = route(_Given(b""))
            continue
        for row in rows:
            out[row] = route(_Given(scores.text[begin + len(prompt) : int(scores.starts[row])]))
    return out


def _by_passage(scores: Scores) -> Iterator[npt.NDArray[np.int64]]:
    """Give the numbers of each passage's segments."""
    order = np.argsort(scores.begins, kind="stable")
    changes = np.flatnonzero(np.diff(scores.begins[order])) + 1
    yield from np.split(order, changes)


class _Given:
    """The state of a given text, as far as its bytes tell it."""

    def __init__(self, text: bytes) -> None:
        self._text = text

    def tail(self, length: int) -> bytes:
        return self._text[max(len(self._text) - length, 0) :]

    def ids(self, member: int) -> Ids:
        raise UnsupportedError("this router reads the members' tokens, which scores do not hold")

    def prompt_length(self, member: int) -> int:
        raise UnsupportedError("this router reads the members' tokens, which scores do not hold")
