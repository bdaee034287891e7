"""How likely given text is in the units `piece`, `word` and `byte`, exactly: a sum over every way to write it.

A member may cut a text into tokens in many ways, and what stands in front of a token is read canonically, whatever
tokens it was written in. So what a member says at a place depends on the place alone, and a sum over all ways is one
over places, from left to right. A member is asked at every byte, also in the middle of its tokens: at the boundaries of
its canonical tokens in one forward for all, and at the other places in forwards for several at once, each behind a
cache of its own. The weights come in afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mixlm.engines.base import Engine, LogitsRequest
from mixlm.engines.topk_only import full_distribution_error
from mixlm.errors import ConfigError
from mixlm.types import Floats, Ids, Logits
from mixlm.units.byte import ByteUnit, PrefixIndex
from mixlm.units.word import begins_word

AT_ONCE = 8  # places that are asked in one forward
_ROWS = 32  # logits that lie in memory at once


@dataclass(frozen=True)
class Reading:
    """What one member says at every place of a text of n bytes, as far as the text is concerned.

    exactly: rows of a place, where a token ends that the text goes on with there, and its probability, float64 (k, 3).
    over: rows of a place, a later one, and the probability of all tokens that agree with the text and reach at least
    there, float64 (l, 3). begins: the probability of what begins a word at each place, float64 (n + 1,). ends: that of
    end-of-text, float64 (n + 1,).
    """

    exactly: Floats
    over: Floats
    begins: Floats
    ends: Floats

    @cached_property
    def steps(self) -> list[tuple[Floats, Floats]]:
        """The rows of `exactly` and of `over` for each place, without the place."""
        cuts = np.arange(1, len(self.begins) - 1)
        parts = [np.split(one[:, 1:], np.searchsorted(one[:, 0], cuts)) for one in (self.exactly, self.over)]
        return list(zip(*parts, strict=True))

    def save(self, path: str | Path) -> None:
        """Write the reading as an npz file."""
        with open(path, "wb") as file:
            np.savez(file, exactly=self.exactly, over=self.over, begins=self.begins, ends=self.ends)

    @classmethod
    def load(cls, path: str | Path) -> Reading:
        """Read what `save` wrote. Raises ConfigError where that is not possible."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(file["exactly"], file["over"], file["begins"], file["ends"])
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ConfigError(f"{path} holds no reading: {error}") from error


class _Said:
    """What one member says at every place, while it is being asked."""

    def __init__(
        self, unit: ByteUnit, lexicon: PrefixIndex, data: bytes, progress: Callable[[int], None] | None
    ) -> None:
        self._lexicon = lexicon
        self._data = data
        self._progress = progress
        symbols = unit.symbols(0)
        self._drawn = np.flatnonzero(symbols >= 0)
        self._ranks = lexicon.ranks[symbols[self._drawn]]
        firsts = [lexicon.token_bytes(rank)[:1] for rank in range(len(lexicon) - 1)]
        # Of tokens in the order of the lexicon, end-of-text last, by whether whitespace begins a word.
        self._beginning = [np.array([*(begins_word(one, before) for one in firsts), True]) for before in (b"", b"x")]
        self.exactly: list[list[tuple[int, float]]] = [[] for _ in range(len(data) + 1)]
        self.over: list[list[tuple[int, float]]] = [[] for _ in range(len(data) + 1)]
        self.begins = np.full(len(data) + 1, np.nan)
        self.ends = np.full(len(data) + 1, np.nan)

    def take(self, place: int, logits: Logits) -> None:
        """Note what the member's logits (vocab,) at a place say of the text there."""
        own = logits[self._drawn].astype(np.float64)
        weights = np.exp(own - own.max())
        masses = np.bincount(self._ranks, weights=weights / weights.sum(), minlength=len(self._lexicon))
        rest = self._data[place:]
        self.exactly[place] = [
            (place + length, float(masses[rank])) for length, rank in self._lexicon.prefixes_of(rest)
        ]
        for length in range(1, len(rest) + 1):
            low, high = self._lexicon.with_prefix(rest[:length])
            if low == high:
                break
            self.over[place].append((place + length, float(masses[low:high].sum())))
        behind_text = begins_word(b" ", self._data[:place])
        self.begins[place] = masses[self._beginning[behind_text]].sum()
        self.ends[place] = masses[-1]
        if self._progress is not None:
            self._progress(int(np.isfinite(self.ends).sum()))

    def reading(self) -> Reading:
        """Return all of it."""
        return Reading(_rows(self.exactly), _rows(self.over), self.begins, self.ends)


