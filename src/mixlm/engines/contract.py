"""The contract of an engine, as tests: responses depend on the ids alone, and the KV cache is an optimisation.

It needs pytest, and nothing of mixlm imports it. A test module of an engine defines the fixture `engine` and imports
these tests into its own namespace:

    import pytest
    from mixlm.engines.contract import *

    @pytest.fixture
    def engine():
        return load(EngineSpec("ngram:corpus.txt", ""))

Tokens are compared to 1e-4 in float32. For assertions that show the values, a `conftest.py` beside it has
`pytest.register_assert_rewrite("mixlm.engines.contract")`.
"""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest

from mixlm.engines.base import Engine, Session
from mixlm.engines.requests import LogitsRequest, Request, SampleRequest, SampleResponse
from mixlm.errors import PromptTooLongError, UsageError
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Ids, Logits, Message


def random_ids(engine: Engine, length: int, seed: int = 0) -> Ids:
    """Return random ids that spell something: int64 (length,)."""
    spelled = np.flatnonzero([bool(token) for token in engine.vocabulary.tokens])
    return np.random.default_rng(seed).choice(spelled, size=length)


def uncached(engine: Engine, ids: Ids, last: int = 1) -> Logits:
    """Return the logits of a new session: float32 (last, vocab)."""
    return engine.session().logits(ids, last)


def assert_close(actual: Logits, expected: Logits) -> None:
    """Compare logits, to 1e-4."""
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_cached_logits_are_the_uncached_ones_for_any_sequence_of_requests(engine: Engine, seed: int) -> None:
    rng = np.random.default_rng(seed)
    session, ids = engine.session(), random_ids(engine, 6, seed)
    for step in range(14):
        move = rng.choice(["append", "roll back", "rewrite", "jump", "stay"])
        if move == "append":
            ids = np.concatenate([ids, random_ids(engine, int(rng.integers(1, 6)), 100 * seed + step)])
        elif move == "roll back":
            ids = ids[: max(1, len(ids) - int(rng.integers(1, 8)))]
        elif move == "rewrite":
            index = int(rng.integers(len(ids)))
            ids = np.concatenate([ids[:index], random_ids(engine, int(rng.integers(1, 6)), 100 * seed + step)])
        elif move == "jump":
            ids = random_ids(engine, int(rng.integers(1, 12)), 100 * seed + step)
        last = int(rng.integers(1, min(len(ids), 4) + 1))
        assert_close(session.logits(ids, last), uncached(engine, ids, last))


def test_a_long_text_can_be_rolled_back_step_by_step(engine: Engine) -> None:
    session, ids = engine.session(), random_ids(engine, 40)
    session.logits(ids)
    for length in (38, 20, 21, 5, 30, 1):
        assert_close(session.logits(ids[:length]), uncached(engine, ids[:length]))


def test_the_last_logits_are_those_after_each_prefix(engine: Engine) -> None:
    ids, session = random_ids(engine, 7), engine.session()
    session.logits(ids)
    actual = session.logits(ids, 7)
    assert actual.shape == (7, engine.vocabulary.size)
    for end in range(1, 8):
        assert_close(actual[end - 1 : end], uncached(engine, ids[:end]))


def test_the_same_request_twice_runs_no_forward(engine: Engine) -> None:
    session, ids = engine.session(), random_ids(engine, 5)
    first = session.logits(ids).copy()
    count = len(session.stats.forwards)
    np.testing.assert_array_equal(session.logits(ids.copy()), first)
    assert len(session.stats.forwards) == count == 1


def test_a_forward_runs_exactly_the_tokens_that_are_missing(engine: Engine) -> None:
    session, ids = engine.session(), random_ids(engine, 12)
    session.logits(ids[:5])
    session.logits(ids[:6])
    session.logits(ids)
    missing = [(5, 0), (1, 5), (6, 6)]
    everything = [(5, 0), (6, 0), (12, 0)]
    log = [(forward.tokens, forward.cached) for forward in session.stats.forwards]
    assert log == (missing if session.keeps_cache else everything)
    assert session.stats.tokens == sum(tokens for tokens, _ in log)
    assert session.stats.seconds == sum(forward.seconds for forward in session.stats.forwards) >= 0


def test_a_session_keeps_the_logits_of_one_position(engine: Engine) -> None:
    session = engine.session()
    session.logits(random_ids(engine, 6), 5)
    logits = session.last_logits
    assert logits.base is None or logits.base.size == logits.size


def test_logits_do_not_change_with_later_requests(engine: Engine) -> None:
    session, ids = engine.session(), random_ids(engine, 8)
    first = session.logits(ids[:4])
    before = first.copy()
    session.logits(ids)
    session.logits(ids[:3])
    np.testing.assert_array_equal(first, before)


def test_ids_may_be_a_buffer_that_goes_on_changing(engine: Engine) -> None:
    session, buffer = engine.session(), random_ids(engine, 8)
    session.logits(buffer[:6])
    buffer[3] = random_ids(engine, 1, seed=9)[0]
    assert_close(session.logits(buffer), uncached(engine, buffer))


def test_sessions_do_not_disturb_each_other(engine: Engine) -> None:
    first_session, second_session = engine.session(), engine.session()
    first, second = random_ids(engine, 6, 1), random_ids(engine, 9, 2)
    first_session.logits(first[:3])
    second_session.logits(second[:4])
    assert_close(first_session.logits(first), uncached(engine, first))
    assert_close(second_session.logits(second), uncached(engine, second))


