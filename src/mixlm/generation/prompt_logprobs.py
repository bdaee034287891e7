"""Log-probabilities of a raw prompt under an ensemble (`echo`, `score_prompt`), as requests to its members.

Under the average, members meet where all of them have a token boundary, in every unit: a segment between two such
boundaries has the probability `Σ_i λ_i P_i(segment | before)`; with one vocabulary that is each token's. Under a
combination rule, members share a vocabulary and so the tokens of a text, each of which has the probability
`C(u | before)`. Members are scored without sampling options, and each reads the prompt as its completion will continue
it. Texts and answers are scored under a rule by the same functions, in `mixlm.scoring.rule_scores`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mixlm.core.combinations.base import Combination
from mixlm.core.mixing import mixture_logprobs, segment_responsibilities
from mixlm.core.sampling import softmax, top_logprobs
from mixlm.engines.base import Session, common_prefix
from mixlm.engines.requests import LogitsAndHidden, LogitsRequest, ScoreRequest
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation.dispatch import RequestFlow
from mixlm.generation.member import Member
from mixlm.generation.prompt import EncodedPrompt
from mixlm.generation.target import support
from mixlm.routing.base import FixedRouter, Observation, Observes, Router, observed_by
from mixlm.routing.given_text import weights_along
from mixlm.routing.observation import ObservedStates, observation
from mixlm.tokenization.segments import (
    Offsets,
    common_boundaries,
    first_tokens,
    segment_logprobs,
    segment_strings,
    token_ends,
)
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Floats, HiddenStates, Ids, Logits, Token, TopLogprob
from mixlm.units.base import Unit

# Rows of logits in one request; a large vocabulary takes 1 MB a row.
ROWS = 64
# Positions that are combined between two steps of other sequences: one of a large vocabulary takes 30 ms.
POSITIONS = 4

# Called with the index of an id, and the member's logits, (vocab,), and hidden state in front of it.
TakeRow = Callable[[int, Logits, HiddenStates | None], None]


@dataclass
class ScoredPrompt:
    """One member's prompt. first: index of the text's first token. ends: where each token ends in the text, in bytes.

    logprobs: natural log-probability of each token of the text, float64 (n,); nan where nothing is in front of it.
    probabilities: by index of a token of the text, the member's probability of every symbol there, float64 (symbols,).
    observations: by index of a token of the text, what a router observes in front of it.
    """

    ids: Ids
    first: int
    ends: Offsets
    logprobs: Floats
    probabilities: dict[int, Floats] = field(default_factory=dict)
    observations: dict[int, Observation] = field(default_factory=dict)

    @property
    def unpreceded(self) -> int:
        """How many of the text's tokens nothing is in front of: 1 where it begins the prompt."""
        return int(self.first == 0)

    @classmethod
    def of(cls, member: Member, ids: Ids, text: bytes) -> ScoredPrompt:
        """Find the text's tokens in a prompt. Raises ConfigError where they do not spell it."""
        vocabulary = member.engine.vocabulary
        pieces = [vocabulary.tokens[i] for i in ids.tolist()]
        first = next((number for number, piece in enumerate(pieces) if piece), len(pieces))
        spelled = b"".join(pieces[first:])
        # Some tokenizers add a space in front of a text.
        added = spelled == b" " + text
        if not (added or spelled == text):
            raise ConfigError(
                f"the tokens of {member.name} do not spell the prompt exactly, so it has no log-probability",
                "its tokenizer changes or drops some characters; take them out of the prompt",
            )
        ends = np.maximum(token_ends(vocabulary, ids[first:]) - added, 0)
        return cls(ids, first, ends, np.full(len(ends), np.nan))


