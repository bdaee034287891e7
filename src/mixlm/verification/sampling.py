"""Samples of the first two symbols of many completions, with few forwards or with many completions at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from typing import cast

from mixlm.core.options import GenerationOptions
from mixlm.core.rng import Noise
from mixlm.engines.base import Session
from mixlm.engines.requests import AllowedIds, GenerateRequest, GenerateResponse, Request, Response
from mixlm.ensemble import Ensemble
from mixlm.generation.dispatch import Dispatcher, EngineRequest
from mixlm.generation.generation import GenerationContext
from mixlm.generation.member import address
from mixlm.generation.prompt import EncodedPrompt
from mixlm.generation.sequence import Choice
from mixlm.types import Floats, HiddenStates, Ids, Logits, LogitsRows, TopKFilter

Outcome = tuple[int, ...]
_MEMO_BYTES = 512 << 20
_MEMO_TOP_K = 4096
_MOST_REPORTS = 4096  # that are kept at once
_TOGETHER = 16


def memo_sessions(ensemble: Ensemble) -> list[Session]:
    """Return a session of each member that remembers responses: of every completion, with every method."""
    return [_MemoSession(member.engine.session()) for member in ensemble.members]


def sampling_contexts(
    ensemble: Ensemble, settings: GenerationOptions, memos: Sequence[Session]
) -> list[GenerationContext]:
    """Return one context that remembers responses, or several to sample at once where engines sample themselves."""
    memo_context = ensemble.context(settings, memos)
    if not all(member.samples_itself for member in memo_context.members):
        return [memo_context]
    return [ensemble.context(settings) for _ in range(_TOGETHER)]


def first_symbols(
    contexts: Sequence[GenerationContext],
    prompts: EncodedPrompt,
    samples: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Sample the first two symbols of `samples` completions, or one where a completion ends at once.

    As many at once as there are contexts. progress: called with the number of completions so far, and of all.
    """
    outcomes: list[Outcome] = []
    dispatcher = Dispatcher()
    for first in range(0, samples, len(contexts)):
        running = {
            i: (context, _outcome(context, prompts, first + i))
            for i, context in enumerate(contexts)
            if first + i < samples
        }
        responses: dict[int, list[Response] | None] = dict.fromkeys(running)
        while running:
            owners: list[int] = []
            requests: list[EngineRequest] = []
            for i, (context, generator) in list(running.items()):
                try:
                    addressed = address(generator.send(responses[i]), context.members, context.sessions)
                    requests += addressed
                    owners += [i] * len(addressed)
                except StopIteration as stop:
                    outcomes.append(stop.value)
                    del running[i]
            responses = {i: [] for i in running}
            for i, response in zip(owners, dispatcher.respond(requests), strict=True):
                cast(list[Response], responses[i]).append(response)
        if progress is not None:
            progress(len(outcomes), samples)
    return outcomes


def _outcome(
    context: GenerationContext, prompts: EncodedPrompt, number: int
) -> Generator[list[Request], list[Response] | None, Outcome]:
    """Sample the first two symbols of one completion."""
    sequence = context.begin_sequence(prompts)
    noise, end = Noise(context.settings.seed, number), context.unit.end
    symbols: list[int] = []
    while len(symbols) < 2 and end not in symbols:
        if len(symbols) == context.settings.min_tokens > 0:
            sequence.use_members(context.members)
        limit = min(2, context.settings.min_tokens) if len(symbols) < context.settings.min_tokens else 2
        choices = yield from cast(
            Generator[list[Request], list[Response] | None, list[Choice]],
            sequence.decode_step(context.strategy, noise.at(len(symbols)), limit - len(symbols)),
        )
        for choice in choices:
            symbols.append(choice.symbol)
            if choice.symbol != end:
                sequence.state.append(choice.symbol)
    return tuple(symbols)


class _MemoSession(Session):
    """A session that remembers logits, so that thousands of completions of one prompt take few forwards.

    Where hidden states are kept, it remembers those of the same positions too.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session.context_length)
        self._session = session
        self._known: OrderedDict[tuple[bytes, int], tuple[Logits, HiddenStates | None]] = OrderedDict()
        self._bytes = 0  # of the logits in it
        self._reports: dict[tuple[bytes, int, int, bytes], LogitsRows] = {}
        self._scores: dict[bytes, Floats] = {}

    def token_logprobs(self, ids: Ids, first: int = 1) -> Floats:
        """Return the session's scores."""
        key = ids.tobytes()
        if key not in self._scores:
            self._scores[key] = self._session.token_logprobs(ids)
        return self._scores[key][first - 1 :]

    def generate(self, run: GenerateRequest) -> GenerateResponse:
        """Let the session generate; samples are not remembered."""
        return self._session.generate(run)

    def keep_hidden(self) -> None:
        """Keep the session's hidden states; what was remembered without them is forgotten."""
        if not self.keeps_hidden:
            self._known.clear()
            self._bytes = 0
        super().keep_hidden()
        self._session.keep_hidden()

    def logits(self, ids: Ids, last: int = 1) -> Logits:
        """Return the session's logits."""
        key = ids.tobytes(), last
        if key not in self._known:
            logits, hidden = self._session.logits(ids, last).copy(), self._session.hidden_states
            self._known[key] = logits, None if hidden is None else hidden[-last:].copy()
            self._bytes += logits.nbytes
            while self._bytes > _MEMO_BYTES and len(self._known) > 1:
                self._bytes -= self._known.popitem(last=False)[1][0].nbytes
        self._known.move_to_end(key)
        logits, self.hidden_states = self._known[key]
        return logits

    def logits_rows(
        self, ids: Ids, last: int = 1, top_k_filter: TopKFilter | None = None, allowed: AllowedIds = ()
    ) -> LogitsRows:
        """Return what `logits` does, or what an engine of top tokens reports for a rule or a grammar."""
        if not allowed and (top_k_filter is None or not top_k_filter.normalized):
            return self.logits(ids, last)
        if allowed or top_k_filter is None or top_k_filter.k > _MEMO_TOP_K:
            return self._session.logits_rows(ids, last, top_k_filter, allowed)
        key = ids.tobytes(), last, top_k_filter.k, top_k_filter.banned.tobytes()
        if key not in self._reports:
            if len(self._reports) >= _MOST_REPORTS:
                self._reports.clear()
            self._reports[key] = self._session.logits_rows(ids, last, top_k_filter)
        return self._reports[key]

    def truncate(self, length: int) -> int:
        raise AssertionError("a memo holds no cache of its own")

    def forward(self, ids: Ids, last: int) -> Logits:
        raise AssertionError("a memo runs no forward of its own")
