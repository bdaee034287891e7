"""Log-probability of given text: under each member, and under their mixture.

Members with one vocabulary meet at every token, and the mixture's probability is exact: `Σ_i λ_i p_i(t | before)`.
Members with different vocabularies meet where all of them have a token boundary. Between two such places lies a
segment; its probability under the mixture is `Σ_i λ_i P_i(segment | before)`, the law of one coin a segment. That is
not the law of `piece`, whose probability of a text is a sum over all ways to write it; it is what the members'
complementarity can be read from with one forward pass a member.

Members are scored as they are, without sampling options: what is measured is the models, not a way to draw from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import numpy.typing as npt

from mixlm.engines import Engine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from mixlm.mixing import checked_weights
from mixlm.sampling import Floats

# Texts are read in passages of about this many bytes, each from the beginning of a context.
PASSAGE_BYTES = 6000
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Scores:
    """What each member thinks of a text.

    text: its bytes. starts, ends: where each segment lies in it, int64 (segments,). logprobs: natural log-probability
    of each under each member given all before it in its passage, float64 (segments, members). passages: number of
    the passage each segment lies in, int64 (segments,). unit: "token" where segments are shared tokens, else "segment".
    """

    names: tuple[str, ...]
    unit: str
    text: bytes
    ends: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    logprobs: Floats
    passages: npt.NDArray[np.int64]

    @property
    def size(self) -> int:
        """Bytes of all segments."""
        return int((self.ends - self.starts).sum())

    def mixture(self, weights: Floats) -> Floats:
        """Return the mixture's log-probability of each segment. weights: (members,) or (segments, members)."""
        with np.errstate(divide="ignore"):
            joint = self.logprobs + np.log(weights)
        top = joint.max(axis=1)
        out: Floats = top + np.log(np.exp(joint - top[:, None]).sum(axis=1))
        return out

    def responsibilities(self, weights: Floats) -> Floats:
        """Return the probability that each member wrote each segment, given the text: (segments, members)."""
        with np.errstate(divide="ignore"):
            out: Floats = np.exp(self.logprobs + np.log(weights) - self.mixture(weights)[:, None])
        return out

    def bits_per_byte(self, logprobs: Floats) -> float:
        """Return bits per byte of the text for log-probabilities of its segments, (segments,)."""
        return float(-logprobs.sum() / np.log(2) / self.size)

    def part(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Scores:
        """Return the scores of some of the segments, by mask or by number; the text stays whole."""
        return replace(
            self,
            ends=self.ends[chosen],
            starts=self.starts[chosen],
            logprobs=self.logprobs[chosen],
            passages=self.passages[chosen],
        )


def score(ensemble: Ensemble, text: str | bytes, *, progress: Progress | None = None) -> Scores:
    """Score a text under every member of an ensemble, one pass a member.

    Raises ConfigError for an empty text. progress: called with the member's name, passages read, passages.
    """
    data = text.encode() if isinstance(text, str) else text
    if not data:
        raise ConfigError("the text to score is empty")
    passages = split_passages(data)
    engines = [one.engine for one in ensemble.members]
    known: dict[int, list[tuple[npt.NDArray[np.int64], Floats]]] = {}
    for one in ensemble.members:
        if id(one.engine) in known:
            continue
        read = known[id(one.engine)] = []
        for at, passage in enumerate(passages):
            if progress is not None:
                progress(one.name, at, len(passages))
            read.append(_read(one.engine, passage))
    if progress is not None:
        progress("", len(passages), len(passages))
    ends, starts, logprobs, numbers = [], [], [], []
    offset = 0
    for at, passage in enumerate(passages):
        members = [known[id(engine)][at] for engine in engines]
        common = reduce(np.intersect1d, [bounds for bounds, _ in members])
        columns = [np.add.reduceat(lp, _first_tokens(bounds, common)) for bounds, lp in members]
        ends.append(common + offset)
        starts.append(np.concatenate([[0], common[:-1]]) + offset)
        logprobs.append(np.column_stack(columns))
        numbers.append(np.full(common.size, at))
        offset += len(passage)
    unit = "token" if ensemble.unit.name == "token" else "segment"
    return Scores(
        ensemble.names,
        unit,
        data,
        np.concatenate(ends),
        np.concatenate(starts),
        np.concatenate(logprobs),
        np.concatenate(numbers),
    )


def split_passages(data: bytes, size: int = PASSAGE_BYTES) -> list[bytes]:
    """Cut a text into passages of at most `size` bytes, at the last line end, space or character that allows it."""
    passages = []
    while len(data) > size:
        cut = max(data.rfind(b"\n", size // 2, size) + 1, 0) or data.rfind(b" ", size // 2, size)
        if cut <= 0:
            cut = size
            while cut > 1 and data[cut] & 0xC0 == 0x80:
                cut -= 1
        passages.append(data[:cut])
        data = data[cut:]
    return [*passages, data]


def _read(engine: Engine, passage: bytes) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return where a member's tokens of a passage end, in bytes, and their log-probabilities."""
    prefix = engine.prompts.prefix(engine.vocabulary.ends)
    ids = np.array([*prefix, *engine.encoder.encode(passage).ids], dtype=np.int64)
    if len(ids) > engine.context_length:
        raise ConfigError(
            f"{len(ids)} tokens of a passage are more than {engine.name}'s context of {engine.context_length}"
        )
    lengths = [len(engine.vocabulary.tokens[i]) for i in ids[len(prefix) :]]
    bounds = np.cumsum(lengths)
    if bounds[-1] != len(passage):
        raise ConfigError(
            f"the tokens of {engine.name} do not spell the text: {bounds[-1]} bytes in place of {len(passage)}",
            "its tokenizer changes or drops some characters; take them out of the text",
        )
    return bounds, engine.session().token_logprobs(ids)[len(prefix) - 1 :]


def _first_tokens(bounds: npt.NDArray[np.int64], common: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the index of the first token of each segment that ends at a common boundary."""
    last: npt.NDArray[np.int64] = np.searchsorted(bounds, common, side="left")
    return np.concatenate([[0], last[:-1] + 1])


def equal_weights(scores: Scores) -> Floats:
    """Return equal weights for the members of scored text."""
    return checked_weights(None, len(scores.names))


def table(scores: Scores, weights: Sequence[float]) -> list[dict[str, object]]:
    """Return a row for each segment: its text, each member's and the mixture's log-probability, responsibilities."""
    given = np.asarray(weights, dtype=np.float64)
    mixed, shares = scores.mixture(given), scores.responsibilities(given)
    rows: list[dict[str, object]] = []
    for at, (start, end) in enumerate(zip(scores.starts, scores.ends, strict=True)):
        rows.append(
            {
                "text": scores.text[start:end].decode(errors="replace"),
                "logprob": float(mixed[at]),
                "members": dict(zip(scores.names, scores.logprobs[at].tolist(), strict=True)),
                "responsibilities": dict(zip(scores.names, shares[at].tolist(), strict=True)),
            }
        )
    return rows
