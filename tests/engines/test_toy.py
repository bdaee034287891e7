from __future__ import annotations

import numpy as np
import pytest
from toys import SHARED

from mixlm.engines import EngineSpec, load
from mixlm.engines.contract import *  # noqa: F403
from mixlm.engines.toy import WORD_TOKENS, LongestMatch, ToyEngine, random_table
from mixlm.errors import TokenizerError
from mixlm.types import Message


@pytest.fixture
def engine() -> ToyEngine:
    return ToyEngine(seed=3)


def test_a_toy_is_loaded_by_its_seed():
    engine = load(EngineSpec("toy:7", ""))
    assert isinstance(engine, ToyEngine)
    assert engine.name == "toy:7"
    ids = np.array([1, 2, 3])
    np.testing.assert_array_equal(engine.session().logits(ids), load(EngineSpec("toy:7", "")).session().logits(ids))
    assert (engine.session().logits(ids) != load(EngineSpec("toy:8", "")).session().logits(ids)).any()


def test_a_table_looks_at_the_last_ids_only():
    table = random_table(5, seed=1, order=2)
    np.testing.assert_array_equal(table((9, 9, 1, 2)), table((1, 2)))
    assert (table((1, 2)) != table((2, 1))).any()


def test_a_session_answers_from_the_table():
    engine = ToyEngine(SHARED, lambda context: np.arange(8) * len(context))
    np.testing.assert_array_equal(engine.session().logits(np.array([0, 1, 2]), 2), [np.arange(8) * 2, np.arange(8) * 3])


def test_the_longest_token_that_fits_is_taken_and_the_lowest_id_of_equals():
    encoder = LongestMatch([b"a", b"ab", b"b", b"ab"])
    assert encoder.encode(b"abaab").ids == [1, 0, 1]


def test_what_is_stable_has_the_longest_token_behind_its_last_place():
    encoder = LongestMatch([b"a", b"ab", b"abc", b"\n"])
    assert encoder.encode(b"ab\nabca") == ([1, 3, 2, 0], 3, 6)
    assert encoder.encode(b"ab") == ([1], 0, 0)
    assert encoder.encode(b"") == ([], 0, 0)


def test_a_byte_without_token_is_refused():
    with pytest.raises(TokenizerError, match="no token for byte 0x64"):
        LongestMatch(SHARED).encode(b"abcd")


def test_a_prompt_begins_with_the_token_before_the_end():
    engine = ToyEngine(WORD_TOKENS)
    begin, end = len(WORD_TOKENS), len(WORD_TOKENS) + 1
    assert engine.vocabulary.end_ids == {end}
    assert engine.vocabulary.special_ids == {begin, end}
    assert engine.prompts.raw("").tolist() == [begin]
    chat = engine.prompts.chat([Message("user", "<end> the")]).tolist()
    assert chat[0] == begin
    assert b"".join(engine.vocabulary.tokens[i] for i in chat[1:]) == b"user: <end> the\n"
    assert end not in chat
