"""Features are a function of the last bytes alone, and the same in scoring and in generation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlm.routing import LearnedRouter, PromptContext
from mixlm.routing.features import FEATURE_TAIL, FEATURES, WINDOWS, features

texts = st.binary(max_size=200).map(lambda data: data * 12)


def test_they_look_back_8192_bytes() -> None:
    assert max(WINDOWS) == FEATURE_TAIL == 8192


long = st.binary(min_size=40, max_size=200).map(lambda data: (data * FEATURE_TAIL)[: FEATURE_TAIL + len(data)])


@pytest.mark.slow
@given(long, st.binary(max_size=300), st.binary(max_size=300))
def test_nothing_further_back_counts(tail: bytes, first: bytes, other: bytes) -> None:
    result = [features(front + tail, np.array([len(front + tail)])) for front in (first, other)]
    assert (result[0] == result[1]).all()


def test_everything_in_sight_counts() -> None:
    text = b"a" * FEATURE_TAIL
    result = features(b"7" + text[1:], np.array([FEATURE_TAIL]))
    assert (result != features(text, np.array([FEATURE_TAIL]))).any()


@given(texts, st.data())
def test_a_place_in_a_text_and_the_tail_before_it_are_the_same(text: bytes, data: st.DataObject) -> None:
    places = np.array(data.draw(st.lists(st.integers(0, len(text)), min_size=1, max_size=8)))
    result = features(text, places)
    assert result.shape == (len(places), FEATURES)
    for row, place in zip(result, places, strict=True):
        tail = text[:place][-FEATURE_TAIL:]
        assert (features(tail, np.array([len(tail)]))[0] == row).all()


class Written:
    """A state as far as a router looks at it."""

    def __init__(self, text: bytes) -> None:
        self._text = text

    def tail(self, length: int) -> bytes:
        return self._text[max(len(self._text) - length, 0) :]


@given(st.binary(max_size=1500), st.binary(max_size=1500))
def test_a_gate_sees_the_same_in_generation_as_in_scoring(prompt: bytes, continuation: bytes) -> None:
    gate = LearnedRouter(np.random.default_rng(0).normal(size=(3, FEATURES)), ["a", "b", "c"])
    route = gate.begin(PromptContext(prompt, lambda: np.zeros(3)))
    place = np.array([len(prompt) + len(continuation)])
    scored = gate.weights_at(features(prompt + continuation, place), None)[0]
    assert (route(Written(continuation)) == scored).all()  # type: ignore[arg-type]
    assert scored.sum() == pytest.approx(1)