def prompt_tokens(
    members: Sequence[Member], sessions: Sequence[Session], unit: Unit, router: Router, prompt: EncodedPrompt
) -> RequestFlow[tuple[Token, ...]]:
    """Score a raw prompt, and return its segments as tokens; afterwards each member's KV cache holds its prompt.

    A token's member is the one most likely to have generated it; its top logprobs are those of the average where it
    begins. The log-probability of a first segment with nothing in front of it is nan, and it has no top logprobs.

    Raises:
        UnsupportedError: A member's engine reports its most likely tokens only, and these are not enough.
    """
    text, count, observes = prompt.text, members[0].top_logprobs, observed_by(router, len(members))
    weighted = router.weights > 0 if isinstance(router, FixedRouter) else np.ones(len(members))
    scored = {i: ScoredPrompt.of(members[i], prompt.ids[i], text) for i in np.flatnonzero(weighted).tolist()}
    common = common_boundaries([part.ends for part in scored.values()])
    common = common[common > 0]
    firsts = {i: first_tokens(part.ends, common).tolist() for i, part in scored.items()}
    by_engine = {i: part for i, part in scored.items() if members[i].engine.top_k_limit is not None}
    for i in by_engine:
        if count or (observes is not None and observes.member == i):
            raise UnsupportedError(
                f"{members[i].name} gives the log-probability of a prompt's own tokens, and no others at each of them",
                "ask for none (top_logprobs=0), use weights that observe no member, or --engine hf (engine='hf')",
            )
    if by_engine:
        responses = yield [ScoreRequest(i, part.ids) for i, part in by_engine.items()]
        for part, logprobs in zip(by_engine.values(), responses, strict=True):
            part.logprobs[part.unpreceded :] = logprobs[part.first + part.unpreceded - 1 :]
    for i, part in scored.items():
        if i in by_engine:
            continue
        observation = observes if observes is not None and observes.member == i else None
        symbols = unit.without_owner(members[i].symbols) if count else None
        take = _keep(part, {*firsts[i]}, symbols, unit.end + 1, observation)
        hidden = observation is not None and observation.hidden
        part.logprobs[part.unpreceded :] = yield from _read(
            i, sessions[i], part.ids, part.first + part.unpreceded, take, hidden=hidden
        )
    starts = np.concatenate([[0], common[:-1]]).astype(np.int64)
    table = np.full((len(common), len(members)), -np.inf)
    for i, part in scored.items():
        table[:, i] = segment_logprobs(part.logprobs, part.ends, common)
    unknown = np.isnan(table).any(axis=1)
    table = np.nan_to_num(table, nan=0.0)
    observed = None
    if observes is not None:
        seen = scored[observes.member].observations
        observed = _stack(members[observes.member].name, [seen.get(first) for first in firsts[observes.member]])
    weights = weights_along(router, text, starts, np.zeros_like(starts), np.zeros(table.shape), observed)
    shares = segment_responsibilities(table, weights)
    tops = {}
    if count:
        for segment in np.flatnonzero(~unknown).tolist():
            rows = [part.probabilities[firsts[i][segment]] for i, part in scored.items()]
            tops[segment] = symbol_logprobs(unit, weights[segment, [*scored]] @ rows, count)
    logprobs = np.where(unknown, np.nan, mixture_logprobs(table, weights))
    return _tokens(text, common, [members[i].name for i in shares.argmax(axis=1)], logprobs, tops)


def rule_prompt_tokens(
    rule: Combination,
    taking_part: tuple[Sequence[int], Floats],
    members: Sequence[Member],
    unit: Unit,
    prompt: EncodedPrompt,
) -> RequestFlow[tuple[Token, ...]]:
    """Score a raw prompt under a rule, in a unit whose members share a vocabulary; as `prompt_tokens`.

    taking_part: the members that do, in the order of the rule's rows, and their weights, float64 (rows,). Raises
    UnsupportedError where they do not have the same tokens of the prompt.
    """
    rows, weights = taking_part
    scored = [ScoredPrompt.of(members[i], prompt.ids[i], prompt.text) for i in rows]
    begins = [part.first for part in scored]
    given = GivenText(rows, [unit.symbols(i) for i in rows], unit.end + 1, [part.ids for part in scored], begins)
    targets = given.targets([(members[i].name, members[i].engine.vocabulary) for i in rows])
    first, count = scored[0], members[0].top_logprobs
    tops: dict[int, tuple[TopLogprob, ...]] = {}

    def take(place: int, probs: Floats) -> bool:
        combined = rule.combine(probs, weights)
        with np.errstate(divide="ignore"):
            first.logprobs[place] = np.log(combined[targets[place]])
        if count:
            tops[place] = symbol_logprobs(unit, combined, count)
        return True

    yield from given.read(range(max(part.unpreceded for part in scored), len(targets)), POSITIONS, take)
    ends = first.ends[first.ends > 0]  # a space that a tokenizer adds is no segment
    firsts = first_tokens(first.ends, ends).tolist()
    tops = {segment: tops[place] for segment, place in enumerate(firsts) if place in tops}
    names = [members[rows[0]].name] * len(ends)
    return _tokens(prompt.text, ends, names, segment_logprobs(first.logprobs, first.ends, ends), tops)


