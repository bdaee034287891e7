"""The exact distribution of the next symbol, computed another way than the strategies compute anything: the reference.

Uncached forwards, dense over the whole vocabulary, by the reference form of the transforms; every unit's definition
implemented directly from its definition.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from mixlm.core.combinations.base import Combination
from mixlm.core.logit_bias import member_logit_bias
from mixlm.core.logits_processor import process_logits
from mixlm.core.options import GenerationOptions
from mixlm.core.sampling import TokenHistory, dense_distribution
from mixlm.engines.base import Engine, respond
from mixlm.engines.requests import LogitsAndHidden, LogitsRequest
from mixlm.ensemble import Ensemble
from mixlm.errors import TokenizerError
from mixlm.generation.generation import bits_per_byte
from mixlm.generation.prompt import EncodedPrompt
from mixlm.generation.spellings import token_strings
from mixlm.generation.target import assign_roles, mode_sampling
from mixlm.routing.base import CheckedRoute, Observation, PromptContext
from mixlm.routing.observation import observation
from mixlm.types import Candidates, Floats, Ids, Logits, Sampling, TopKFilter
from mixlm.units.base import TextState
from mixlm.units.word import WordState, WordUnit, begins_word
from mixlm.verification.sampling import Outcome

_FIRST_SYMBOLS = 24  # how many first symbols get a distribution of their own for the second; the rest share one cell


class ExactReference:
    """The exact distribution of a strategy after a prompt. first: that of the first symbol, float64 (symbols + 1,)."""

    def __init__(self, ensemble: Ensemble, settings: GenerationOptions, prompts: EncodedPrompt) -> None:
        self._ensemble = ensemble
        self._settings = settings
        self._prompts = prompts.ids
        self._may_end = True
        self._known_pieces: dict[int, dict[int, bytes]] = {}
        sessions = [member.engine.session() for member in ensemble.members]
        context = PromptContext(prompts.text, lambda: bits_per_byte(sessions, prompts))
        self._route = CheckedRoute(ensemble.router, context, len(ensemble.members))
        self.first = self.distribution(())

    def distribution(self, symbols: Sequence[int]) -> Floats:
        """Return the distribution of the next symbol, float64 (symbols + 1,); the last entry is the end of text."""
        state = self._state(symbols)
        self._may_end = not self._settings.ignore_end and len(symbols) >= self._settings.min_tokens
        if self._settings.method == "single":
            weights = np.eye(len(self._prompts))[int(np.argmax(self._ensemble.weights))]
        else:
            weights = self._route(state, self._observation(state))
        mixture = self._ensemble.unit.traits.mixture
        if mixture == "word_mixture":
            return self._word(weights, cast(WordState, state), cast(WordUnit, self._ensemble.unit))
        if mixture == "byte_mixture":
            return self._bytes(weights, bytes(symbols))
        if self._settings.combination is not None:
            return self._combined(self._settings.combination, weights, state)
        average = np.zeros(self._ensemble.unit.end + 1)
        for i, weight in enumerate(weights):
            if weight > 0:
                average += weight * self._member(i, state)
        if self._settings.language is not None:
            average /= average.sum()  # without members that have nothing to go on with
        return average

    def _combined(self, rule: Combination, weights: Floats, state: TextState) -> Floats:
        """Return what a rule makes of the members' distributions over the whole vocabulary."""
        ensemble, settings = self._ensemble, self._settings
        after = settings.combined_sampling(ensemble.members[0].sampling)
        of_spellings = rule.alignment == "strings"
        if of_spellings or (settings.rule == "unite" and not ensemble.unit.traits.shared_vocabulary):
            assert after is not None
            after = replace(after, temperature=0.0) if settings.method == "greedy" else after
            parts = [
                SpellingMember(float(weight), self._probs(i, state), ensemble.unit.symbols(i), member.engine)
                for i, (weight, member) in enumerate(zip(weights, ensemble.members, strict=True))
            ]
            published = gac_distribution if of_spellings else unite_distribution
            return published(parts, ensemble.unit.end + 1, after)
        if rule.roles:
            rows = assign_roles(rule, ensemble.names, [member.role for member in ensemble.members])
            weights = np.full(len(rows), 1 / len(rows))
        else:
            rows = [i for i, weight in enumerate(weights) if weight > 0]
        probs = np.array([self._member(i, state) for i in rows])
        some = probs.any(axis=1)  # without members that have nothing to go on with
        probs, weights = probs[some], weights[rows][some] / weights[rows][some].sum()
        if after is not None:
            rule = rule.with_sampling(mode_sampling(rule, after) if settings.method == "greedy" else after)
        return rule.combine(probs, weights)

    @cached_property
    def pairs(self) -> dict[Outcome, float]:
        """The distribution of the first two symbols, for the most likely first ones only."""
        probabilities: dict[Outcome, float] = {}
        end = self._ensemble.unit.end
        for first in np.argsort(-self.first, kind="stable")[:_FIRST_SYMBOLS]:
            mass = float(self.first[first])
            if mass == 0:
                break
            if first == end:
                probabilities[(end,)] = mass
                continue
            second = self.distribution([int(first)])
            probabilities.update({(int(first), int(u)): mass * float(second[u]) for u in np.flatnonzero(second)})
        return probabilities

    def _observation(self, state: TextState) -> Observation | None:
        """Return what the router observes of a member at a state, by a forward of its own."""
        observes = self._route.observes
        if observes is None:
            return None
        session = self._ensemble.members[observes.member].engine.session()
        request = LogitsRequest(observes.member, state.ids(observes.member), hidden=observes.hidden)
        response = respond(session, request)
        rows, hidden = response if isinstance(response, LogitsAndHidden) else (response, None)
        return observation(rows[0], observes, None if hidden is None else hidden[0])

    def _state(self, symbols: Sequence[int]) -> TextState:
        state = self._ensemble.unit.initial_state(self._prompts)
        for symbol in symbols:
            state.append(symbol)
        return state

    def _member(self, i: int, state: TextState, only: npt.NDArray[np.bool_] | None = None) -> Floats:
        """Return a member's distribution over symbols, restricted to `only`; 0 if nothing is left."""
        symbols = self._ensemble.unit.symbols(i)
        return _by_symbol(self._probs(i, state, only), symbols, self._ensemble.unit.end + 1)

    def _probs(self, i: int, state: TextState, only: npt.NDArray[np.bool_] | None = None) -> Floats:
        """Return a member's distribution over its own ids, float64 (vocab,). only: symbols that may be sampled."""
        member = self._ensemble.members[i]
        ids = state.ids(i)
        symbols = self._ensemble.unit.symbols(i)
        allowed = (symbols >= 0) & (self._may_end | (symbols != self._ensemble.unit.end))
        if self._settings.language is not None:
            grammar = self._ensemble.grammars.for_language(self._settings.language)[i]
            permitted = grammar.matcher().allowed(state.substring())
            allowed &= permitted if permitted is not None else False
        if only is not None:
            allowed &= only[symbols]
        sampling = self._settings.member_sampling(member.sampling)
        is_restricted = self._settings.language is not None or only is not None
        logits = _whole_logits(member.engine, ids, allowed if is_restricted else None, whole=not sampling.top_k)
        if member.processor is not None:
            logits = process_logits(member.processor, ids, logits)
        if not np.isfinite(logits[allowed]).any():
            return np.zeros(logits.size)
        history = TokenHistory.from_tokens(ids[: len(self._prompts[i])], ids[len(self._prompts[i]) :])
        unit = self._ensemble.unit
        bias = member_logit_bias(
            self._settings.logit_bias,
            member.engine.vocabulary,
            symbols,
            member=member.name,
            unit=unit.name,
            shared_vocabulary=unit.traits.shared_vocabulary,
        )
        return dense_distribution(logits, sampling, np.flatnonzero(~allowed), history, bias)

    def _word(self, weights: Floats, state: WordState, unit: WordUnit) -> Floats:
        """Return what goes on with the owner's word, and the next word's beginning for the mass that ends it."""
        if state.owner is None:
            return cast(Floats, sum(weight * self._member(i, state) for i, weight in enumerate(weights) if weight > 0))
        tail = state.tail(1)
        begins = np.array([*(begins_word(unit.symbol_bytes(u), tail) for u in range(unit.end)), True])
        current = self._member(state.owner, state)
        ended = float(current[begins].sum())
        if ended == 0:
            return current
        distribution = np.where(begins, 0.0, current)
        for i, weight in enumerate(weights):
            following = current if i == state.owner else self._member(i, state)
            if following[begins].sum() == 0:
                following = self._member(i, state, only=begins)
            if following[begins].sum() == 0:
                following = current
            distribution += weight * ended * np.where(begins, following, 0.0) / following[begins].sum()
        return distribution

    def _bytes(self, weights: Floats, text: bytes) -> Floats:
        """Return the average of the members' next-byte distributions, summed over all covers after its last seam."""
        distribution = np.zeros(self._ensemble.unit.end + 1)
        for i, weight in enumerate(weights):
            if weight > 0:
                next_byte = self._covers(i, text, over=False)
                if next_byte.sum() == 0:
                    next_byte = self._covers(i, text, over=True)
                distribution += weight * next_byte / next_byte.sum()
        return distribution

    def _pieces(self, i: int) -> dict[int, bytes]:
        """Return the bytes of each symbol that a member samples."""
        if i not in self._known_pieces:
            unit = self._ensemble.unit
            symbols = [int(symbol) for symbol in unit.symbols(i) if 0 <= symbol < unit.end]
            self._known_pieces[i] = {symbol: unit.symbol_bytes(symbol) for symbol in symbols}
        return self._known_pieces[i]

    def _covers(self, i: int, text: bytes, *, over: bool) -> Floats:
        """Return a member's mass of each next byte. over: it writes the text again, a token that agrees at a time."""
        unit, pieces = self._ensemble.unit, self._pieces(i)
        seam = _last_seam(set(pieces.values()), text)
        distribution = np.zeros(unit.end + 1)
        mass = defaultdict(float, {seam: 1.0})
        for place in range(seam, len(text)):
            rest = text[place:]
            agree = np.zeros(unit.end + 1, dtype=bool)
            agree[[symbol for symbol, data in pieces.items() if data.startswith(rest) or rest.startswith(data)]] = True
            if mass[place] == 0:
                continue
            probs = self._member(i, self._state(text[:place]), agree if over else None)
            if over and probs.sum() == 0:
                mass[len(text)] += mass[place]
            for symbol in np.flatnonzero(probs * agree).tolist():
                data = pieces[symbol]
                if len(data) > len(rest):
                    distribution[data[len(rest)]] += mass[place] * probs[symbol]
                else:
                    mass[place + len(data)] += mass[place] * probs[symbol]
        if mass[len(text)] > 0:
            final = self._member(i, self._state(text))
            for symbol, data in pieces.items():
                distribution[data[0]] += mass[len(text)] * final[symbol]
            distribution[unit.end] += mass[len(text)] * final[unit.end]
        return distribution


