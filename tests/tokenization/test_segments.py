"""Common boundaries, against a plain loop over tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlm.engines.toy import LongestMatch
from mixlm.errors import ConfigError
from mixlm.tokenization.segments import (
    common_boundaries,
    encode_exactly,
    first_tokens,
    segment_logprobs,
    segment_strings,
    token_ends,
)
from mixlm.tokenization.vocabulary import Vocabulary

TOKENS = [b"a", b"b", b"ab", b"\xc3", b"\xa9"]
VOCABULARY = Vocabulary.of(dict(enumerate(TOKENS)), len(TOKENS), [], [])


@pytest.mark.slow
@given(st.integers(1, 30), st.lists(st.sets(st.integers(1, 29)), min_size=1, max_size=4), st.randoms())
def test_segments_end_where_all_members_have_a_boundary(size, cuts, rng):
    boundaries = [np.array(sorted({end for end in member if end < size} | {size})) for member in cuts]
    common = common_boundaries(boundaries)
    assert common.tolist() == sorted(set.intersection(*(set(ends.tolist()) for ends in boundaries)))
    starts = [0, *common[:-1].tolist()]
    for ends in boundaries:
        logprobs = np.array([-rng.random() for _ in ends])
        expected = [logprobs[(ends > start) & (ends <= end)].sum() for start, end in zip(starts, common, strict=True)]
        assert segment_logprobs(logprobs, ends, common) == pytest.approx(expected)
        tokens = first_tokens(ends, common).tolist()
        assert tokens == [int(np.flatnonzero(ends > start)[0]) for start in starts]


def test_a_token_without_bytes_belongs_to_the_segment_in_front_of_it():
    # The first of them, where a tokenizer adds a space in front of the text, to the first segment.
    ends, common = np.array([0, 2, 2, 3]), np.array([2, 3])
    assert first_tokens(ends, common).tolist() == [0, 3]


def test_ids_are_those_that_spell_the_text():
    ids, ends = encode_exactly(LongestMatch(TOKENS), VOCABULARY, b"abba", "a toy")
    assert (ids, ends.tolist()) == ([2, 1, 0], [2, 3, 4])
    assert token_ends(VOCABULARY, ids).tolist() == [2, 3, 4]


def test_a_text_that_its_tokens_do_not_spell_is_refused():
    class Dropping(LongestMatch):
        def encode(self, data: bytes):
            return super().encode(data.replace(b"b", b""))

    with pytest.raises(ConfigError, match="the tokens of a toy do not spell the text: at 'ba' they have 'a'"):
        encode_exactly(Dropping(TOKENS), VOCABULARY, b"aba", "a toy")


def test_a_split_character_belongs_to_the_segment_that_completes_it():
    text = "aéb".encode()
    starts, ends = np.array([0, 2, 3]), np.array([2, 3, 4])
    assert segment_strings(text, starts, ends) == ["a", "é", "b"]
    # Where the segments do not touch, the character stays incomplete.
    assert segment_strings(text, np.array([0, 3]), np.array([2, 4])) == ["a\ufffd", "b"]