def _rows(said: Sequence[Sequence[tuple[int, float]]]) -> Floats:
    rows = [(at, stop, p) for at, one in enumerate(said) for stop, p in one]
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def read(engine: Engine, before: Ids, data: bytes, progress: Callable[[int], None] | None = None) -> Reading:
    """Ask a member at every place of a text. before: what it reads in front, int64 (n,), not empty.

    progress: called with the places asked so far, of len(data) + 1. Raises UnsupportedError for an engine that does not
    tell every token's probability, PromptTooLongError for a text that is longer than the context.
    """
    if engine.top_k_limit is not None:
        raise full_distribution_error(engine, "the log-probability of a given text")
    unit = ByteUnit([engine.vocabulary], [engine.encoder])
    state = unit.initial_state([before])
    texts = [state.ids(0).copy()]
    for byte in data:
        state.append(byte)
        texts.append(state.ids(0).copy())
    said = _Said(unit, state.prefix_indexes[0], data, progress)
    whole = texts[-1]
    along = {len(ids): at for at, ids in enumerate(texts) if np.array_equal(ids, whole[: len(ids)])}
    session = engine.session()
    for start in range(len(before), len(whole) + 1, _ROWS):
        stop = min(start + _ROWS, len(whole) + 1)
        [rows] = engine.respond([(session, LogitsRequest(0, whole[: stop - 1], stop - start))])
        for length in range(start, stop):
            if length in along:
                said.take(along[length], rows[length - start])
    session.reset()
    aside = [at for at in range(len(texts)) if at not in set(along.values())]
    # Each of a few sessions goes through a part of the text, so that what it lacks is short.
    parts = [part.tolist() for part in np.array_split(np.array(aside, dtype=np.int64), AT_ONCE) if part.size]
    sessions = [engine.session() for _ in parts]
    for turn in range(max(map(len, parts), default=0)):
        now = [(one, part[turn]) for one, part in zip(sessions, parts, strict=True) if turn < len(part)]
        answers = engine.respond([(one, LogitsRequest(0, texts[at])) for one, at in now])
        for (_, at), rows in zip(now, answers, strict=True):
            said.take(at, rows[0])
    return said.reading()


def bytes_logprobs(reading: Reading, *, end: bool = False) -> Floats:
    """Return a member's log-probability of each byte of a text given those before it: float64 (n,).

    end: that the text ends behind them is the last one, (n + 1,).
    """
    n = len(reading.begins) - 1
    never = np.zeros(n + 1, dtype=np.bool_)
    reached, covered = _forward([reading], np.zeros(1), never, np.zeros((1, n + 1)), (0, n), np.zeros(1))
    last = [float(reached[n, 0] + np.log(reading.ends[n]))] if end else []
    with np.errstate(invalid="ignore"):
        out: Floats = np.minimum(np.nan_to_num(np.diff([*covered, *last]), nan=-np.inf), 0.0)
    return out


def pieces_logprobs(readings: Sequence[Reading], weights: Floats) -> Floats:
    """Return the log-probability of each byte of a text given those before it in the unit `piece`: float64 (n,).

    Whoever is drawn at a place writes one token. weights: float64 (members,), summing to 1.
    """
    n = len(readings[0].begins) - 1
    with np.errstate(divide="ignore"):
        logs = np.log(weights)
    always = np.ones(n + 1, dtype=np.bool_)
    _, covered = _forward(readings, logs, always, np.zeros((len(readings), n + 1)), (0, n), logs)
    out: Floats = np.minimum(np.diff(covered), 0.0)
    return out


