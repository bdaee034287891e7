"""Draws of the first two symbols of many replies, for `equivalence`: few forwards, or many replies at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from typing import cast

from mixlm.core.options import GenerationOptions
from mixlm.core.rng import Noise
from mixlm.engines.base import GenerateRequest, GenerateResponse, Request, Response, Session
from mixlm.ensemble import Ensemble
from mixlm.generation.generation import EncodedPrompt, GenerationContext
from mixlm.generation.sequence import Choice
from mixlm.types import Floats, Ids, Logits

Outcome = tuple[int, ...]
_MEMO_BYTES = 512 << 20
_TOGETHER = 16


def drawing(ensemble: Ensemble, settings: GenerationOptions) -> list[GenerationContext]:
    """Return what draws: one that remembers answers, or several at once where engines draw themselves."""
    first = ensemble.context(settings, [_Memo(member.engine.session()) for member in ensemble.members])
    if not all(member.samples_itself for member in first.members):
        return [first]
    return [ensemble.context(settings) for _ in range(_TOGETHER)]


def first_symbols(
    writers: Sequence[GenerationContext],
    prompts: EncodedPrompt,
    samples: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Draw the first two symbols of `samples` replies, or one where a reply ends at once.

    As many at once as there are writers. progress: called with how many are drawn, and how many will be.
    """
    out: list[Outcome] = []
    for first in range(0, samples, len(writers)):
        flows = {
            at: (writer, _outcome(writer, prompts, first + at))
            for at, writer in enumerate(writers)
            if first + at < samples
        }
        replies: dict[int, list[Response] | None] = dict.fromkeys(flows)
        while flows:
            asked: list[tuple[int, Session, Request]] = []
            for at, (writer, flow) in list(flows.items()):
                try:
                    asked += [(at, writer.sessions[one.member], one) for one in flow.send(replies[at])]
                except StopIteration as done:
                    out.append(done.value)
                    del flows[at]
            replies = {at: [] for at in flows}
            answers = _answers(writers[0], [(session, request) for _, session, request in asked])
            for (at, _, _), answer in zip(asked, answers, strict=True):
                cast(list[Response], replies[at]).append(answer)
        if progress is not None:
            progress(len(out), samples)
    return out


def _outcome(
    writer: GenerationContext, prompts: EncodedPrompt, number: int
) -> Generator[list[Request], list[Response] | None, Outcome]:
    """Draw the first two symbols of one reply."""
    writing = writer.begin_sequence(prompts)
    noise, end = Noise(writer.settings.seed, number), writer.unit.end
    found: list[int] = []
    while len(found) < 2 and end not in found:
        choices = yield from cast(
            Generator[list[Request], list[Response] | None, list[Choice]],
            writing.decode_step(writer.strategy, noise.at(len(found)), 2 - len(found)),
        )
        for choice in choices:
            found.append(choice.symbol)
            if choice.symbol != end:
                writing.append(choice)
    return tuple(found)


def _answers(writer: GenerationContext, asked: Sequence[tuple[Session, Request]]) -> list[Response]:
    """Hand each engine all that is asked of it in one call."""
    replies: list[Response] = [None] * len(asked)
    by_engine: dict[int, list[int]] = {}
    for at, (_, request) in enumerate(asked):
        by_engine.setdefault(writer.members[request.member].engine.batch_key, []).append(at)
    for places in by_engine.values():
        engine = writer.members[asked[places[0]][1].member].engine
        for at, reply in zip(places, engine.respond([asked[at] for at in places]), strict=True):
            replies[at] = reply
    return replies


class _Memo(Session):
    """A session that remembers its answers, so that thousands of replies from one prompt cost few forwards."""

    def __init__(self, session: Session) -> None:
        super().__init__(session.context_length)
        self._session = session
        self._known: OrderedDict[bytes, Logits] = OrderedDict()
        self._scores: dict[bytes, Floats] = {}

    def token_logprobs(self, ids: Ids) -> Floats:
        """Return the session's scores."""
        key = ids.tobytes()
        if key not in self._scores:
            self._scores[key] = self._session.token_logprobs(ids)
        return self._scores[key]

    def generate(self, run: GenerateRequest) -> GenerateResponse:
        """Let the session write; what an engine draws is not to be remembered."""
        return self._session.generate(run)

    def logits(self, ids: Ids, last: int = 1) -> Logits:
        """Return the session's logits."""
        key = ids.tobytes()
        if last != 1:
            return self._session.logits(ids, last)
        if key not in self._known:
            self._known[key] = self._session.logits(ids).copy()
            if len(self._known) * self._known[key].nbytes > _MEMO_BYTES:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def prepare(self, ids: Ids, last: int = 1) -> None:
        """Have the answer at hand, so that an engine that runs several sessions at once has nothing to run for this."""
        self._latest = self.logits(ids, last)

    def _truncate(self, length: int) -> int:
        raise AssertionError("a memo holds no cache of its own")

    def _forward(self, ids: Ids, last: int) -> Logits:
        raise AssertionError("a memo runs no forward of its own")
