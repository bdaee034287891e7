"""The log-probabilities of given texts by engines with queues of their own: requests like any other."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest
from toys import SHARED, engine, make_ensemble

from mixlm.core.options import GenerationOptions
from mixlm.engines.base import TextInterface
from mixlm.engines.requests import ScoreRequest
from mixlm.engines.topk_only import TopKOnlyEngine, TopKOnlySession
from mixlm.ensemble import Ensemble
from mixlm.errors import EngineError, GenerationInterruptedError
from mixlm.generation.generation import Generation
from mixlm.generation.scheduler import Scheduler
from mixlm.routing import PromptRouter
from mixlm.types import Candidates

ECHO = {"raw": True, "score_prompt": True, "max_tokens": 0, "top_k": 2}


class ReportingSession(TopKOnlySession):
    def top_tokens(self, ids, count, among=None):
        logits = self._top_k_engine.toy.table(tuple(ids.tolist()))
        top = np.argsort(-logits)[:count]
        return Candidates(top, logits[top])


class ScoringServer(TopKOnlyEngine):
    """A toy that scores texts when the test says so. scores: the requests, and their futures."""

    asynchronous = True
    scores_texts = True

    def __init__(self, seed: int) -> None:
        toy = self.toy = engine(SHARED, seed=seed)
        super().__init__(toy.name, TextInterface(toy.vocabulary, toy.encoder, toy.prompts), toy.context_length)
        self.top_k_limit = 3
        self.device = f"server {seed}"
        self.scores: list[tuple[ScoreRequest, Future]] = []

    def session(self):
        return ReportingSession(self)

    def submit(self, session, request):
        future: Future = Future()
        if isinstance(request, ScoreRequest):
            self.scores.append((request, future))
        else:
            future.set_result(session.logits_rows(request.ids, 1, request.top_k_filter))
        return future

    def answer(self) -> np.ndarray:
        """Answer the first request; return the log-probabilities."""
        request, future = self.scores.pop(0)
        logprobs = self.toy.session().token_logprobs(request.ids)
        future.set_result(logprobs)
        return logprobs


def start(scheduler: Scheduler, ensemble: Ensemble, text: str, **options) -> Generation:
    settings: GenerationOptions = ensemble.settings(seed=1, **options)
    generation = ensemble.context(settings).start(ensemble.encode_prompt(text, settings))
    scheduler.add(generation)
    return generation


def test_others_are_generated_while_servers_score_a_text():
    servers = [ScoringServer(1), ScoringServer(2)]
    scheduler = Scheduler(4)
    writing = start(scheduler, make_ensemble([engine(SHARED, seed=3)]), "ab", raw=True, max_tokens=20, ignore_end=True)
    scheduler.step()
    echo = start(scheduler, make_ensemble(servers, [0.5, 0.5], unit="token"), "ab c", **ECHO)
    for _ in range(3):
        assert scheduler.step() == [writing]
    assert [len(server.scores) for server in servers] == [1, 1]  # both are asked at once
    assert not echo.finished
    logprobs = [server.answer() for server in servers]
    assert {*scheduler.run()} == {writing, echo}
    expected = np.logaddexp(*logprobs) - np.log(2)
    np.testing.assert_allclose([token.logprob for token in echo.completion.prompt], expected)


def test_a_score_that_is_given_up_is_cancelled_and_a_step_does_not_wait_for_it():
    server, scheduler = ScoringServer(1), Scheduler(4)
    echo = start(scheduler, make_ensemble([server]), "ab c", **ECHO)
    assert scheduler.step() == []  # so that others can come, and this one can be given up
    [(_, future)] = server.scores
    scheduler.cancel(echo)
    assert future.cancelled()
    assert scheduler.free_slots == 4
    later = start(scheduler, make_ensemble([engine(SHARED, seed=3)]), "ab", raw=True, max_tokens=2, ignore_end=True)
    assert [*scheduler.run()] == [later]


def test_weights_by_prompt_are_requested_as_scores():
    server, scheduler = ScoringServer(1), Scheduler(4)
    router = PromptRouter(np.array([0.5, 0.5]), 2.0)
    routed = make_ensemble([server, engine(SHARED, seed=2)], unit="token", router=router)
    generation = start(scheduler, routed, "ab c", raw=True, max_tokens=2, top_k=2, ignore_end=True)
    scheduler.step()
    server.answer()
    assert [*scheduler.run()] == [generation]
    assert len(generation.completion.tokens) == 2


def test_a_server_that_fails_to_score_ends_its_generation_alone():
    server, scheduler = ScoringServer(1), Scheduler(4)
    echo = start(scheduler, make_ensemble([server]), "ab c", **ECHO)
    writing = start(scheduler, make_ensemble([engine(SHARED, seed=3)]), "ab", raw=True, max_tokens=2, ignore_end=True)
    scheduler.step()
    server.scores[0][1].set_exception(EngineError("it is gone", ""))
    assert {*scheduler.run()} == {writing, echo}
    assert isinstance(echo.error, GenerationInterruptedError)
    with pytest.raises(GenerationInterruptedError, match="it is gone"):
        raise echo.error
    assert writing.error is None