def words_logprobs(
    readings: Sequence[Reading], data: bytes, weights: Floats, *, end: bool = False
) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return where words begin in a text, and the log-probability of each up to the next, by the member that begins it.

    Words are cut where one begins and no token of any member could lie across. Two words that a token could lie across
    are one here, in which the next member is drawn by the weights where no token does lie across. So `Π Σ_i λ_i P_i` is
    the mixture's probability of the text, exactly; `P_i` is what member i writes alone in every word that is one. Of
    the last word, it is that what is written begins with it; with `end`, that it ends there, and the end is a word of
    no bytes behind it. weights: float64 (members,), summing to 1. Returns int64 (words,), float64 (words, members).
    """
    n = len(data)
    begin = np.array([m > 0 and begins_word(data[m : m + 1], data[:m]) for m in range(n)] + [end])
    reaches = np.zeros(n + 1)  # where the tokens that begin in front of a place, and agree with the text, end at most
    for one in readings:
        for at, (exactly, over) in enumerate(one.steps):
            ends = [stop for stop, p in exactly if p > 0] + [stop for stop, p in over if stop == n and p > 0]
            reaches[at + 1] = max(reaches[at + 1], *ends, 0)
    sure = begin & (np.maximum.accumulate(reaches) <= np.arange(n + 1))
    cuts = [0, *np.flatnonzero(sure).tolist(), *([] if end else [n])]
    with np.errstate(divide="ignore"):
        begins = np.log([one.begins for one in readings])
        logs = np.log(weights)
    out = np.empty((len(cuts) - 1, len(readings)))
    for word, (start, stop) in enumerate(pairwise(cuts)):
        for i in range(len(readings)):
            first = np.full(len(readings), -np.inf)
            first[i] = -begins[i, start] if start else 0.0
            reached, covered = _forward(readings, logs, begin, begins, (start, stop), first)
            done = sure[stop]
            out[word, i] = np.logaddexp.reduce(reached[-1] + begins[:, stop]) if done else covered[-1]
    if end:
        with np.errstate(divide="ignore"):
            out = np.vstack([out, [np.log(one.ends[n]) - np.log(one.begins[n]) for one in readings]])
        return np.array(cuts), out
    return np.array(cuts[:-1]), out


def _forward(
    readings: Sequence[Reading],
    logs: Floats,
    begin: npt.NDArray[np.bool_],
    begins: Floats,
    places: tuple[int, int],
    first: Floats,
) -> tuple[Floats, Floats]:
    """Go through all ways to write a part of a text.

    logs: of the weights, (members,). begin: where the next member is drawn behind a symbol that ends there, (n + 1,).
    begins: the logarithms of the probabilities of what it then draws from, (members, n + 1). places: from and up to.
    first: the logarithm of what each member begins with, (members,). Returns the logarithms of the
    probabilities that a symbol of each member ends at a place, (places + 1, members), and that what is written agrees
    with the text up to there, (places + 1,).
    """
    start, stop = places
    reached = np.full((stop - start + 1, len(readings)), -np.inf)
    covered = np.full(stop - start + 1, -np.inf)
    reached[0], covered[0] = first, np.logaddexp.reduce(first)
    for place in range(start, stop):
        factor = reached[place - start]
        if begin[place] and place > start:
            factor = logs + np.logaddexp.reduce(factor + begins[:, place]) - begins[:, place]
        for i, one in enumerate(readings):
            if factor[i] == -np.inf:
                continue
            exactly, over = one.steps[place]
            for end, p in exactly:
                if end <= stop and p > 0:
                    reached[int(end) - start, i] = np.logaddexp(reached[int(end) - start, i], factor[i] + np.log(p))
            for end, p in over:
                if end <= stop and p > 0:
                    covered[int(end) - start] = np.logaddexp(covered[int(end) - start], factor[i] + np.log(p))
    return reached, covered