def _last_seam(tokens: set[bytes], text: bytes) -> int:
    """Return the last place in front of the last byte that no token lies across, wherever it begins."""
    seam = reach = 0
    for start in range(len(text) - 1):
        rest = text[start:]
        if any(token.startswith(rest) for token in tokens):
            break  # it lies across all that follows
        reach = max(reach, *(start + n for n in range(1, len(rest)) if rest[:n] in tokens), 0)
        if reach <= start + 1:
            seam = start + 1
    return seam


def _whole_logits(engine: Engine, ids: Ids, permitted: npt.NDArray[np.bool_] | None, *, whole: bool) -> Logits:
    """Return the logits of every token, float32 (vocab,), or of the most likely ones, -inf for the others.

    permitted: the ids that may be sampled, of which an engine of top tokens reports the most likely ones; None for all.
    whole: whether such an engine is to report all tokens, where it can.
    """
    session = engine.session()
    allowed = () if permitted is None else (permitted,)
    if engine.top_k_limit is None or not (whole and engine.reports_all):
        return cast(Logits, session.logits_rows(ids, allowed=allowed)[0])
    everything = TopKFilter(engine.vocabulary.size, np.zeros(0, dtype=np.int64), normalized=permitted is None)
    reported = cast(Candidates, session.logits_rows(ids, top_k_filter=everything, allowed=allowed)[0])
    logits = np.full(engine.vocabulary.size, -np.inf, dtype=np.float32)
    logits[reported.ids] = reported.logprobs
    return logits


