"""Log-probabilities of a raw prompt under an ensemble (`echo`, `score_prompt`), as requests to its members.

The distribution is that of given texts by segments, in every unit: members meet where all of them have a token
boundary, and a segment between two such boundaries has the probability `Σ_i λ_i P_i(segment | before)`; with one
vocabulary that is each token's. Members are scored without sampling options, and each reads the prompt as its
completion will continue it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mixlm.core.mixing import mixture_logprobs, segment_responsibilities
from mixlm.core.sampling import log_softmax, top_logprobs
from mixlm.engines.base import Session
from mixlm.engines.requests import LogitsAndHidden, LogitsRequest, Request, Response, ScoreRequest
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation.member import Member
from mixlm.routing.base import FixedRouter, Observation, Observes, Router, observed_by
from mixlm.routing.given_text import weights_along
from mixlm.routing.observation import ObservedStates, observation
from mixlm.tokenization.segments import common_boundaries, first_tokens, segment_logprobs, segment_strings, token_ends
from mixlm.types import Candidates, Floats, Ids, Token, TopLogprob
from mixlm.units.base import Unit

# Rows of logits in one request; a large vocabulary takes 1 MB a row.
ROWS = 64


@dataclass
class ScoredPrompt:
    """One member's prompt. first: index of the text's first token. ends: where each token ends in the text, in bytes.

    logprobs: natural log-probability of each token of the text, float64 (n,); nan where nothing is in front of it.
    probabilities: by index of a token of the text, the member's probability of every symbol there, float64 (symbols,).
    observations: by index of a token of the text, what a router observes in front of it.
    """

    ids: Ids
    first: int
    ends: npt.NDArray[np.int64]
    logprobs: Floats
    probabilities: dict[int, Floats] = field(default_factory=dict)
    observations: dict[int, Observation] = field(default_factory=dict)

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
    members: Sequence[Member],
    unit: Unit,
    router: Router,
    prompts: tuple[Sequence[Ids], bytes],
) -> Generator[list[Request], list[Response], tuple[Token, ...]]:
    """Score a raw prompt, and return its segments as tokens; afterwards each member's KV cache holds its prompt.

    A token's member is the one most likely to have generated it; its top logprobs are those of the average where it
    begins. The log-probability of a first segment with nothing in front of it is nan, and it has no top logprobs.

    Args:
        members: The members.
        unit: The unit.
        router: The weights.
        prompts: Each member's ids, and the text.

    Raises:
        UnsupportedError: A member's engine reports its most likely tokens only, and these are not enough.
    """
    text = prompts[1]
    live = (
        [i for i, weight in enumerate(router.weights) if weight > 0]
        if isinstance(router, FixedRouter)
        else range(len(members))
    )
    scored = {i: ScoredPrompt.of(members[i], prompts[0][i], text) for i in live}
    common = common_boundaries([prompt.ends for prompt in scored.values()])
    common = common[common > 0]
    firsts = {i: first_tokens(prompt.ends, common).tolist() for i, prompt in scored.items()}
    observes = observed_by(router, len(members))
    by_engine = {i: prompt for i, prompt in scored.items() if members[i].engine.top_k_limit is not None}
    yield from _score_by_engine(members, by_engine, observes)
    for i, prompt in scored.items():
        if i in by_engine:
            continue
        wanted = _Wanted(
            set(firsts[i]), bool(members[0].top_logprobs), observes if observes and observes.member == i else None
        )
        yield from _score(i, members[i], prompt, unit, wanted)
    starts = np.concatenate([[0], common[:-1]]).astype(np.int64)
    table = np.full((len(common), len(members)), -np.inf)
    for i, prompt in scored.items():
        table[:, i] = segment_logprobs(prompt.logprobs, prompt.ends, common)
    unknown = np.isnan(table).any(axis=1)
    table = np.nan_to_num(table, nan=0.0)
    observed = None
    if observes is not None:
        seen = scored[observes.member].observations
        observed = _stack(members[observes.member].name, [seen.get(first) for first in firsts[observes.member]])
    weights = weights_along(router, text, starts, np.zeros_like(starts), np.zeros(table.shape), observed)
    mixture, shares = mixture_logprobs(table, weights), segment_responsibilities(table, weights)
    tokens = []
    for segment, string in enumerate(segment_strings(text, starts, common)):
        top: tuple[TopLogprob, ...] = ()
        if not unknown[segment] and members[0].top_logprobs:
            average = sum(
                weights[segment, i] * prompt.probabilities[firsts[i][segment]] for i, prompt in scored.items()
            )
            top = symbol_logprobs(unit, np.asarray(average), members[0].top_logprobs)
        logprob = float("nan") if unknown[segment] else float(mixture[segment])
        name = members[int(np.argmax(shares[segment]))].name
        tokens.append(Token(string, text[starts[segment] : common[segment]], name, logprob, top))
    return tuple(tokens)


def member_prompt_bits(
    members: Sequence[Member], sessions: Sequence[Session], prompts: Sequence[Ids]
) -> Generator[list[Request], list[Response], Floats]:
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
        if i in by_engine:
            continue
        for start in range(0, len(ids), ROWS):
            end = min(start + ROWS, len(ids))
            targets = ids[start + 1 : end + 1]
            [logits] = yield [LogitsRequest(i, ids[:end], end - start)]
            rows = logits[: len(targets)]
            if len(rows):
                bits[i] -= (rows[np.arange(len(targets)), targets] - session.log_normalizers(rows)).sum() / np.log(2)
    return bits


class _Wanted(NamedTuple):
    """What is kept of a member at some tokens: every symbol's probability, and what the router observes there."""

    tokens: set[int]
    probabilities: bool
    observes: Observes | None


