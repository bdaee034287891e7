"""Log-probability of given text under a combination rule, exactly, for members as they are: without sampling options,
but for the top-k of `union-top-k`, which is the rule's own.

In the unit `token` it is the sum of `log C(u | before)` over the text's canonical tokens, one pass a member. In `piece`
several sequences of symbols spell one text. With `P(b)` the probability that the text begins with its first b bytes and
has a boundary there,

    P(0) = 1,   P(b) = Σ_{a < b} P(a) C(text[a:b] | text[:a]),

since what members say depends on the bytes alone: the sum over all ways to spell the text, for a forward of each member
at every place where it can have a boundary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from mixlm.binding import check_two_prompts
from mixlm.core.combinations.base import Combination
from mixlm.core.sampling import log_softmax
from mixlm.engines.base import respond
from mixlm.engines.requests import Request, Response
from mixlm.engines.topk_only import full_distribution_error
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation.dispatch import drive
from mixlm.generation.prompt_logprobs import GivenText, symbol_probabilities
from mixlm.generation.target import assign_roles, scored_rule
from mixlm.routing.base import FixedRouter
from mixlm.scoring.passages import Before, Passage, bare_passages
from mixlm.tokenization.segments import encode_exactly
from mixlm.types import Floats, Ids

_MOST_BYTES = 1 << 28  # of the members' logits that are in memory at once


def text_passages(ensemble: Ensemble, texts: Sequence[str], before: Before = "begin") -> list[Passage]:
    """Return texts in passages that fit every context. before: what stands in front of each; see `text_prefix`."""
    data = [text.encode(errors="replace") for text in texts]
    return bare_passages(data, [member.engine for member in ensemble.members], before)


class RuleScorer:
    """Variants of the rule of an ensemble over the unit's whole vocabulary.

    Sessions stay open, so that passages with a common beginning share its forwards.

    Args:
        ensemble: The members, and the rule by the default options.
        variants: The same rule with other parameters, and weights, float64 (members,); a role that a member has in the
            rule is the same in all. By default the rule and the weights of the ensemble alone.

    Raises:
        UnsupportedError: The rule combines spellings, or the weights depend on the text; or an engine reports its
            likeliest tokens only.
    """

    def __init__(self, ensemble: Ensemble, variants: Sequence[tuple[Combination, Floats]] = ()) -> None:
        options = ensemble.defaults
        sampling = [member.sampling for member in ensemble.members]
        variants = variants or [(scored_rule(options, sampling), ensemble.weights)]
        rule = variants[0][0]
        if rule.alignment == "strings" or (options.rule == "unite" and not ensemble.unit.traits.shared_vocabulary):
            raise UnsupportedError(
                f"rule {options.rule} combines tokens as they are spelled, and has no probability of bytes",
                "score with --rule mean-then-truncate or union-top-k",
            )
        if not isinstance(ensemble.router, FixedRouter):
            raise UnsupportedError("a rule is scored with weights that are fixed, and these depend on the text")
        rule.check_members(len(ensemble.members))
        self._check_two_prompts = partial(check_two_prompts, rule, ensemble.members)
        self._unit, self._size = ensemble.unit, ensemble.unit.end + 1
        if rule.roles:
            roles = [member.role for member in ensemble.members]
            self._members = assign_roles(rule, ensemble.names, roles)
            weights = np.full(len(self._members), 1 / len(self._members))
            self._variants = [(variant, weights) for variant, _ in variants]
        else:
            used = np.any([weights > 0 for _, weights in variants], axis=0)
            self._members = np.flatnonzero(used).tolist()
            self._variants = [(variant, weights[self._members]) for variant, weights in variants]
        self._engines = [ensemble.members[i].engine for i in self._members]
        for engine in self._engines:
            if engine.top_k_limit is not None:
                raise full_distribution_error(engine, "the log-probability under a rule")
        self._readers = [(ensemble.names[i], ensemble.members[i].engine.vocabulary) for i in self._members]
        self._sessions = [engine.session() for engine in self._engines]
        self._symbols = [ensemble.unit.symbols(i) for i in self._members]
        self._symbol_of = {self._unit.symbol_bytes(u): u for u in range(self._unit.end)}
        self._longest = max(map(len, self._symbol_of))

    def logprobs(self, passages: Sequence[Passage]) -> Floats:
        """Return the log-probability of passages together, float64 (variants,).

        Nothing is read after a token that no variant gives any probability.

        Raises:
            ConfigError: A text is too long for a context.
            UnsupportedError: Members that share a vocabulary do not have the same tokens of a text.
        """
        total = np.zeros(len(self._variants))
        for passage in passages:
            total += self.score(passage)[0]
            if not np.isfinite(total).any():
                break
        return total

    def score(self, passage: Passage) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Return the log-probability of a passage, float64 (variants,), and whether it is greedy, bool (variants,).

        Greedy is what is written by the most likely symbol at each step.

        Raises:
            ConfigError: A text is too long for a context; or both prompts of a rule of two are the same.
            UnsupportedError: Members that share a vocabulary do not have the same tokens of a text.
        """
        self._check_two_prompts(passage.prefixes)
        scored = self._by_token(passage) if self._unit.traits.shared_vocabulary else self._by_byte(passage)
        for session in self._sessions:
            session.stats.forwards.clear()
        return scored

    def _combine(self, probs: Floats) -> Floats:
        """Return what each variant makes of the members' rows, float64 (variants, symbols)."""
        return np.array([rule.combine(probs, weights) for rule, weights in self._variants])

    def _by_token(self, passage: Passage) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Score a passage's tokens, which all members have alike."""
        encoded = [
            encode_exactly(engine.encoder, engine.vocabulary, passage.data, engine.name)[0] for engine in self._engines
        ]
        prefixes = [passage.prefixes[i] for i in self._members]
        texts = [np.array([*prefix, *ids], dtype=np.int64) for prefix, ids in zip(prefixes, encoded, strict=True)]
        self._check(texts)
        given = GivenText(range(len(texts)), self._symbols, self._size, texts, [len(prefix) for prefix in prefixes])
        targets = [*given.targets(self._readers).tolist(), *[self._unit.end] * passage.scores_end]
        total, greedy = np.zeros(len(self._variants)), np.ones(len(self._variants), dtype=np.bool_)

        has_product = any(rule.is_product for rule, _ in self._variants)

        def take(place: int, probs: Floats) -> bool:
            with np.errstate(divide="ignore"):
                logs = list(np.log(probs)) if has_product else []  # once, for all products
                for variant, (rule, weights) in enumerate(self._variants):
                    if rule.is_product:
                        scores = rule.log_scores(logs, weights)
                        total[variant] += log_softmax(scores)[targets[place]]
                    else:
                        scores = rule.combine(probs, weights)
                        total[variant] += np.log(scores[targets[place]])
                    greedy[variant] &= scores.argmax() == targets[place]
            return bool(np.isfinite(total).any())

        # Of 16 positions, each takes three times as long on a CPU as of 128.
        chunk = max(16, _MOST_BYTES // (4 * self._size * len(texts)))
        drive(given.read(range(len(targets)), chunk, take), self._respond)
        return total, greedy

    def _respond(self, requests: Sequence[Request]) -> list[Response]:
        return [respond(self._sessions[request.member], request) for request in requests]

    def _by_byte(self, passage: Passage) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Score a passage's bytes, over all symbols that spell them."""
        data = passage.data
        reached: Floats = np.full((len(data) + 1, len(self._variants)), -np.inf)
        reached[0] = 0.0
        best: dict[int, Ids] = {}  # the most likely symbol of each variant, by place
        for place in range(len(data) + passage.scores_end):
            if (reached[place] == -np.inf).all():
                continue
            encoded = [engine.encoder.encode(data[:place]).ids for engine in self._engines]
            texts = [
                np.array([*passage.prefixes[i], *ids], dtype=np.int64)
                for i, ids in zip(self._members, encoded, strict=True)
            ]
            self._check(texts)
            probs = [
                symbol_probabilities(session.logits(ids)[0], symbols, self._size)
                for session, ids, symbols in zip(self._sessions, texts, self._symbols, strict=True)
            ]
            with np.errstate(divide="ignore"):
                combined = np.log(self._combine(np.array(probs)))
            best[place] = combined.argmax(axis=1)
            if place == len(data):
                reached[place] += combined[:, self._unit.end]
                break
            for length in range(1, min(self._longest, len(data) - place) + 1):
                symbol = self._symbol_of.get(data[place : place + length])
                if symbol is not None:
                    reached[place + length] = np.logaddexp(
                        reached[place + length], reached[place] + combined[:, symbol]
                    )
        greedy = [self._is_greedy(passage, best, variant) for variant in range(len(self._variants))]
        return reached[-1].copy(), np.array(greedy, dtype=np.bool_)

    def _is_greedy(self, passage: Passage, best: Mapping[int, Ids], variant: int) -> bool:
        """Whether a passage is written by the most likely symbols. best: of each place that is reached, by variant."""
        place = 0
        while place < len(passage.data):
            symbol = int(best[place][variant]) if place in best else self._unit.end
            data = self._unit.symbol_bytes(symbol)
            if not data or not passage.data.startswith(data, place):
                return False
            place += len(data)
        return not passage.scores_end or int(best[place][variant]) == self._unit.end

    def _check(self, texts: Sequence[Ids]) -> None:
        for engine, ids in zip(self._engines, texts, strict=True):
            if len(ids) > engine.context_length:
                raise ConfigError(f"{len(ids)} tokens are more than {engine.name}'s context of {engine.context_length}")