def _by_symbol(probs: Floats, symbols: Ids, size: int) -> Floats:
    """Return a distribution over a member's ids as one over symbols, float64 (size,); -1 is no symbol."""
    distribution = np.zeros(size)
    np.add.at(distribution, symbols[symbols >= 0], probs[symbols >= 0])
    return distribution


class SpellingMember(NamedTuple):
    """A member at one position: its weight, its distribution over its own ids, float64 (vocab,), and their symbols."""

    weight: float
    probs: Floats
    symbols: Ids
    engine: Engine


def gac_distribution(parts: Sequence[SpellingMember], size: int, after: Sampling) -> Floats:
    """Return the distribution of `gac` as a plain sum, float64 (size,). after: what is applied to its average."""
    average: dict[str, float] = {}
    symbol_of: dict[str, int] = {}
    for part in parts:
        spelled = token_strings(part.engine.vocabulary)
        for i in np.flatnonzero(part.symbols >= 0).tolist():
            symbol_of.setdefault(spelled[i], int(part.symbols[i]))
            average[spelled[i]] = average.get(spelled[i], 0.0) + part.weight * float(part.probs[i])
    chosen = _after(np.array(list(average.values())), after)
    return _by_symbol(chosen, np.array([symbol_of[text] for text in average]), size)


