"""What vLLM samples itself, in whatever way it is reached: compared with transformers in float32, token for token.

A test module defines the fixtures `engine` and `exact`, and imports the tests of this one.
"""

from __future__ import annotations

import numpy as np
import pytest

from mixlm.binding import LoadedMember
from mixlm.core.sampling import Transform
from mixlm.engines.base import Engine
from mixlm.engines.contract import random_ids
from mixlm.engines.requests import GenerateRequest, GenerateResponse
from mixlm.ensemble import Ensemble
from mixlm.types import Sampling
from mixlm.verification.check import ReferenceSetup, check

SAMPLINGS = [
    Sampling(temperature=1.0, top_k=0),
    Sampling(),
    Sampling(temperature=0.5, top_k=5, top_p=0.9),
    Sampling(temperature=1.5, top_k=0, top_p=0.7),
    Sampling(temperature=1.3, top_k=30, min_p=0.05),
]


def pair(engine: Engine) -> Ensemble:
    return Ensemble([LoadedMember(engine, "a"), LoadedMember(engine, "b")], [0.6, 0.4], unit="piece")


def assert_valid(exact: Engine, request: GenerateRequest, response: GenerateResponse) -> None:
    """Every token may be sampled, and has the log-probability that transformers' logits give it."""
    assert 1 <= len(response.ids) <= request.max_tokens
    transform, ids = Transform(request.sampling, request.banned), request.ids
    for token, logprob in zip(response.ids, response.logprobs, strict=True):
        distribution = transform(exact.session().logits(ids)[0])
        [index] = np.flatnonzero(distribution.ids == token)
        assert logprob == pytest.approx(distribution.logprobs[index], abs=2e-3)
        ids = np.append(ids, token)
    ends = [token in exact.vocabulary.end_ids for token in response.ids]
    assert not any(ends[:-1])
    assert ends[-1] or len(response.ids) == request.max_tokens


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_samples_have_the_log_probabilities_of_the_members_distribution(engine, exact, sampling):
    banned = np.array([*range(40, 120), *sorted(engine.vocabulary.special_ids)])
    assert engine.samples_itself(sampling, banned)
    session = engine.session()
    for seed in range(3):
        request = GenerateRequest(0, random_ids(engine, 40, seed), 12, sampling, banned, seed)
        response = session.generate(request)
        assert_valid(exact, request, response)


def test_a_sequence_that_is_continued_cut_back_and_changed_has_its_own_distribution(engine, exact):
    rng = np.random.default_rng(5)
    session, ids = engine.session(), random_ids(engine, 30)
    none = np.zeros(0, dtype=np.int64)
    for step in range(16):
        request = GenerateRequest(0, ids, int(rng.integers(1, 6)), Sampling(top_k=8), none, step)
        response = session.generate(request)
        assert_valid(exact, request, response)
        ids = np.concatenate([ids, response.ids])
        move = rng.choice(["go on", "foreign", "cut", "cut and change", "logits"])
        if move == "cut":
            ids = ids[: len(ids) - int(rng.integers(1, 6))]
        elif move == "cut and change":
            ids = np.concatenate([ids[: len(ids) - int(rng.integers(1, 6))], random_ids(engine, 2, step)])
        elif move == "foreign":
            ids = np.concatenate([ids, random_ids(engine, int(rng.integers(1, 5)), step)])
        elif move == "logits":
            logits, expected = session.logits(ids)[0], exact.session().logits(ids)[0]
            assert logits.argmax() == expected.argmax()


def test_a_generation_ends_with_the_text_and_not_before(engine, exact):
    request = GenerateRequest(
        0, random_ids(engine, 10), 200, Sampling(temperature=2.0, top_k=0), np.zeros(0, dtype=np.int64), 4
    )
    response = engine.session().generate(request)
    assert_valid(exact, request, response)


def test_equal_seeds_give_equal_tokens_and_other_seeds_others(engine):
    ids, none = random_ids(engine, 20), np.zeros(0, dtype=np.int64)
    texts = [
        engine.session().generate(GenerateRequest(0, ids, 10, Sampling(temperature=1.5), none, seed)).ids
        for seed in (1, 1, 2, 3)
    ]
    assert texts[0] == texts[1]
    assert len({tuple(tokens) for tokens in texts}) == 3


def test_options_that_mean_something_else_there_are_sampled_here(engine):
    none = np.zeros(0, dtype=np.int64)
    for options in (
        {"min_p": 0.1, "top_p": 0.9},
        {"temperature": 0.001},
        {"temperature": 2.1},
        {"repetition_penalty": 1.1},
    ):
        assert not engine.samples_itself(Sampling(**options), none)
    completion = pair(engine).generate("three", seed=1, max_tokens=12, min_p=0.1, top_p=0.9, ignore_end=True)
    assert len(completion.tokens) == 12


def test_a_completion_up_to_the_end_of_the_context(engine):
    capacity = engine.context_length - len(engine.prompts.raw("ab" * 200))
    completion = pair(engine).generate("ab" * 200, raw=True, seed=1, max_tokens=2000, ignore_end=True)
    assert completion.finish_reason == "length"
    assert capacity - 40 <= len(completion.tokens) <= capacity + 1


def test_completions_in_a_batch_are_those_generated_alone(engine):
    both, options = pair(engine), {"seed": 3, "max_tokens": 10, "ignore_end": True}
    alone = [both.generate("three", sequence=i, **options).text for i in range(4)]
    assert [completion.text for completion in both.generate(["three"] * 4, **options)] == alone


def test_texts_follow_the_exact_distribution_of_transformers(engine, exact):
    report = check(pair(engine), "three", samples=500, reference=ReferenceSetup(pair(exact)))
    assert report.equal
    assert {comparison.left for comparison in report.comparisons} >= {"mixture", "conventional", "single"}
