from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlm.engines.vllm.sampling_params import banned_ranges, parse_ranges


@pytest.mark.slow
@given(st.sets(st.integers(0, 300), min_size=1))
def test_ranges_are_parsed_as_they_were_formatted(ids):
    sorted_ids = np.array(sorted(ids))
    np.testing.assert_array_equal(parse_ranges(banned_ranges(sorted_ids)), sorted_ids)


def test_neighbours_are_one_range():
    assert banned_ranges(np.array([0, 1, 2, 7, 9, 10])) == "0-2,7,9-10"
    assert banned_ranges(np.zeros(0, dtype=np.int64)) == ""


@pytest.mark.parametrize("text", ["", "a", "1-", "1--2", "1 to 2"])
def test_malformed_ranges_are_refused(text):
    with pytest.raises(ValueError, match="is no id and no range of ids"):
        parse_ranges(text)
