"""The probability of a given continuation under the mixture.

Context and continuation are encoded apart, so that every member has a token boundary between them. Inside the
continuation the members meet where all of them have a boundary, as in `mixlm.scoring`: a segment's probability is
`Σ_i λ_i P_i(segment | before)`. In the unit `token` every token is a segment, and the result is exact. Where a
tokenizer changes or drops characters, its boundaries are unknown, and the whole continuation is one segment.

Members are scored as they are, without sampling options.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt

from mixlm.engines import Engine
from mixlm.engines.base import Session
from mixlm.ensemble import Ensemble
from mixlm.errors import PromptTooLongError, UnsupportedError
from mixlm.evaluation.contexts import Context
from mixlm.routing import Fixed
from mixlm.sampling import Floats, Ids
from mixlm.scoring import score

# Rows of logits that lie in memory at once; a large vocabulary takes 2 MB a row.
_ROWS = 16


class Likelihood:
    """Scores continuations. Sessions stay open, so that contexts with a common beginning share its forwards.

    alone: score under the member of the largest weight, as `single` writes. Raises UnsupportedError when the ensemble's
    weights depend on the text.
    """

    def __init__(self, ensemble: Ensemble, *, alone: bool = False) -> None:
        if not isinstance(ensemble.router, Fixed):
            raise UnsupportedError(
                "the probability of a given text is computed with fixed weights, and this ensemble has a router",
                "evaluate with weights, or take tasks that generate text",
            )
        self._ensemble = ensemble
        self._weights = np.eye(len(ensemble.members))[np.argmax(ensemble.weights)] if alone else ensemble.weights
        self._live = [i for i, weight in enumerate(self._weights) if weight > 0]
        # Members that share a model would score alike.
        self._engines = {id(one.engine): one.engine for one in (ensemble.members[i] for i in self._live)}
        self._sessions = {key: engine.session() for key, engine in self._engines.items()}

    def continuation(self, context: Context, text: str) -> tuple[float, bool]:
        """Return the natural log-probability of `text` behind a context, and whether it is the greedy continuation.

        Greedy is, where all members have the same tokens of one vocabulary: each token is the most likely one of the
        average. Otherwise: each token of each member of positive weight is that member's most likely one.
        A context that is too long for a member loses its beginning. Raises PromptTooLongError when the continuation
        alone is too long.
        """
        if context.messages is None:
            # Tokenizers put a space at the beginning of a word, so it belongs to the continuation.
            kept = context.text.rstrip()
            text, context = context.text[len(kept) :] + text, Context(kept)
        data = text.encode(errors="replace")
        if not data:
            return 0.0, True
        parts = {key: _Part(engine, context, data) for key, engine in self._engines.items()}
        shared = self._ensemble.unit.name == "token" and len({tuple(one.ids) for one in parts.values()}) == 1
        found = self._together(parts) if shared else self._apart(parts)
        for session in self._sessions.values():
            session.work.log.clear()
        logprobs, greedy = found
        bounds = [one.bounds for one in parts.values()]
        common = np.array([len(data)])
        if all(one[-1] == len(data) for one in bounds):
            common = reduce(np.intersect1d, bounds)
        columns = {key: _by_segment(part.bounds, logprobs[key], common) for key, part in parts.items()}
        joint = [self._log_weight(i) + columns[id(self._ensemble.members[i].engine)] for i in self._live]
        return float(np.logaddexp.reduce(joint, axis=0).sum()), greedy

    def text(self, text: str) -> float:
        """Return the natural log-probability of a text from its beginning, as `mixlm.scoring.score` reads it."""
        return float(score(self._ensemble, text).mixture(self._weights).sum()) if text else 0.0

    def _log_weight(self, member: int) -> float:
        return float(np.log(self._weights[member]))

    def _together(self, parts: dict[int, _Part]) -> tuple[dict[int, Floats], bool]:
        """Score the same tokens under all members, side by side."""
        unit = self._ensemble.unit
        out: dict[int, list[Floats]] = {key: [] for key in parts}
        greedy = True
        for blocks in zip(*(one.rows(self._sessions[key]) for key, one in parts.items()), strict=True):
            rows = dict(zip(parts, blocks, strict=True))
            average = np.zeros((len(blocks[0][0]), unit.end + 1))
            for i in self._live:
                targets, logprobs = rows[id(self._ensemble.members[i].engine)]
                symbols = unit.symbols(i)
                shared, ends = (symbols >= 0) & (symbols != unit.end), symbols == unit.end
                mass = self._weights[i] * np.exp(logprobs)
                average[:, symbols[shared]] += mass[:, shared]
                average[:, unit.end] += mass[:, ends].sum(axis=1)
            greedy = greedy and bool((average.argmax(axis=1) == targets).all())
            for key, (targets, logprobs) in rows.items():
                out[key].append(logprobs[np.arange(len(targets)), targets])
        return {key: np.concatenate(found) for key, found in out.items()}, greedy

    def _apart(self, parts: dict[int, _Part]) -> tuple[dict[int, Floats], bool]:
        """Score each member's own tokens."""
        out: dict[int, Floats] = {}
        greedy = True
        for key, part in parts.items():
            found = []
            for targets, logprobs in part.rows(self._sessions[key]):
                found.append(logprobs[np.arange(len(targets)), targets])
                greedy = greedy and bool((logprobs.argmax(axis=1) == targets).all())
            out[key] = np.concatenate(found)
        return out, greedy


