"""The probability of a given continuation under the mixture, or under a combination rule.

Context and continuation are encoded apart, so that every member has a token boundary between them. Inside the
continuation the members meet where all of them have a boundary, as in `mixlm.scoring.score`: a segment's probability is
`Σ_i λ_i(s) P_i(segment | before)`, where `s` is what stands before the segment. In the unit `token` every token is a
segment, and the result is exact: the product of what `conventional` gives, step by step, under the same router. Where a
tokenizer changes or drops characters, its boundaries are unknown, and the whole continuation is one segment.

Members are scored as they are, without sampling options.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mixlm.core.options import RULE_OPTIONS, GenerationOptions
from mixlm.core.sampling import log_softmax
from mixlm.engines import Engine
from mixlm.engines.base import Session
from mixlm.engines.topk_only import TopKOnlySession, full_distribution_error
from mixlm.ensemble import Ensemble
from mixlm.errors import PromptTooLongError
from mixlm.evaluation.contexts import RequestContext
from mixlm.routing import FixedRouter, FunctionRouter
from mixlm.routing.base import observed_by
from mixlm.routing.gate_router import GateRouter
from mixlm.routing.observation import ObservedStates
from mixlm.scoring.member_scores import passage_states, prompt_bits
from mixlm.scoring.passages import Passage
from mixlm.scoring.rule_scores import RuleScorer, text_passages
from mixlm.scoring.score import score
from mixlm.scoring.scores import Scores, router_weights
from mixlm.tokenization.segments import common_boundaries, first_tokens, segment_logprobs, token_ends
from mixlm.types import Floats, Ids

# Rows of logits that lie in memory at once; a large vocabulary takes 2 MB a row.
_ROWS = 16


class ContinuationScorer:
    """Scores continuations. Sessions stay open, so that contexts with a common beginning share its forwards.

    alone: score under the member of the largest weight, as `single` writes, in place of the ensemble's router.
    """

    def __init__(self, ensemble: Ensemble, *, alone: bool = False) -> None:
        self._ensemble = ensemble
        weights = np.eye(len(ensemble.members))[np.argmax(ensemble.weights)] if alone else ensemble.weights
        self._router = FixedRouter(weights) if alone else ensemble.router
        self._live = list(range(len(ensemble.members)))
        if isinstance(self._router, FixedRouter):
            self._live = [i for i in self._live if weights[i] > 0]
        # Members that share a model would score alike.
        self._engines = {id(member.engine): member.engine for member in (ensemble.members[i] for i in self._live)}
        for engine in self._engines.values():
            if not engine.scores_texts:
                raise full_distribution_error(engine, "the log-probability of a given answer")
        self._sessions = {key: engine.session() for key, engine in self._engines.items()}
        self._prompt: tuple[RequestContext, dict[int, float]] | None = None

    def continuation(self, context: RequestContext, text: str) -> tuple[float, bool]:
        """Return the natural log-probability of `text` after a context, and whether it is the greedy continuation.

        Greedy is, where all members have the same tokens of one vocabulary: each token is the most likely one of the
        average. Otherwise: each token of each member that can have weight is that member's most likely one.
        A context that is too long for a member loses its beginning. Raises PromptTooLongError when the continuation
        alone is too long, and for a context that loses its beginning where weights depend on how it was read.
        """
        context, data = split_context(context, text)
        if not data:
            return 0.0, True
        knows_bytes_only = isinstance(self._router, FixedRouter | FunctionRouter | GateRouter)
        scores, parts = self._segments(context, data, prompts=not knows_bytes_only)
        weights = router_weights(scores, self._router)
        whole = all(engine.top_k_limit is None for engine in self._engines.values())
        shared = whole and self._ensemble.unit.traits.shared_vocabulary
        if shared and len({tuple(part.ids) for part in parts.values()}) == 1:
            logprobs, greedy = self._score_shared_tokens(parts, weights)
        else:
            logprobs, greedy = self._score_own_tokens(parts)
        return float(self._with_logprobs(scores, parts, logprobs).mixture(weights).sum()), greedy

    def member_scores(self, context: RequestContext, text: str) -> Scores | None:
        """Return what each member thinks of `text` after a context, for any weights and routers; None for no text.

        Members without weight are not read where weights are fixed. Raises PromptTooLongError when the context and the
        text do not fit a member.
        """
        context, data = split_context(context, text)
        if not data:
            return None
        scores, parts = self._segments(context, data, prompts=True)
        return self._with_logprobs(scores, parts, self._score_own_tokens(parts)[0])

    def text(self, text: str) -> float:
        """Return the natural log-probability of a text from its beginning, as `mixlm.scoring.score.score` reads it."""
        if not text:
            return 0.0
        scores = score(self._ensemble, text, by_segment=True)
        return float(scores.mixture(router_weights(scores, self._router)).sum())

    def _segments(
        self, context: RequestContext, data: bytes, *, prompts: bool
    ) -> tuple[Scores, dict[int, MemberContinuation]]:
        """Return where members meet in a continuation, with log-probabilities still to come, and each one's reading.

        prompts: whether to say how well the members predicted the context.
        """
        parts = {key: MemberContinuation(engine, context, data) for key, engine in self._engines.items()}
        bounds = [part.bounds for part in parts.values()]
        common = np.array([len(data)])
        if all(len(ends) and ends[-1] == len(data) for ends in bounds):
            common = common_boundaries(bounds)
        prompt = context.encoded()
        table = np.zeros((len(common), len(self._ensemble.members)))
        read = np.zeros(len(self._ensemble.members))
        if prompts:
            bits = self._read_prompt(context, prompt, parts)
            for i in self._live:
                read[i] = bits[id(self._ensemble.members[i].engine)]
        starts = np.concatenate([[0], common[:-1]])
        passage = Passage(data, [], prompt)
        scores = Scores.of_passage(self._ensemble.names, self._ensemble.unit.name, passage, starts, table, read)
        return replace(scores, observed=self._observe(parts, common)), parts

    def _observe(self, parts: dict[int, MemberContinuation], common: npt.NDArray[np.int64]) -> ObservedStates | None:
        """Return what the router observes of a member before each segment. common: where segments end, in bytes."""
        observes = observed_by(self._router)
        if observes is None:
            return None
        member = self._ensemble.members[observes.member]
        part, session = parts[id(member.engine)], self._sessions[id(member.engine)]
        whole = np.concatenate([part.before, part.ids])
        states = passage_states(session, observes, whole, len(part.before), member.name)
        return states.select(first_tokens(part.bounds, common))

    def _read_prompt(
        self, context: RequestContext, prompt: bytes, parts: dict[int, MemberContinuation]
    ) -> dict[int, float]:
        """Return bits per byte of a context under each engine; the choices of a question have it in common."""
        for key, part in parts.items():
            if part.cut:
                name = self._engines[key].name
                raise PromptTooLongError(f"the context is too long for {name}, and weights depend on how it is read")
        if self._prompt is None or self._prompt[0] != context:
            bits = {
                key: prompt_bits(self._sessions[key].token_logprobs(part.before), prompt) for key, part in parts.items()
            }
            self._prompt = context, bits
        return self._prompt[1]

    def _with_logprobs(
        self, scores: Scores, parts: dict[int, MemberContinuation], logprobs: dict[int, Floats]
    ) -> Scores:
        """Return the scores of a continuation. logprobs: of each engine's own tokens."""
        for session in self._sessions.values():
            session.stats.forwards.clear()
        common = scores.ends - scores.starts[0]
        columns = {key: segment_logprobs(logprobs[key], part.bounds, common) for key, part in parts.items()}
        table = np.zeros(scores.logprobs.shape)
        for i in self._live:
            table[:, i] = columns[id(self._ensemble.members[i].engine)]
        return replace(scores, logprobs=table)

    def _score_shared_tokens(
        self, parts: dict[int, MemberContinuation], weights: Floats
    ) -> tuple[dict[int, Floats], bool]:
        """Score the same tokens under all members, side by side. weights: (tokens, members)."""
        unit = self._ensemble.unit
        out: dict[int, list[Floats]] = {key: [] for key in parts}
        greedy, start = True, 0
        for blocks in zip(*(part.rows(self._sessions[key]) for key, part in parts.items()), strict=True):
            rows = dict(zip(parts, blocks, strict=True))
            count = len(blocks[0][0])
            average = np.zeros((count, unit.end + 1))
            for i in self._live:
                targets, logprobs = rows[id(self._ensemble.members[i].engine)]
                symbols = unit.symbols(i)
                shared, ends = (symbols >= 0) & (symbols != unit.end), symbols == unit.end
                mass = weights[start : start + count, i, None] * np.exp(logprobs)
                average[:, symbols[shared]] += mass[:, shared]
                average[:, unit.end] += mass[:, ends].sum(axis=1)
            greedy, start = greedy and bool((average.argmax(axis=1) == targets).all()), start + count
            for key, (targets, logprobs) in rows.items():
                out[key].append(logprobs[np.arange(len(targets)), targets])
        return {key: np.concatenate(columns) for key, columns in out.items()}, greedy

    def _score_own_tokens(self, parts: dict[int, MemberContinuation]) -> tuple[dict[int, Floats], bool]:
        """Score each member's own tokens."""
        out: dict[int, Floats] = {}
        greedy = True
        for key, part in parts.items():
            session = self._sessions[key]
            if isinstance(session, TopKOnlySession):
                scores = session.token_scores(np.concatenate([part.before, part.ids]))
                out[key] = scores.logprobs[-len(part.ids) :]
                greedy = greedy and bool(scores.is_top[-len(part.ids) :].all())
                continue
            columns = []
            for targets, logprobs in part.rows(self._sessions[key]):
                columns.append(logprobs[np.arange(len(targets)), targets])
                greedy = greedy and bool((logprobs.argmax(axis=1) == targets).all())
            out[key] = np.concatenate(columns)
        return out, greedy


