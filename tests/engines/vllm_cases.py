"""What vLLM writes by itself, in whatever way it is reached: held against transformers in float32, token for token.

A test module defines the fixtures `engine` and `exact`, and imports the tests of this one.
"""

from __future__ import annotations

import numpy as np
import pytest
from contract import random_ids

from mixlm.core.sampling import Transform
from mixlm.engines.base import Engine, GenerateRequest
from mixlm.ensemble import Ensemble, MemberSpec
from mixlm.types import Sampling
from mixlm.verification.check import Reference, check

LAWS = [
    Sampling(temperature=1.0, top_k=0),
    Sampling(),
    Sampling(temperature=0.5, top_k=5, top_p=0.9),
    Sampling(temperature=1.5, top_k=0, top_p=0.7),
    Sampling(temperature=1.3, top_k=30, min_p=0.05),
]


def pair(engine: Engine) -> Ensemble:
    return Ensemble([MemberSpec(engine, "a"), MemberSpec(engine, "b")], [0.6, 0.4], unit="piece")


def assert_written(exact: Engine, run: GenerateRequest, written) -> None:
    """Every token may be drawn, and has the log-probability that transformers' own numbers give it."""
    assert 1 <= len(written.ids) <= run.max_tokens
    transform, ids = Transform(run.sampling, run.banned), run.ids
    for token, logprob in zip(written.ids, written.logprobs, strict=True):
        law = transform(exact.session().logits(ids)[0])
        [at] = np.flatnonzero(law.ids == token)
        assert logprob == pytest.approx(law.logprobs[at], abs=2e-3)
        ids = np.append(ids, token)
    ended = [token in exact.vocabulary.end_ids for token in written.ids]
    assert not any(ended[:-1])
    assert ended[-1] or len(written.ids) == run.max_tokens


@pytest.mark.parametrize("sampling", LAWS, ids=str)
def test_what_it_draws_has_the_log_probabilities_of_our_law(engine, exact, sampling):
    banned = np.array([*range(40, 120), *sorted(engine.vocabulary.special_ids)])
    assert engine.samples_itself(sampling, banned)
    session = engine.session()
    for seed in range(3):
        run = GenerateRequest(0, random_ids(engine, 40, seed), 12, sampling, banned, seed)
        written = session.generate(run)
        assert_written(exact, run, written)


def test_a_text_that_is_continued_taken_back_and_changed_is_read_as_it_stands(engine, exact):
    rng = np.random.default_rng(5)
    session, ids = engine.session(), random_ids(engine, 30)
    none = np.zeros(0, dtype=np.int64)
    for step in range(16):
        run = GenerateRequest(0, ids, int(rng.integers(1, 6)), Sampling(top_k=8), none, step)
        written = session.generate(run)
        assert_written(exact, run, written)
        ids = np.concatenate([ids, written.ids])
        move = rng.choice(["go on", "foreign", "cut", "cut and change", "ask"])
        if move == "cut":
            ids = ids[: len(ids) - int(rng.integers(1, 6))]
        elif move == "cut and change":
            ids = np.concatenate([ids[: len(ids) - int(rng.integers(1, 6))], random_ids(engine, 2, step)])
        elif move == "foreign":
            ids = np.concatenate([ids, random_ids(engine, int(rng.integers(1, 5)), step)])
        elif move == "ask":
            found, wanted = session.logits(ids)[0], exact.session().logits(ids)[0]
            assert found.argmax() == wanted.argmax()


def test_a_run_ends_with_the_text_and_not_before(engine, exact):
    run = GenerateRequest(
        0, random_ids(engine, 10), 200, Sampling(temperature=2.0, top_k=0), np.zeros(0, dtype=np.int64), 4
    )
    written = engine.session().generate(run)
    assert_written(exact, run, written)


def test_equal_seeds_write_equal_tokens_and_others_others(engine):
    ids, none = random_ids(engine, 20), np.zeros(0, dtype=np.int64)
    runs = [
        engine.session().generate(GenerateRequest(0, ids, 10, Sampling(temperature=1.5), none, seed)).ids
        for seed in (1, 1, 2, 3)
    ]
    assert runs[0] == runs[1]
    assert len({tuple(one) for one in runs}) == 3


def test_options_that_mean_something_else_there_are_drawn_here(engine):
    none = np.zeros(0, dtype=np.int64)
    for options in (
        {"min_p": 0.1, "top_p": 0.9},
        {"temperature": 0.001},
        {"temperature": 2.1},
        {"repetition_penalty": 1.1},
    ):
        assert not engine.samples_itself(Sampling(**options), none)
    reply = pair(engine).generate("three", seed=1, max_tokens=12, min_p=0.1, top_p=0.9, ignore_end=True)
    assert len(reply.tokens) == 12


def test_a_reply_up_to_the_end_of_the_context(engine):
    one = pair(engine)
    room = engine.context_length - len(engine.prompts.raw("ab" * 200))
    reply = one.generate("ab" * 200, raw=True, seed=1, max_tokens=2000, ignore_end=True)
    assert reply.finish_reason == "length"
    assert room - 40 <= len(reply.tokens) <= room + 1


def test_many_replies_at_once_are_those_written_alone(engine):
    one, options = pair(engine), {"seed": 3, "max_tokens": 10, "ignore_end": True}
    alone = [one.generate("three", sequence=i, **options).text for i in range(4)]
    assert [reply.text for reply in one.generate(["three"] * 4, **options)] == alone


def test_texts_follow_the_exact_law_of_transformers(engine, exact):
    report = check(pair(engine), "three", samples=500, reference=Reference(pair(exact)))
    assert report.equal
    assert {one.left for one in report.comparisons} >= {"mixture", "conventional", "single"}