class _Part:
    """One member's reading of a request: ids of the continuation, where they end in bytes, ids in front of them."""

    def __init__(self, engine: Engine, context: Context, data: bytes) -> None:
        self.ids: Ids = np.array(engine.encoder.encode(data).ids, dtype=np.int64)
        self.bounds: npt.NDArray[np.int64] = np.cumsum([len(engine.vocabulary.tokens[i]) for i in self.ids])
        prefix = engine.prompts.prefix(engine.vocabulary.ends)
        before = context_ids(engine, context) if context.messages or context.text else np.array(prefix, dtype=np.int64)
        room = engine.context_length + 1 - len(self.ids)  # the last token is not run
        if room < len(prefix) + 1:
            raise PromptTooLongError(
                f"a continuation has {len(self.ids)} tokens for {engine.name}, whose context holds "
                f"{engine.context_length}"
            )
        if len(before) > room:
            before = np.concatenate([prefix, before[len(before) - room + len(prefix) :]]).astype(np.int64)
        self.before = before

    def rows(self, session: Session) -> Iterator[tuple[Ids, Floats]]:
        """Give the continuation's ids and the log-probabilities they are taken from, (n,) and (n, vocab), in blocks."""
        whole = np.concatenate([self.before, self.ids])
        for start in range(0, len(self.ids), _ROWS):
            end = min(start + _ROWS, len(self.ids))
            logits = session.logits(whole[: len(self.before) + end - 1], last=end - start).astype(np.float64)
            top = logits.max(axis=1, keepdims=True)
            yield self.ids[start:end], logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))


def context_ids(engine: Engine, context: Context) -> Ids:
    """Return a member's ids of a context, int64: its template's, and behind it the beginning of an answer."""
    if context.messages is None:
        return engine.prompts.raw(context.text)
    begun: Sequence[int] = engine.encoder.encode(context.text.encode(errors="replace")).ids if context.text else []
    return np.concatenate([engine.prompts.chat(context.messages), np.array(begun, dtype=np.int64)])


def _by_segment(bounds: npt.NDArray[np.int64], logprobs: Floats, common: npt.NDArray[np.int64]) -> Floats:
    """Add up a member's log-probabilities, (tokens,), by the segments that end at the common boundaries."""
    segments: npt.NDArray[np.int64] = np.searchsorted(common, np.minimum(bounds, common[-1]), side="left")
    return np.bincount(segments, weights=logprobs, minlength=len(common)).astype(np.float64)
