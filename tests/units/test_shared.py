from __future__ import annotations

import numpy as np

from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.units.token import TokenUnit, vocabulary_conflict


def vocabulary(tokens: str, size: int = 0, end_ids=(), special_ids=()) -> Vocabulary:
    return Vocabulary.of({i: c.encode() for i, c in enumerate(tokens)}, size or len(tokens), end_ids, special_ids)


def test_equal_bytes_for_equal_ids_are_one_vocabulary_whatever_the_padding():
    assert vocabulary_conflict([vocabulary("abc"), vocabulary("abc", size=8), vocabulary("abcd")]) is None
    assert vocabulary_conflict([vocabulary("abc")]) is None


def test_special_tokens_that_only_one_has_are_no_conflict():
    assert vocabulary_conflict([vocabulary("abc", special_ids=[2]), vocabulary("abx")]) is None


def test_a_conflict_names_the_first_id_and_how_many_there_are():
    assert vocabulary_conflict([vocabulary("abcd"), vocabulary("abcd"), vocabulary("axcy")]) == (
        "2 ids spell different tokens, the first of them 1: b'b' and b'x'"
    )


def test_symbols_are_the_shared_ids_and_one_end():
    first = vocabulary("abcd", size=8, end_ids=[4, 5], special_ids=[6])
    other = vocabulary("abcde", size=6, end_ids=[5], special_ids=[1])
    unit = TokenUnit([first, other])
    assert unit.end == 8
    # 1 is a special token of the other; 4 is text in the other only; 6 and 7 are a special token and padding.
    assert unit.symbols(0).tolist() == [0, -1, 2, 3, 8, 8, -1, -1]
    assert unit.symbols(1).tolist() == [0, -1, 2, 3, -1, 8]
    assert [unit.symbol_bytes(i) for i in (0, 2, 3)] == [b"a", b"c", b"d"]


def test_the_state_is_the_ids_behind_each_members_prompt():
    unit = TokenUnit([vocabulary("abc"), vocabulary("abc")])
    state = unit.initial_state([np.array([9, 8]), np.array([7])])
    assert state.ids(0).tolist() == [9, 8]
    for symbol in (2, 0, 2):
        state.append(symbol)
    assert state.ids(0).tolist() == [9, 8, 2, 0, 2]
    assert state.ids(1).tolist() == [7, 2, 0, 2]
    assert (state.prompt_length(0), state.prompt_length(1)) == (2, 1)


def test_the_last_bytes_are_at_hand_whatever_was_taken_back(monkeypatch):
    unit = TokenUnit([Vocabulary.of(dict(enumerate([b"a", b"bcd", b"ef"])), 3, [], [])] * 2)
    state, ids = unit.initial_state([np.array([1, 1]), np.array([2])]), []
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(0, min(len(ids), 4) + 1))
        state.rollback(count)
        ids = ids[: len(ids) - count]
        for symbol in rng.integers(0, 3, size=3).tolist():
            state.append(symbol)
            ids.append(symbol)
        text = b"".join(map(unit.symbol_bytes, ids))
        with monkeypatch.context() as spelled:
            spelled.setattr(TokenUnit, "symbol_bytes", None)  # a router asks at every position: nothing is joined anew
            assert [state.tail(length) for length in (0, 1, 5, 10_000)] == [
                text[max(len(text) - length, 0) :] for length in (0, 1, 5, 10_000)
            ]
