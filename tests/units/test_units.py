from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mixlm.units.base import TokenBuffer, doubled


def test_ids_that_share_a_symbol_are_marked():
    assert doubled(np.array([0, 1, 0, -1, 2, -1])).tolist() == [True, False, True, False, False, False]
    assert doubled(np.array([-1, -1])).tolist() == [False, False]
    assert doubled(np.array([3])).tolist() == [False]


@given(
    prompt=st.lists(st.integers(0, 99), max_size=300),
    rewrites=st.lists(st.tuples(st.integers(0, 400), st.lists(st.integers(0, 99), max_size=300)), max_size=8),
)
def test_a_buffer_holds_what_was_written_last(prompt, rewrites):
    buffer, expected = TokenBuffer(np.array(prompt, dtype=np.int64)), list(prompt)
    for most, ids in rewrites:
        fallen = min(most, len(expected))
        buffer.rewrite(fallen, ids)
        expected = expected[: len(expected) - fallen] + ids
        assert buffer.ids.tolist() == expected


def test_a_buffer_keeps_its_own_copy_of_the_prompt():
    prompt = np.array([1, 2, 3])
    buffer = TokenBuffer(prompt)
    prompt[:] = 0
    assert buffer.ids.tolist() == [1, 2, 3]
