"""Log-probabilities of a raw prompt under an ensemble, as questions to its members: what `echo` tells of a prompt.

The law is that of given texts by segments (`scoring`), in every unit: members meet where all of them have a token
boundary, and a segment between two such places has the probability `Σ_i λ_i P_i(segment | before)`; with one vocabulary
that is each token's. Members are read as they are, without sampling options, and each reads the prompt as its reply
will continue it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import numpy.typing as npt

from mixlm.core.sampling import top_logprobs
from mixlm.engines.base import LogitsRequest, Request, Response
from mixlm.errors import ConfigError
from mixlm.generation.member import Member
from mixlm.routing import FixedRouter, Router
from mixlm.scoring.scores import Scores, router_weights
from mixlm.types import Candidates, Floats, Ids, Token, TopLogprob
from mixlm.units.base import Unit
from mixlm.units.word import WordUnit

# Rows of logits that are asked for at once; a large vocabulary takes 1 MB a row.
_ROWS = 64


@dataclass
class _Reading:
    """One member's prompt. first: where the text's tokens begin in it. ends: where each ends in the text, in bytes.

    logprobs: natural log-probability of each token of the text, float64 (n,); nan where nothing is in front of it.
    averages: by place of a token in the text, what the member thinks of every symbol there, float64 (symbols,).
    """

    ids: Ids
    first: int
    ends: npt.NDArray[np.int64]
    logprobs: Floats
    averages: dict[int, Floats] = field(default_factory=dict)

    @classmethod
    def of(cls, member: Member, ids: Ids, text: bytes) -> _Reading:
        """Find the text's tokens in a prompt. Raises ConfigError where they do not spell it."""
        pieces = [member.engine.vocabulary.tokens[i] for i in ids.tolist()]
        first = next((at for at, piece in enumerate(pieces) if piece), len(pieces))
        spelled = b"".join(pieces[first:])
        # Some tokenizers put a space in front of a text.
        added = spelled == b" " + text
        if not (added or spelled == text):
            raise ConfigError(
                f"the tokens of {member.name} do not spell the prompt exactly, so it has no log-probability",
                "its tokenizer changes or drops some characters; take them out of the prompt",
            )
        ends = np.maximum(np.cumsum([len(one) for one in pieces[first:]], dtype=np.int64) - added, 0)
        return cls(ids, first, ends, np.full(len(ends), np.nan))


def prompt_tokens(
    members: Sequence[Member], unit: Unit, router: Router, prompts: tuple[Sequence[Ids], bytes]
) -> Generator[list[Request], list[Response], tuple[Token, ...]]:
    """Ask members about a raw prompt, and return its segments as tokens; each member's cache then holds its own.

    prompts: each member's ids, and the text. A token's member is the one most likely to have written it; its
    alternatives are the likeliest symbols where it begins. The log-probability of a first segment with nothing in front
    of it is nan, and it has no alternatives.
    """
    text = prompts[1]
    live = (
        [i for i, weight in enumerate(router.weights) if weight > 0]
        if isinstance(router, FixedRouter)
        else range(len(members))
    )
    readings = {i: _Reading.of(members[i], prompts[0][i], text) for i in live}
    common: npt.NDArray[np.int64] = reduce(np.intersect1d, [one.ends for one in readings.values()])
    common = common[common > 0]
    for i, one in readings.items():
        places = {0, *(np.searchsorted(one.ends, common, side="right").tolist())} if members[i].top_logprobs else set()
        yield from _read(i, members[i], one, unit, places)
    starts = np.concatenate([[0], common[:-1]]).astype(np.int64)
    table = np.full((len(common), len(members)), -np.inf)
    for i, one in readings.items():
        firsts = np.searchsorted(one.ends, starts, side="right") * (starts > 0)
        table[:, i] = np.add.reduceat(one.logprobs, firsts)
    unknown = np.isnan(table).any(axis=1)
    zeros = np.zeros(len(common), dtype=np.int64)
    scores = Scores(
        tuple(one.name for one in members), unit.name, text, starts, common, zeros, np.nan_to_num(table, nan=0.0),
        np.zeros(table.shape),
    )  # fmt: skip
    weights = router_weights(scores, router)
    mixture, shares = scores.mixture(weights), scores.responsibilities(weights)
    tokens = []
    for at, (string, start, end) in enumerate(zip(scores.strings(), starts, common, strict=True)):
        others: tuple[TopLogprob, ...] = ()
        if not unknown[at] and members[0].top_logprobs:
            others = _alternatives(members, unit, weights[at], readings, int(start))
        logprob = float("nan") if unknown[at] else float(mixture[at])
        name = members[int(np.argmax(shares[at]))].name
        tokens.append(Token(string, text[start:end], name, logprob, others))
    return tuple(tokens)


def _read(
    i: int, member: Member, one: _Reading, unit: Unit, places: set[int]
) -> Generator[list[Request], list[Response], None]:
    """Let a member read its prompt in parts, to its end, and note what it thinks of the tokens."""
    columns = _columns(unit, member.symbols)
    for start in range(max(one.first, 1), len(one.ids) + 1, _ROWS):
        end = min(start + _ROWS, len(one.ids) + 1)
        # Row j is behind the first `start + j` ids. The last, behind all of them, is the reply's.
        [logits] = yield [LogitsRequest(i, one.ids[: end - 1], end - start)]
        for row, at in zip(logits, range(start, min(end, len(one.ids))), strict=False):
            values = row.astype(np.float64)
            values -= values.max()
            values -= np.log(np.exp(values).sum())
            one.logprobs[at - one.first] = values[one.ids[at]]
            if at - one.first in places:
                kept = columns >= 0
                mass = np.exp(values[kept])
                average: Floats = np.bincount(columns[kept], weights=mass, minlength=unit.end + 1).astype(np.float64)
                one.averages[at - one.first] = average


def _columns(unit: Unit, symbols: Ids) -> Ids:
    """Return the symbol of each id whoever writes it: in the unit `word` symbols say that too."""
    return unit.without_owner(symbols) if isinstance(unit, WordUnit) else symbols


def _alternatives(
    members: Sequence[Member], unit: Unit, weights: Floats, readings: dict[int, _Reading], start: int
) -> tuple[TopLogprob, ...]:
    """Return the average's likeliest symbols at a place where all members have a boundary. weights: (members,)."""
    average = np.zeros(unit.end + 1)
    for i, one in readings.items():
        at = int(np.searchsorted(one.ends, start, side="right")) if start else 0
        average += weights[i] * one.averages[at]
    symbols = np.flatnonzero(average)
    told = top_logprobs(Candidates(symbols, np.log(average[symbols])), members[0].top_logprobs)
    return tuple(TopLogprob(b"" if one == unit.end else unit.symbol_bytes(one), logprob) for one, logprob in told)
