"""Given texts with a router that observes a member: the same weights as in generation, everywhere a text is scored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from toys import toys

from mixlm.errors import UnsupportedError
from mixlm.evaluation.contexts import RequestContext
from mixlm.evaluation.likelihood import ContinuationScorer
from mixlm.routing import FixedRouter, Observation, Observes, PromptContext
from mixlm.routing.observation import ObservedStates, observation
from mixlm.scoring.score import score, score_answers
from mixlm.scoring.scores import concatenate, router_weights, split_holdout

TEXT = b"abc ab c cab a bc"


class Observing:
    def __init__(self, members: int, member: int, *, hidden: bool) -> None:
        self.members = members
        self.observes = Observes(member, 3, hidden)

    def begin(self, context: PromptContext) -> Any:
        return lambda state, seen: self.weights(seen)

    def weights(self, seen: Observation) -> np.ndarray:
        signal = seen.ids[0] + 10 * seen.logprobs[0] + (0 if seen.hidden is None else 3 * float(seen.hidden[0]))
        scores = np.exp(np.sin(signal * np.arange(1, self.members + 1)))
        return scores / scores.sum()

    def at(self, engine: Any, ids: Any) -> np.ndarray:
        """The weights behind a member's ids, from a table lookup of its own."""
        row = engine.table(tuple(int(i) for i in ids)).astype(np.float32)
        return self.weights(observation(row, self.observes, row.astype(np.float16) if self.observes.hidden else None))


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("unit", ["token", "piece"])
def test_weights_along_a_text_are_those_in_front_of_each_segment(unit: str, hidden: bool) -> None:
    router = Observing(2, 1, hidden=hidden)
    ensemble = toys(unit, 2, router=router)
    scores = score(ensemble, TEXT)
    engine = ensemble.members[1].engine
    prefix = engine.prompts.prefix(engine.vocabulary.end_ids)
    ids = engine.encoder.encode(TEXT).ids
    ends = np.cumsum([len(engine.vocabulary.tokens[i]) for i in ids])
    weights = router_weights(scores, router)
    for start, actual in zip(scores.starts, weights, strict=True):
        before = ids[: int((ends <= start).sum())]
        np.testing.assert_allclose(actual, router.at(engine, [*prefix, *before]), atol=1e-12)
    assert np.ptp(weights[:, 0]) > 0.1
    # The parts of a text, and several texts, keep what was observed.
    first, last = split_holdout(scores, 0.5)
    np.testing.assert_array_equal(router_weights(concatenate([first, last]), router), weights)


def test_answers_and_continuations_are_weighted_alike() -> None:
    router = Observing(2, 0, hidden=True)
    ensemble = toys("token", 2, router=router)
    settings = ensemble.settings(raw=True)
    scores = score_answers(ensemble, [("ab c", "a bc"), ("c", "ab")], settings=settings, ends=True)
    assert len(scores.ends) == len(router_weights(scores, router))
    assert (scores.starts == scores.ends).sum() == 2  # ends of answers are states too
    scorer = ContinuationScorer(ensemble)
    logprob, _ = scorer.continuation(RequestContext("ab c"), "a bc")
    answer = scores.passage_starts == 0
    inner = answer & (scores.starts < scores.ends)
    mixed = scores.mixture(router_weights(scores, router))
    assert logprob == pytest.approx(mixed[inner].sum(), abs=1e-6)


@pytest.mark.parametrize("unit", ["token", "piece"])
def test_a_prompt_is_scored_with_the_observed_weights(unit: str) -> None:
    router = Observing(2, 1, hidden=True)
    ensemble = toys(unit, 2, router=router)
    completion = ensemble.generate("abc ab", raw=True, score_prompt=True, max_tokens=1, top_logprobs=2)
    scores = score(ensemble, b"abc ab")
    mixed = scores.mixture(router_weights(scores, router))
    np.testing.assert_allclose([token.logprob for token in completion.prompt], mixed, atol=1e-6)


def test_scores_without_observations_are_refused_by_name() -> None:
    plain = score(toys("token", 2), TEXT)
    with pytest.raises(UnsupportedError, match="these scores hold no observations"):
        router_weights(plain, Observing(2, 0, hidden=False))
    seen = score(toys("token", 2, router=Observing(2, 0, hidden=False)), TEXT)
    with pytest.raises(UnsupportedError, match="these scores hold no observations"):
        router_weights(seen, Observing(2, 0, hidden=True))
    with pytest.raises(UnsupportedError, match="observes m1, and these scores hold observations of m0"):
        router_weights(seen, Observing(2, 1, hidden=False))
    np.testing.assert_allclose(router_weights(seen, FixedRouter(np.array([0.25, 0.75])))[0], [0.25, 0.75])


@pytest.mark.parametrize("hidden", [False, True])
def test_observations_are_cached_and_read_back(hidden: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path))
    ensemble = toys("token", 2, router=Observing(2, 0, hidden=hidden))
    names = ["model 0", "model 1"]
    first = score(ensemble, TEXT, identities=names)
    ran: list[int] = []
    for member in ensemble.members:
        member.engine.on_forward = lambda ids, last: ran.append(last)  # type: ignore[attr-defined]
    again = score(ensemble, TEXT, identities=names)
    assert not ran
    assert isinstance(first.observed, ObservedStates)
    assert isinstance(again.observed, ObservedStates)
    np.testing.assert_array_equal(first.observed.ids, again.observed.ids)
    np.testing.assert_array_equal(first.observed.logprobs, again.observed.logprobs)
    assert (again.observed.hidden is not None) == hidden
    if hidden:
        np.testing.assert_array_equal(first.observed.hidden, again.observed.hidden)