def unite_distribution(parts: Sequence[SpellingMember], size: int, after: Sampling) -> Floats:
    """Return the distribution of `unite` as a plain sum, float64 (size,). after: what is applied to its average."""
    distributions = [_by_symbol(part.probs, part.symbols, size) for part in parts]
    union: set[int] = set()
    for part, distribution in zip(parts, distributions, strict=True):
        if part.weight > 0:
            threshold = np.sort(distribution)[-min(after.top_k, size)]
            union |= set(np.flatnonzero(distribution >= max(threshold, 1e-300)).tolist())
    tokens = {
        u: next(part.engine.vocabulary.tokens[(part.symbols == u).argmax()] for part in parts if u in part.symbols)
        for u in union
    }
    average = np.zeros(size)
    for part, distribution in zip(parts, distributions, strict=True):
        probabilities = {
            u: float(distribution[u]) if u in part.symbols else _first(part, distribution, tokens[u]) for u in union
        }
        for u in union:
            average[u] += part.weight * probabilities[u] / sum(probabilities.values())
    return _after(average, replace(after, top_k=0))


def _first(part: SpellingMember, distribution: Floats, data: bytes) -> float:
    """Return the probability of the first token that a member spells some bytes with."""
    try:
        ids = part.engine.encoder.encode(data).ids
    except TokenizerError:
        return 0.0
    return float(distribution[part.symbols[ids[0]]]) if ids and part.symbols[ids[0]] >= 0 else 0.0


def _after(average: Floats, after: Sampling) -> Floats:
    if after.temperature == 0:
        chosen = np.zeros(len(average))
        chosen[int(np.argmax(average))] = 1.0
        return chosen
    with np.errstate(divide="ignore"):
        return dense_distribution(np.log(average), after, np.zeros(0, dtype=np.int64))