class RuleContinuationScorer:
    """Scores continuations under the rule of some options, by `mixlm.scoring.rule_scores`.

    In the unit `piece` it is the sum over all ways to spell the continuation.

    Raises:
        UnsupportedError: The rule, the unit or an engine gives no log-probabilities.
    """

    def __init__(self, ensemble: Ensemble, settings: GenerationOptions) -> None:
        self._ensemble = Ensemble(
            ensemble.members, ensemble.weights.tolist(), unit=ensemble.unit, router=ensemble.router, defaults=settings
        )
        self._scorer = RuleScorer(self._ensemble)

    def continuation(self, context: RequestContext, text: str) -> tuple[float, bool]:
        """Return the natural log-probability of `text` after a context, and whether it is the greedy continuation.

        A context that is too long for a member loses its beginning. Raises PromptTooLongError when the continuation
        alone is too long.
        """
        context, data = split_context(context, text)
        if not data:
            return 0.0, True
        parts = [MemberContinuation(member.engine, context, data) for member in self._ensemble.members]
        passage = Passage(data, [part.before for part in parts], context.encoded())
        [logprob], [greedy] = self._scorer.score(passage)
        return float(logprob), bool(greedy)

    def text(self, text: str) -> float:
        """Return the natural log-probability of a text from its beginning, in passages that fit the contexts."""
        return float(self._scorer.logprobs(text_passages(self._ensemble, [text]))[0]) if text else 0.0


