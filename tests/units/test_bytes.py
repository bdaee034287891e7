from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import VOCABULARIES, engine, make_ensemble

from mixlm.types import Candidates
from mixlm.units.byte import PrefixIndex, RankedDistribution, last_forced_boundary

TOKENS = [b"a", b"b", b"ab", b"abc", b"ba", b"\xff", b"\xff\xff", b"\xff\xffa", b"a\xff", b" b", b" ", b"bbbb", b"c"]
END = 99
texts = st.text(alphabet="ab c\xff", max_size=9).map(lambda text: text.encode("latin-1"))


@pytest.fixture(name="index")
def _index() -> PrefixIndex:
    rng = np.random.default_rng(0)
    return PrefixIndex(dict(zip(rng.permutation(50).tolist(), TOKENS, strict=False)), END)


def tokens_of(index: PrefixIndex, ranks) -> set[bytes]:
    return {index.token_bytes(rank) for rank in ranks}


@given(text=texts)
def test_tokens_are_found_by_their_prefixes(text):
    index = PrefixIndex(dict(enumerate(TOKENS)), END)
    assert tokens_of(index, range(*index.with_prefix(text))) == {token for token in TOKENS if token.startswith(text)}
    assert tokens_of(index, range(*index.extensions_of(text))) == {
        token for token in TOKENS if token.startswith(text) and len(token) > len(text)
    }
    prefixes = index.prefixes_of(text)
    assert tokens_of(index, [rank for _, rank in prefixes]) == {token for token in TOKENS if text.startswith(token)}
    assert all(len(index.token_bytes(rank)) == length for length, rank in prefixes)


@given(text=texts)
def test_a_forced_boundary_is_where_no_token_can_lie_across(text):
    def is_crossed(offset: int) -> bool:
        return any(
            start + len(token) > offset and text[start:].startswith(token[: len(text) - start])
            for start in range(offset)
            for token in TOKENS
        )

    boundaries = [offset for offset in range(1, len(text)) if not is_crossed(offset)]
    assert last_forced_boundary(PrefixIndex(dict(enumerate(TOKENS)), END), text) == max(boundaries, default=0)


def test_symbols_keep_their_numbers(index):
    assert len(index) == len(TOKENS) + 1
    symbols = index.symbols(range(len(index)))
    assert symbols[-1] == index.end == END
    assert index.ranks[symbols].tolist() == list(range(len(index)))


def test_a_ranked_distribution_is_the_same_distribution(index):
    symbols = index.symbols([3, 13, 0, 7])
    distribution = RankedDistribution.from_candidates(index, Candidates(symbols, np.log([0.1, 0.2, 0.3, 0.4])))
    assert distribution.ranks.tolist() == [0, 3, 7, 13]
    np.testing.assert_allclose(np.exp(distribution.logprobs), [0.3, 0.1, 0.4, 0.2])
    assert distribution.symbols.tolist() == index.symbols([0, 3, 7, 13]).tolist()
    assert distribution.mass(distribution.span(1, 8)) == pytest.approx(0.5)
    assert distribution.mass(distribution.span(4, 7)) == 0


def test_bytes_are_symbols_and_tokens_are_too():
    toy = make_ensemble([engine(VOCABULARIES[0]), engine(VOCABULARIES[2])], unit="byte")
    unit = toy.unit
    assert [unit.symbol_bytes(b) for b in range(256)] == [bytes([b]) for b in range(256)]
    for i, member in enumerate(toy.members):
        for token, symbol in enumerate(unit.symbols(i).tolist()):
            vocabulary = member.engine.vocabulary
            if token in vocabulary.end_ids:
                assert symbol == unit.end
            elif token in vocabulary.special_ids:
                assert symbol == -1
            else:
                assert unit.symbol_bytes(symbol) == vocabulary.tokens[token]


def new_state():
    return make_ensemble([engine(VOCABULARIES[0]), engine(VOCABULARIES[2])], unit="byte").unit.initial_state(
        [np.array([6]), np.array([8])]
    )


@pytest.mark.slow
@given(edits=st.lists(st.tuples(st.integers(0, 4), st.text(alphabet="abc ", max_size=4)), max_size=12))
def test_a_state_has_the_ids_of_a_new_one_at_every_prefix(edits):
    state = new_state()
    text = b""
    for dropped, added in edits:
        count = min(dropped, len(text))
        state.rollback(count)
        text = text[: len(text) - count] + added.encode()
        for byte in added.encode():
            state.append(byte)
        assert (len(state), state.substring(0), state.substring(1, 3)) == (len(text), text, text[1:3])
        for i in range(2):
            for offset in {0, len(text) // 2, len(text)}:
                fresh = new_state()
                for byte in text[:offset]:
                    fresh.append(byte)
                assert state.ids_at(i, offset).tolist() == fresh.ids(i).tolist()
            assert state.forced_boundary(i) == last_forced_boundary(state.prefix_indexes[i], text)


def test_an_output_is_dropped_for_another_text_and_behind_a_new_forced_boundary():
    state = new_state()
    for byte in b"ab":
        state.append(byte)
    for offset in range(3):
        state.cache_output(0, offset, f"output {offset}")
    state.rollback(1)
    state.append(ord("b"))
    assert [state.cached_output(0, offset) for offset in range(3)] == ["output 0", "output 1", "output 2"]
    state.rollback(1)
    for byte in b"c c":
        state.append(byte)
    assert [state.cached_output(0, offset) for offset in range(3)] == ["output 0", "output 1", None]
    assert state.forced_boundary(0) == 2
    state.cache_output(0, 3, "output 3")
    assert [state.cached_output(0, offset) for offset in range(4)] == [None, None, None, "output 3"]
    assert state.cached_output(1, 3) is None
