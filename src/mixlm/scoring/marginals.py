"""Exact log-probabilities of given text in the units `piece`, `word` and `byte`: sums over all tokenizations.

A member can split a text into tokens in many ways, and the text in front of a token is read canonically, whatever
tokens it was sampled in. A member's distribution at an offset therefore depends on the offset alone, and the sum over
all tokenizations is one over offsets, from left to right. A member is run at every byte, also inside its tokens: at the
boundaries of its canonical tokens in one forward for all of them, and at the other offsets in forwards for several at
once, each with a KV cache of its own. The weights come in afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from mixlm.core.sampling import softmax
from mixlm.engines.base import Engine
from mixlm.engines.requests import LogitsRequest
from mixlm.engines.topk_only import full_distribution_error
from mixlm.scoring import cache
from mixlm.types import Floats, Ids, Logits
from mixlm.units.byte import ByteState, ByteUnit
from mixlm.units.word import begins_word

SESSIONS = 8  # offsets whose logits are requested in one forward
_ROWS = 32  # rows of logits in memory at once


@dataclass(frozen=True)
class TokenMatches:
    """One member's probabilities of the tokens that match a text of n bytes, at every offset.

    token_ends: a row for each token that matches at an offset: the offset, where the token ends, and its probability,
    float64 (k, 3). prefix_masses: a row for each offset and each later one up to which some token matches: both
    offsets, and the probability of all tokens that agree with the text and reach at least that far, float64 (l, 3).
    word_start_mass: the probability at each offset of tokens that begin a word, float64 (n + 1,). end_mass: that of
    end-of-text, float64 (n + 1,).
    """

    token_ends: Floats
    prefix_masses: Floats
    word_start_mass: Floats
    end_mass: Floats

    @cached_property
    def by_offset(self) -> list[tuple[Floats, Floats]]:
        """The rows of `token_ends` and of `prefix_masses` at each offset, without the offset."""
        cuts = np.arange(1, len(self.word_start_mass) - 1)
        tables = (self.token_ends, self.prefix_masses)
        parts = [np.split(table[:, 1:], np.searchsorted(table[:, 0], cuts)) for table in tables]
        return list(zip(*parts, strict=True))


def match_tokens(
    engine: Engine, prefix: Ids, data: bytes, progress: Callable[[int], None] | None = None
) -> TokenMatches:
    """Match a member's tokens with a text at every byte offset.

    Args:
        engine: The member's.
        prefix: Its ids in front of the text, int64 (n,), not empty.
        data: The text.
        progress: Called with the number of offsets done, of len(data) + 1.

    Raises:
        UnsupportedError: The engine does not return every token's probability.
        PromptTooLongError: The text does not fit the context.
        TokenizerError: The model has no row for a token of the text.
    """
    if engine.top_k_limit is not None:
        raise full_distribution_error(engine, "the log-probability of a given text")
    unit = ByteUnit([engine.vocabulary], [engine.encoder])
    state = ByteState(unit, [prefix])
    prefixes = [state.ids(0).copy()]
    for byte in data:
        state.append(byte)
        prefixes.append(state.ids(0).copy())
    index, symbols = state.prefix_indexes[0], unit.symbols(0)
    sampled = np.flatnonzero(symbols >= 0)
    ranks = index.ranks[symbols[sampled]]
    first_bytes = [index.token_bytes(rank)[:1] for rank in range(len(index) - 1)]
    # By rank, whether a token begins a word: where whitespace does not, and where it does.
    word_starts = [np.array([*(begins_word(byte, before) for byte in first_bytes), True]) for before in (b"", b"x")]
    token_ends: list[tuple[int, int, float]] = []
    prefix_masses: list[tuple[int, int, float]] = []
    word_start_mass, end_mass = np.full(len(data) + 1, np.nan), np.full(len(data) + 1, np.nan)

    def add(offset: int, logits: Logits) -> None:
        """Add the matches at an offset from the member's logits there, (vocab,)."""
        masses = np.bincount(ranks, weights=softmax(logits[sampled]), minlength=len(index))
        rest = data[offset:]
        token_ends.extend((offset, offset + length, float(masses[rank])) for length, rank in index.prefixes_of(rest))
        for length in range(1, len(rest) + 1):
            start, stop = index.with_prefix(rest[:length])
            if start == stop:
                break
            prefix_masses.append((offset, offset + length, float(masses[start:stop].sum())))
        word_start_mass[offset] = masses[word_starts[begins_word(b" ", data[:offset])]].sum()
        end_mass[offset] = masses[-1]
        if progress is not None:
            progress(int(np.isfinite(end_mass).sum()))

    whole = prefixes[-1]
    for ids in prefixes:
        engine.vocabulary.check_rows(ids, engine.name)
    boundaries = {len(ids): offset for offset, ids in enumerate(prefixes) if np.array_equal(ids, whole[: len(ids)])}
    session = engine.session()
    for start in range(len(prefix), len(whole) + 1, _ROWS):
        stop = min(start + _ROWS, len(whole) + 1)
        [rows] = engine.respond([(session, LogitsRequest(0, whole[: stop - 1], stop - start))])
        for length in range(start, stop):
            if length in boundaries:
                add(boundaries[length], rows[length - start])
    session.reset()
    inside = [offset for offset in range(len(prefixes)) if offset not in set(boundaries.values())]
    # Each session goes through one stretch of the text, so that little is new to its KV cache at each offset.
    stretches = [part.tolist() for part in np.array_split(np.array(inside, dtype=np.int64), SESSIONS) if part.size]
    sessions = [engine.session() for _ in stretches]
    for turn in range(max(map(len, stretches), default=0)):
        batch = [
            (session, stretch[turn])
            for session, stretch in zip(sessions, stretches, strict=True)
            if turn < len(stretch)
        ]
        responses = engine.respond([(session, LogitsRequest(0, prefixes[offset])) for session, offset in batch])
        for (_, offset), rows in zip(batch, responses, strict=True):
            add(offset, rows[0])
    return TokenMatches(_table(token_ends), _table(prefix_masses), word_start_mass, end_mass)


