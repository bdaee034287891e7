from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mixlm.units.base import TokenBuffer, mark_duplicates


def test_ids_that_share_a_symbol_are_marked():
    assert mark_duplicates(np.array([0, 1, 0, -1, 2, -1])).tolist() == [True, False, True, False, False, False]
    assert mark_duplicates(np.array([-1, -1])).tolist() == [False, False]
    assert mark_duplicates(np.array([3])).tolist() == [False]


@given(
    prompt=st.lists(st.integers(0, 99), max_size=300),
    edits=st.lists(st.tuples(st.integers(0, 400), st.lists(st.integers(0, 99), max_size=300)), max_size=8),
)
def test_a_buffer_holds_the_latest_tokens(prompt, edits):
    buffer, expected = TokenBuffer(np.array(prompt, dtype=np.int64)), list(prompt)
    for drop, ids in edits:
        dropped = min(drop, len(expected))
        buffer.replace_tail(dropped, ids)
        expected = expected[: len(expected) - dropped] + ids
        assert buffer.ids.tolist() == expected


def test_a_buffer_keeps_its_own_copy_of_the_prompt():
    prompt = np.array([1, 2, 3])
    buffer = TokenBuffer(prompt)
    prompt[:] = 0
    assert buffer.ids.tolist() == [1, 2, 3]