def member_prompt_bits(
    members: Sequence[Member], sessions: Sequence[Session], prompts: Sequence[Ids]
) -> RequestFlow[Floats]:
    """Return how many bits each member needs for its own prompt, template included: float64 (members,).

    Raises:
        UnsupportedError: A member's engine reports its most likely tokens only.
    """
    bits = np.zeros(len(members))
    by_engine = [i for i, member in enumerate(members) if member.engine.top_k_limit is not None]
    if by_engine:
        # Or it raises what an engine says of it.
        responses = yield [ScoreRequest(i, prompts[i]) for i in by_engine]
        bits[by_engine] = [-logprobs.sum() / np.log(2) for logprobs in responses]
    for i, (session, ids) in enumerate(zip(sessions, prompts, strict=True)):
        if i not in by_engine:
            bits[i] = -(yield from _read(i, session, ids)).sum() / np.log(2)
    return bits


def _read(
    member: int, session: Session, ids: Ids, first: int = 1, take: TakeRow | None = None, *, hidden: bool = False
) -> RequestFlow[Floats]:
    """Return the log-probability of each of a member's ids from `first` on, given those before: float64 (n - first,).

    They are read in parts, to their end. take: what gets each row of logits, with the hidden states if these are
    requested.
    """
    logprobs = np.empty(max(len(ids) - first, 0))
    for start in range(first, len(ids) + 1, ROWS):
        end = min(start + ROWS, len(ids) + 1)
        # Row j is after the first `start + j` ids. The last row, after all of them, is the completion's.
        [response] = yield [LogitsRequest(member, ids[: end - 1], end - start, hidden=hidden)]
        rows, states = response if isinstance(response, LogitsAndHidden) else (response, None)
        targets = ids[start:end]
        if not len(targets):
            break
        rows = np.asarray(rows[: len(targets)])  # all logits: there is no filter
        logprobs[start - first :][: len(rows)] = rows[np.arange(len(rows)), targets] - session.log_normalizers(rows)
        if take is not None:
            for place, row in enumerate(rows):
                take(start + place, row, None if states is None else states[place])
    return logprobs


def _keep(part: ScoredPrompt, wanted: set[int], symbols: Ids | None, size: int, observes: Observes | None) -> TakeRow:
    """Return what keeps in a prompt what is wanted of rows in front of some tokens of the text, by index.

    symbols: of each id, int64 (vocab,), where the member's distribution is wanted. size: how many symbols there are.
    observes: what a router observes.
    """

    def take(position: int, row: Logits, state: HiddenStates | None) -> None:
        number = position - part.first
        if number in wanted and observes is not None:
            part.observations[number] = observation(row, observes, state)
        if number in wanted and symbols is not None:
            tokens = np.flatnonzero(symbols >= 0)
            counts = np.bincount(symbols[tokens], softmax(row)[tokens], size)
            part.probabilities[number] = counts.astype(np.float64, copy=False)

    return take


def _stack(name: str, observations: Sequence[Observation | None]) -> ObservedStates:
    """Return observations as one; for a text's first token that nothing precedes, that of the next one."""
    known = [observed for observed in observations if observed is not None]
    if not known:
        raise ConfigError("the prompt is too short to be scored with a router that observes a member", "lengthen it")
    return ObservedStates.of(name, [known[0] if observed is None else observed for observed in observations])