def _table(rows: list[tuple[int, int, float]]) -> Floats:
    """Return rows in the order of their offsets, float64 (rows, 3)."""
    return np.array(sorted(rows), dtype=np.float64).reshape(-1, 3)


def cached_matches(
    engine: Engine, prefix: Ids, data: bytes, model: str | None, progress: Callable[[int], None] | None = None
) -> TokenMatches:
    """Return what `match_tokens` does, from the cache where it is known. model: the model's identity, None for none."""

    def match() -> cache.Arrays:
        return asdict(match_tokens(engine, prefix, data, progress))

    lengths = dict.fromkeys(("word_start_mass", "end_mass"), len(data) + 1)
    return TokenMatches(**cache.cached(["matches"], engine, model, [prefix.tobytes(), data], match, lengths))


def byte_logprobs(matches: TokenMatches, *, end: bool = False) -> Floats:
    """Return a member's log-probability of each byte of a text given those before it: float64 (n,).

    end: append that of end-of-text after the last byte, (n + 1,).
    """
    n = len(matches.word_start_mass) - 1
    never = np.zeros(n + 1, dtype=np.bool_)
    reached, covered = _forward([matches], np.zeros(1), never, np.zeros((1, n + 1)), (0, n), np.zeros(1))
    last = [float(reached[n, 0] + np.log(matches.end_mass[n]))] if end else []
    with np.errstate(invalid="ignore"):
        logprobs: Floats = np.minimum(np.nan_to_num(np.diff([*covered, *last]), nan=-np.inf), 0.0)
    return logprobs


def piece_logprobs(members: Sequence[TokenMatches], weights: Floats) -> Floats:
    """Return the log-probability in the unit `piece` of each byte of a text given those before it: float64 (n,).

    members: each member's matches. weights: float64 (members,), summing to 1.
    """
    n = len(members[0].word_start_mass) - 1
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights)
    always = np.ones(n + 1, dtype=np.bool_)
    _, covered = _forward(members, log_weights, always, np.zeros((len(members), n + 1)), (0, n), log_weights)
    logprobs: Floats = np.minimum(np.diff(covered), 0.0)
    return logprobs