def _stack(name: str, observations: Sequence[Observation | None]) -> ObservedStates:
    """Return observations as one; for a text's first token that nothing precedes, that of the next one."""
    known = [observed for observed in observations if observed is not None]
    if not known:
        raise ConfigError("the prompt is too short to be scored with a router that observes a member", "lengthen it")
    filled = [known[0] if observed is None else observed for observed in observations]
    hidden = [observed.hidden for observed in filled if observed.hidden is not None]
    return ObservedStates(
        name,
        np.array([observed.ids for observed in filled]),
        np.array([observed.logprobs for observed in filled]),
        np.array(hidden) if hidden else None,
    )


def _score_by_engine(
    members: Sequence[Member], prompts: Mapping[int, ScoredPrompt], observes: Observes | None
) -> Generator[list[Request], list[Response], None]:
    """Request the log-probabilities of the prompts' tokens of engines that report their most likely tokens only.

    prompts: by index of the member.
    """
    for i in prompts:
        if members[i].top_logprobs or (observes is not None and observes.member == i):
            raise UnsupportedError(
                f"{members[i].name} gives the log-probability of a prompt's own tokens, and no others at each of them",
                "ask for none (top_logprobs=0), use weights that observe no member, or --engine hf (engine='hf')",
            )
    if prompts:
        responses = yield [ScoreRequest(i, prompt.ids) for i, prompt in prompts.items()]
        for prompt, logprobs in zip(prompts.values(), responses, strict=True):
            first = max(prompt.first, 1)  # nothing is in front of the first id
            prompt.logprobs[first - prompt.first :] = logprobs[first - 1 :]


def _score(
    index: int, member: Member, prompt: ScoredPrompt, unit: Unit, wanted: _Wanted
) -> Generator[list[Request], list[Response], None]:
    """Run a member on its prompt in parts, to its end."""
    symbols = unit.without_owner(member.symbols)
    for start in range(max(prompt.first, 1), len(prompt.ids) + 1, ROWS):
        end = min(start + ROWS, len(prompt.ids) + 1)
        # Row j is after the first `start + j` ids. The last row, after all of them, is the completion's.
        hidden = wanted.observes is not None and wanted.observes.hidden
        [response] = yield [LogitsRequest(index, prompt.ids[: end - 1], end - start, hidden=hidden)]
        logits, states = response if isinstance(response, LogitsAndHidden) else (response, None)
        for place, position in enumerate(range(start, min(end, len(prompt.ids)))):
            row = np.asarray(logits[place])  # all of them: there is no filter
            values = log_softmax(row)
            number = position - prompt.first
            prompt.logprobs[number] = values[prompt.ids[position]]
            if number in wanted.tokens and wanted.observes is not None:
                state = None if states is None else states[place]
                prompt.observations[number] = observation(row, wanted.observes, state)
            if number in wanted.tokens and wanted.probabilities:
                shared = symbols >= 0
                mass = np.exp(values[shared])
                prompt.probabilities[number] = np.bincount(
                    symbols[shared], weights=mass, minlength=unit.end + 1
                ).astype(np.float64)


def symbol_logprobs(unit: Unit, probabilities: Floats, count: int) -> tuple[TopLogprob, ...]:
    """Return the most likely symbols of a distribution, float64 (symbols,)."""
    symbols = np.flatnonzero(probabilities)
    top = top_logprobs(Candidates(symbols, np.log(probabilities[symbols])), count)
    return tuple(TopLogprob(unit.symbol_bytes(symbol), logprob) for symbol, logprob in top)