def _tokens(
    text: bytes, ends: Offsets, names: Sequence[str], logprobs: Floats, tops: Mapping[int, tuple[TopLogprob, ...]]
) -> tuple[Token, ...]:
    """Return a text's segments as tokens. ends: in bytes. tops: top logprobs by segment."""
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    strings = segment_strings(text, starts, ends)
    return tuple(
        Token(string, text[start:end], name, logprob, tops.get(number, ()))
        for number, (string, start, end, name, logprob) in enumerate(
            zip(strings, starts, ends, names, logprobs.tolist(), strict=True)
        )
    )


def symbol_logprobs(unit: Unit, probabilities: Floats, count: int) -> tuple[TopLogprob, ...]:
    """Return the most likely symbols of a distribution, float64 (symbols,)."""
    top = top_logprobs(support(np.arange(len(probabilities)), probabilities), count)
    return tuple(TopLogprob(unit.symbol_bytes(symbol), logprob) for symbol, logprob in top)


@dataclass(frozen=True)
class GivenText:
    """A text in the tokens of the members that take part in a rule, in the order of its rows.

    members: their indices. symbols: the unit's symbol of each of their ids, int64 (vocab,). size: how many symbols
    there are. ids: each one's prefix and the text, int64 (n,). begins: where the text begins in these.
    """

    members: Sequence[int]
    symbols: Sequence[Ids]
    size: int
    ids: Sequence[Ids]
    begins: Sequence[int]

    def targets(self, readers: Sequence[tuple[str, Vocabulary]]) -> Ids:
        """Return the symbol of each of the text's tokens, int64 (n,). readers: the members' names and vocabularies.

        Raises:
            UnsupportedError: The members do not have the same tokens.
        """
        texts = [ids[begin:] for ids, begin in zip(self.ids, self.begins, strict=True)]
        targets = [symbols[text] for symbols, text in zip(self.symbols, texts, strict=True)]
        first = targets[0]
        for reader, text, other in zip(readers, texts, targets, strict=True):
            if not np.array_equal(first, other):
                place = common_prefix(first, other)
                own, others = _token_name(readers[0], texts[0], place), _token_name(reader, text, place)
                raise _not_shared(f"{readers[0][0]} has {own} where {reader[0]} has {others}")
        if (first < 0).any():
            raise _not_shared(f"not all have {_token_name(readers[0], texts[0], int(np.argmax(first < 0)))}")
        return first

    def read(self, places: range, positions: int, take: Callable[[int, Floats], bool]) -> RequestFlow[None]:
        """Run the members on the text, some positions at a time.

        Args:
            places: The tokens of the text in front of which they are read, by index.
            positions: How many at a time.
            take: Called with each place and the members' distributions there, float64 (members, symbols); returns
                whether to go on.
        """
        for start in range(places.start, places.stop, positions):
            end = min(start + positions, places.stop)
            responses = yield [
                LogitsRequest(member, ids[: begin + end - 1], end - start)
                for member, ids, begin in zip(self.members, self.ids, self.begins, strict=True)
            ]
            for place in range(start, end):
                rows = zip(responses, self.symbols, strict=True)
                probs = [symbol_probabilities(logits[place - start], symbols, self.size) for logits, symbols in rows]
                if not take(place, np.array(probs)):
                    return


def _token_name(reader: tuple[str, Vocabulary], ids: Ids, place: int) -> str:
    return repr(reader[1].name(int(ids[place]))) if place < len(ids) else "no further token"


def _not_shared(reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"under a rule, a text has a log-probability where members have the same tokens of it, and {reason}",
        "take it out of the text, or use mixlm score with --unit piece",
    )


def symbol_probabilities(logits: Logits, symbols: Ids, size: int) -> Floats:
    """Return a member's distribution over the unit's symbols, float64 (size,), from its logits, (vocab,).

    symbols: of each id, int64 (vocab,); -1 for those that are never sampled.
    """
    tokens = np.flatnonzero(symbols >= 0)
    return np.bincount(symbols[tokens], weights=softmax(logits[tokens]), minlength=size).astype(np.float64, copy=False)
