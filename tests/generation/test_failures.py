"""One request that fails does not end the others, and its error names what is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toys import SHARED, engine, make_ensemble, toys

from mixlm.core.rng import Noise
from mixlm.engines.batching import respond_batched
from mixlm.engines.toy import ToyEngine
from mixlm.errors import ConfigError, EngineError, GenerationInterruptedError, MixlmError, TokenizerError

PROMPTS = ["ab", "c", "b a", "a"]
METHODS = ["mixture", "conventional", "greedy", "single", "speculative", "auto"]
OPTIONS = {"raw": True, "seed": 4, "max_tokens": 12, "ignore_end": True}


class BatchingToy(ToyEngine):
    """Runs all requests of a step in one call, as an engine with batches does."""

    def respond(self, requests):
        return respond_batched(requests, lambda inputs: [i.session.forward(i.ids, i.last) for i in inputs], 99)


def batching_pair(**options):
    members = [BatchingToy(SHARED, engine(seed=seed).table, name=f"m{seed}") for seed in (1, 2)]
    return make_ensemble(members, **options)


def texts(completion):
    return [token.data for token in completion.tokens]


def results(pair, prompts=PROMPTS, **options):
    return dict(pair.generations(prompts, **{**OPTIONS, **options}))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "error",
    [IndexError("index out of range in self"), RuntimeError("device-side assert"), ValueError("x\ny")],
    ids=repr,
)
def test_an_error_in_a_forward_ends_only_the_sequence_that_fails_by_itself(method, error):
    pair = batching_pair()
    expected = [texts(completion) for completion in pair.generate(PROMPTS, method=method, **OPTIONS)]

    def fail(ids, last):
        if ids[:2].tolist() == [6, 4]:  # the prompt "c"
            raise error

    for member in pair.members:
        member.engine.on_forward = fail
    generations = results(pair, method=method)
    assert [index for index, generation in generations.items() if generation.error] == [1]
    assert [texts(generations[i].completion) for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]
    first_line = str(error).splitlines()[0]
    assert f"unexpected {type(error).__name__}: {first_line}" in str(generations[1].error)
    with pytest.raises(GenerationInterruptedError, match=f"m. failed .* unexpected {type(error).__name__}"):
        pair.generate("c", method=method, **OPTIONS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("top_k", [0, 3])
def test_logits_that_are_no_numbers_end_one_sequence_with_member_and_position(method, value, top_k):
    pair = batching_pair()
    options = {"method": method, "top_k": top_k, "temperature": 1.0 if method != "greedy" else 0.7}
    expected = [texts(completion) for completion in pair.generate(PROMPTS, **OPTIONS, **options)]
    for member in pair.members:
        table = member.engine.table

        def broken(context, table=table):
            row = np.array(table(context))
            if context[1] == 4 and len(context) > 4:
                row[slice(None) if value == -np.inf else 2] = value
            return row

        member.engine.table = broken
    generations = results(pair, **options)
    assert [index for index, generation in generations.items() if generation.error] == [1]
    assert [texts(generations[i].completion) for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]
    assert isinstance(generations[1].error, GenerationInterruptedError)
    assert "m" in generations[1].error.message
    assert "the logits after 5 tokens are" in generations[1].error.message
    assert texts(generations[1].completion) == expected[1][: len(generations[1].completion.tokens)]


@pytest.mark.parametrize("unit", ["piece", "word", "byte"])
def test_no_unit_samples_from_logits_that_are_no_numbers(unit):
    members = [engine(seed=1), engine(seed=2)]
    for member in members:
        table = member.table
        member.table = lambda context, table=table: table(context) * (np.nan if len(context) > 3 else 1)
    with pytest.raises(EngineError, match="not finite: one is nan"):
        make_ensemble(members, unit=unit).generate("ab", **OPTIONS)


def test_scores_of_logits_that_are_no_numbers_are_refused():
    broken = engine(seed=1)
    broken.table = lambda context: np.full(len(SHARED) + 2, np.nan)
    with pytest.raises(EngineError, match="the logits after 1 tokens are not finite"):
        broken.session().token_logprobs(np.array([6, 1, 2]))


class Unembedded(BatchingToy):
    """Its tokenizer has a token "!" that the model has no row for."""

    def __init__(self, **options):
        super().__init__(SHARED, engine(seed=1).table, **options)
        vocabulary = self.vocabulary
        names = {**dict(enumerate(vocabulary.names)), vocabulary.size + 3: "<tool>"}
        tokens = dict(enumerate(vocabulary.tokens))
        self.vocabulary = type(vocabulary).of(
            tokens, vocabulary.size, vocabulary.end_ids, vocabulary.special_ids, names
        )
        raw = self.prompts.raw
        self.prompts.raw = lambda text: np.array(
            [*raw(text.replace("!", "")), *[vocabulary.size + 3] * ("!" in text)], dtype=np.int64
        )


def test_a_token_without_an_embedding_is_refused_by_name_before_any_forward():
    pair, passes = make_ensemble([Unembedded(), Unembedded()]), []
    for member in pair.members:
        member.engine.on_forward = lambda ids, last: passes.append(len(ids))
    with pytest.raises(TokenizerError, match=r"'<tool>' \(id 11\) for m0, whose model has embeddings for ids below 8"):
        pair.generate("ab!", **OPTIONS)
    assert passes == []
    generations = results(pair, ["a", "ab!", "b"])
    assert [index for index, generation in generations.items() if generation.error] == [1]


def test_ids_are_looked_at_only_where_a_tokenizer_may_have_tokens_without_an_embedding():
    unnamed, lacking = engine(seed=1), Unembedded()
    vocabulary = unnamed.vocabulary
    unnamed.vocabulary = replace(vocabulary, names=())
    engine(seed=1).vocabulary.check_rows(None, "m")  # of any length, for nothing
    for other in (lacking, unnamed):
        other.vocabulary.check_rows(np.array([1, 2]), "m")
        with pytest.raises(TokenizerError, match="has embeddings for ids below"):
            other.vocabulary.check_rows(np.array([1, 2, 40, 3]), "m")


def test_a_token_without_an_embedding_that_turns_up_in_a_text_ends_that_text_alone():
    member = Unembedded()
    pair = make_ensemble([member])
    good = pair.context(pair.settings(**OPTIONS))
    sequence = good.begin_sequence(pair.encode_prompt("ab", good.settings))
    views = sequence.views[0]
    views.ids = lambda: np.array([6, 1, 11])
    with pytest.raises(TokenizerError, match="'<tool>'"):
        good.decode_step(sequence, Noise(0))


def test_an_error_of_one_prompt_that_is_not_ours_ends_that_one():
    pair = toys("token", 2)
    raw = pair.members[0].engine.prompts.raw

    def broken(text):
        if text == "c":
            raise ZeroDivisionError("division by zero")
        return raw(text)

    pair.members[0].engine.prompts.raw = broken
    generations = results(pair)
    assert [index for index, generation in generations.items() if generation.error] == [1]
    assert isinstance(generations[1].error, MixlmError)
    assert "unexpected ZeroDivisionError" in generations[1].error.message


def test_rolled_back_logits_are_not_those_of_a_longer_text():
    """A request that is given up between its rollback and its forward leaves no response behind."""
    session = engine(seed=1).session()
    session.logits(np.array([6, 1, 2, 3]))
    session.rollback(np.array([6, 1, 2]))
    np.testing.assert_array_equal(session.logits(np.array([6, 1])), engine(seed=1).session().logits(np.array([6, 1])))


def test_an_error_of_a_router_ends_the_sequences_that_it_fails_on():
    from mixlm.routing import FunctionRouter

    router = FunctionRouter(lambda prompt, text: [1 / (prompt != b"c"), 1.0], 2)
    generations = results(toys("token", 2, router=router))
    assert [index for index, generation in generations.items() if generation.error] == [1]
    assert isinstance(generations[1].error, ConfigError)
    assert "ZeroDivisionError" in generations[1].error.message