@pytest.mark.parametrize(("length", "last"), [(0, 1), (3, 0), (3, 4), (3, -1)])
def test_positions_that_are_not_there_are_refused(engine: Engine, length: int, last: int) -> None:
    with pytest.raises(UsageError, match=f"{last} positions were requested of a sequence of {length} tokens"):
        engine.session().logits(random_ids(engine, length), last)


def test_more_tokens_than_the_context_are_refused_and_the_session_stays_usable(engine: Engine) -> None:
    session = engine.session()
    session.context_length = 10
    with pytest.raises(PromptTooLongError, match="11 tokens are more than the context of 10"):
        session.logits(random_ids(engine, 11))
    ids = random_ids(engine, 10)
    assert_close(session.logits(ids), uncached(engine, ids))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_a_forward_that_fails_leaves_the_session_usable(engine: Engine, error: type[BaseException]) -> None:
    session, ids = engine.session(), random_ids(engine, 12)
    session.logits(ids[:5])
    forward_method = type(session).forward

    def halfway(self: Session, ids: Ids, last: int) -> None:
        forward_method(self, ids[:2], 1)
        raise error

    with patch.object(type(session), "forward", halfway), pytest.raises(error):
        session.logits(ids)
    count = len(session.stats.forwards)
    assert_close(session.logits(ids), uncached(engine, ids))
    assert [(forward.tokens, forward.cached) for forward in session.stats.forwards[count:]] == [(12, 0)]
    assert_close(session.logits(ids[:7]), uncached(engine, ids[:7]))


def test_a_truncation_that_fails_leaves_the_session_usable(engine: Engine) -> None:
    session, ids = engine.session(), random_ids(engine, 8)
    session.logits(ids)
    truncate, lengths = type(session).truncate, []

    def once(self: Session, length: int) -> int:
        lengths.append(length)
        if len(lengths) == 1:
            raise KeyboardInterrupt
        return truncate(self, length)

    with patch.object(type(session), "truncate", once), pytest.raises(KeyboardInterrupt):
        session.logits(ids[:4])
    assert_close(session.logits(ids[:4]), uncached(engine, ids[:4]))


def test_responses_are_in_the_order_of_requests(engine: Engine) -> None:
    first_session, second_session = engine.session(), engine.session()
    ids = random_ids(engine, 6)
    requests: list[tuple[Session, Request]] = [
        (first_session, LogitsRequest(0, ids, 2)),
        (second_session, SampleRequest(1, ids[:4], lambda x: SampleResponse(int(np.argmax(x)), -0.5))),
    ]
    logits, response = engine.respond(requests)
    assert_close(logits, uncached(engine, ids, 2))
    assert response == SampleResponse(int(np.argmax(uncached(engine, ids[:4]))), -0.5)


def test_many_sessions_get_the_responses_that_each_gets_alone(engine: Engine) -> None:
    sessions = [engine.session() for _ in range(4)]
    texts = [random_ids(engine, length, length) for length in (3, 9, 1, 6)]
    sessions[1].logits(texts[1][:5])
    requests = [(session, LogitsRequest(0, ids)) for session, ids in zip(sessions, texts, strict=True)]
    # One of them gets three requests at once, of which the last rolls back.
    requests += [
        (sessions[3], LogitsRequest(0, np.append(texts[3], texts[0]), 2)),
        (sessions[3], LogitsRequest(0, texts[3][:2], 2)),
    ]
    for (_, request), actual in zip(requests, engine.respond(requests), strict=True):
        assert_close(actual, uncached(engine, request.ids, request.last))


def test_a_failed_step_of_many_leaves_all_sessions_usable(engine: Engine) -> None:
    sessions, ids = [engine.session() for _ in range(3)], random_ids(engine, 7)
    for session in sessions:
        session.logits(ids[:4])

    def fails(logits: Logits) -> SampleResponse:
        raise KeyboardInterrupt

    requests: list[tuple[Session, Request]] = [
        (sessions[0], LogitsRequest(0, ids)),
        (sessions[1], SampleRequest(0, ids, fails)),
        (sessions[2], LogitsRequest(0, ids)),
    ]
    with pytest.raises(KeyboardInterrupt):
        engine.respond(requests)
    for session in sessions:
        assert_close(session.logits(ids), uncached(engine, ids))


def test_the_vocabulary_has_ends_among_its_control_tokens(engine: Engine) -> None:
    vocabulary = engine.vocabulary
    assert isinstance(vocabulary, Vocabulary)
    assert vocabulary.end_ids
    assert vocabulary.end_ids <= vocabulary.special_ids
    assert not any(vocabulary.tokens[i] for i in vocabulary.special_ids)


def test_the_engines_encoder_spells_text_in_its_own_tokens(engine: Engine) -> None:
    text = b" the river and of in"
    ids = engine.encoder.encode(text).ids
    assert b"".join(engine.vocabulary.tokens[i] for i in ids) == text
    assert not set(ids) & engine.vocabulary.special_ids


def test_a_raw_prompt_of_a_chat_and_of_a_text_can_be_run(engine: Engine) -> None:
    for ids in (engine.prompts.raw("the river"), engine.prompts.chat([Message("user", "why")])):
        assert ids.dtype == np.int64
        assert engine.session().logits(ids).shape == (1, engine.vocabulary.size)