def word_logprobs(
    members: Sequence[TokenMatches], data: bytes, weights: Floats, *, end: bool = False
) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return where the words of a text begin, and the log-probability of each, by the member that begins it.

    A word ends where the next one begins and no token of any member could lie across. Words that a token could lie
    across count as one; inside it the next member is sampled by the weights wherever no token does lie across. So
    `Π Σ_i λ_i P_i` is the mixture's probability of the text, exactly, and `P_i` is what member i assigns alone to
    every word that is a single one.

    Args:
        members: Each member's matches.
        data: The text.
        weights: float64 (members,), summing to 1.
        end: Whether the text ends there. If not, the last word's value is the probability of a word that begins with
            it; if it does, that of this word, and end-of-text follows as a word of no bytes.

    Returns:
        int64 (words,), float64 (words, members).
    """
    n = len(data)
    begin = np.array([m > 0 and begins_word(data[m : m + 1], data[:m]) for m in range(n)] + [end])
    reaches = np.zeros(n + 1)  # where tokens that begin in front of an offset, and agree with the text, end at most
    for matches in members:
        for offset, (token_ends, prefix_masses) in enumerate(matches.by_offset):
            ends = [stop for stop, mass in token_ends if mass > 0]
            ends += [stop for stop, mass in prefix_masses if stop == n and mass > 0]
            reaches[offset + 1] = max(reaches[offset + 1], *ends, 0)
    certain = begin & (np.maximum.accumulate(reaches) <= np.arange(n + 1))
    cuts = [0, *np.flatnonzero(certain).tolist(), *([] if end else [n])]
    with np.errstate(divide="ignore"):
        log_starts = np.log([matches.word_start_mass for matches in members])
        log_weights = np.log(weights)
    out = np.empty((len(cuts) - 1, len(members)))
    for word, (start, stop) in enumerate(pairwise(cuts)):
        for i in range(len(members)):
            first = np.full(len(members), -np.inf)
            first[i] = -log_starts[i, start] if start else 0.0
            reached, covered = _forward(members, log_weights, begin, log_starts, (start, stop), first)
            complete = certain[stop]
            out[word, i] = np.logaddexp.reduce(reached[-1] + log_starts[:, stop]) if complete else covered[-1]
    if end:
        with np.errstate(divide="ignore"):
            ends_row = [np.log(matches.end_mass[n]) - np.log(matches.word_start_mass[n]) for matches in members]
        return np.array(cuts), np.vstack([out, ends_row])
    return np.array(cuts[:-1]), out


def _forward(
    members: Sequence[TokenMatches],
    log_weights: Floats,
    begin: npt.NDArray[np.bool_],
    log_starts: Floats,
    span: tuple[int, int],
    first: Floats,
) -> tuple[Floats, Floats]:
    """Sum over all tokenizations of a part of a text by the forward algorithm.

    Args:
        members: Each member's matches.
        log_weights: float64 (members,).
        begin: Where the next member is sampled after a symbol that ends there, bool (n + 1,).
        log_starts: Log-probabilities of the symbols that a member then samples from, float64 (members, n + 1).
        span: The offsets where the part begins and ends.
        first: The logarithm of what each member begins with, float64 (members,).

    Returns:
        The log-probabilities that a symbol of each member ends at an offset, float64 (length + 1, members), and that
        the generated text agrees with the given one up to there, float64 (length + 1,).
    """
    start, stop = span
    reached = np.full((stop - start + 1, len(members)), -np.inf)
    covered = np.full(stop - start + 1, -np.inf)
    reached[0], covered[0] = first, np.logaddexp.reduce(first)
    for offset in range(start, stop):
        factor = reached[offset - start]
        if begin[offset] and offset > start:
            factor = log_weights + np.logaddexp.reduce(factor + log_starts[:, offset]) - log_starts[:, offset]
        for i, matches in enumerate(members):
            if factor[i] == -np.inf:
                continue
            token_ends, prefix_masses = matches.by_offset[offset]
            for end, mass in token_ends:
                if end <= stop and mass > 0:
                    row = int(end) - start
                    reached[row, i] = np.logaddexp(reached[row, i], factor[i] + np.log(mass))
            for end, mass in prefix_masses:
                if end <= stop and mass > 0:
                    row = int(end) - start
                    covered[row] = np.logaddexp(covered[row], factor[i] + np.log(mass))
    return reached, covered