class MemberContinuation:
    """One member's reading of a request: ids of the continuation, where they end in bytes, ids in front of them.

    cut: whether the context has lost its beginning.
    """

    def __init__(self, engine: Engine, context: RequestContext, data: bytes) -> None:
        self.ids: Ids = np.array(engine.encoder.encode(data).ids, dtype=np.int64)
        self.bounds: npt.NDArray[np.int64] = token_ends(engine.vocabulary, self.ids)
        prefix = engine.prompts.prefix(engine.vocabulary.end_ids)
        before = context.ids(engine) if context.messages or context.text else np.array(prefix, dtype=np.int64)
        room = engine.context_length + 1 - len(self.ids)  # the last token is not run
        if room < len(prefix) + 1:
            raise PromptTooLongError(
                f"a continuation has {len(self.ids)} tokens for {engine.name}, whose context holds "
                f"{engine.context_length}"
            )
        self.cut = len(before) > room
        if self.cut:
            before = np.concatenate([prefix, before[len(before) - room + len(prefix) :]]).astype(np.int64)
        self.before = before

    def rows(self, session: Session) -> Iterator[tuple[Ids, Floats]]:
        """Give the continuation's ids and the log-probabilities they are taken from, (n,) and (n, vocab), in blocks."""
        whole = np.concatenate([self.before, self.ids])
        for start in range(0, len(self.ids), _ROWS):
            end = min(start + _ROWS, len(self.ids))
            logits = session.logits(whole[: len(self.before) + end - 1], last=end - start)
            yield self.ids[start:end], log_softmax(logits)


def split_context(context: RequestContext, text: str) -> tuple[RequestContext, bytes]:
    """Return a context and the continuation's bytes. A space at the end of a plain text belongs to what follows:
    tokenizers put it at the beginning of a word."""
    if context.messages is None:
        stripped = context.text.rstrip()
        text, context = context.text[len(stripped) :] + text, RequestContext(stripped)
    return context, text.encode(errors="replace")


def rule_settings(ensemble: Ensemble, options: Mapping[str, Any]) -> GenerationOptions:
    """Return the default options of an ensemble with the rule of some options over theirs, whatever the method."""
    given = {name: options[name] for name in RULE_OPTIONS if name in options}
    return ensemble.defaults.with_options({"method": "conventional", "draft": None, **given})
