from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import VOCABULARIES, engine, ensemble

from mixlm.types import Candidates
from mixlm.units.byte import Law, Lexicon, last_seam

TOKENS = [b"a", b"b", b"ab", b"abc", b"ba", b"\xff", b"\xff\xff", b"\xff\xffa", b"a\xff", b" b", b" ", b"bbbb", b"c"]
END = 99
texts = st.text(alphabet="ab c\xff", max_size=9).map(lambda text: text.encode("latin-1"))


@pytest.fixture(name="lexicon")
def _lexicon() -> Lexicon:
    rng = np.random.default_rng(0)
    return Lexicon(dict(zip(rng.permutation(50).tolist(), TOKENS, strict=False)), END)


def named(lexicon: Lexicon, ranks) -> set[bytes]:
    return {lexicon.spelled(rank) for rank in ranks}


@given(text=texts)
def test_tokens_are_found_by_their_beginnings(text):
    lexicon = Lexicon(dict(enumerate(TOKENS)), END)
    assert named(lexicon, range(*lexicon.within(text))) == {one for one in TOKENS if one.startswith(text)}
    assert named(lexicon, range(*lexicon.beyond(text))) == {
        one for one in TOKENS if one.startswith(text) and len(one) > len(text)
    }
    along = lexicon.along(text)
    assert named(lexicon, [rank for _, rank in along]) == {one for one in TOKENS if text.startswith(one)}
    assert all(len(lexicon.spelled(rank)) == length for length, rank in along)


@given(text=texts)
def test_a_seam_is_where_no_token_lies_across(text):
    def across(place: int) -> bool:
        return any(
            start + len(token) > place and text[start:].startswith(token[: len(text) - start])
            for start in range(place)
            for token in TOKENS
        )

    seams = [place for place in range(1, len(text)) if not across(place)]
    assert last_seam(Lexicon(dict(enumerate(TOKENS)), END), text) == max(seams, default=0)


def test_symbols_keep_their_numbers(lexicon):
    assert len(lexicon) == len(TOKENS) + 1
    symbols = lexicon.symbols(range(len(lexicon)))
    assert symbols[-1] == lexicon.end == END
    assert lexicon.ranks[symbols].tolist() == list(range(len(lexicon)))


def test_a_law_in_order_is_the_same_law(lexicon):
    symbols = lexicon.symbols([3, 13, 0, 7])
    law = Law.of(lexicon, Candidates(symbols, np.log([0.1, 0.2, 0.3, 0.4])))
    assert law.ranks.tolist() == [0, 3, 7, 13]
    np.testing.assert_allclose(np.exp(law.logprobs), [0.3, 0.1, 0.4, 0.2])
    assert law.symbols.tolist() == lexicon.symbols([0, 3, 7, 13]).tolist()
    assert law.mass(law.span(1, 8)) == pytest.approx(0.5)
    assert law.mass(law.span(4, 7)) == 0


def test_bytes_are_symbols_and_tokens_are_too():
    those = ensemble([engine(VOCABULARIES[0]), engine(VOCABULARIES[2])], unit="byte")
    unit = those.unit
    assert [unit.data(b) for b in range(256)] == [bytes([b]) for b in range(256)]
    for i, member in enumerate(those.members):
        for token, symbol in enumerate(unit.symbols(i).tolist()):
            vocabulary = member.engine.vocabulary
            if token in vocabulary.ends:
                assert symbol == unit.end
            elif token in vocabulary.control:
                assert symbol == -1
            else:
                assert unit.data(symbol) == vocabulary.tokens[token]


def states():
    those = ensemble([engine(VOCABULARIES[0]), engine(VOCABULARIES[2])], unit="byte")
    return those, those.unit.begin([np.array([6]), np.array([8])])


@given(pieces=st.lists(st.tuples(st.integers(0, 4), st.text(alphabet="abc ", max_size=4)), max_size=12))
def test_a_state_says_of_each_beginning_what_a_new_one_says(pieces):
    _, state = states()
    text = b""
    for fallen, more in pieces:
        count = min(fallen, len(text))
        state.cut(count)
        text = text[: len(text) - count] + more.encode()
        for byte in more.encode():
            state.append(byte)
        assert (len(state), state.part(0), state.part(1, 3)) == (len(text), text, text[1:3])
        for i in range(2):
            for place in {0, len(text) // 2, len(text)}:
                fresh = states()[1]
                for byte in text[:place]:
                    fresh.append(byte)
                assert state.ids_at(i, place).tolist() == fresh.ids(i).tolist()
            assert state.seam(i) == last_seam(state.lexicons[i], text)


def test_what_is_known_is_forgotten_when_the_text_is_another_or_a_seam_comes_behind_it():
    _, state = states()
    for byte in b"ab":
        state.append(byte)
    for place in range(3):
        state.learn(0, place, f"said at {place}")
    state.cut(1)
    state.append(ord("b"))
    assert [state.known(0, place) for place in range(3)] == ["said at 0", "said at 1", "said at 2"]
    state.cut(1)
    for byte in b"c c":
        state.append(byte)
    assert [state.known(0, place) for place in range(3)] == ["said at 0", "said at 1", None]
    assert state.seam(0) == 2
    state.learn(0, 3, "said at 3")
    assert [state.known(0, place) for place in range(4)] == [None, None, None, "said at 3"]
    assert state.known(1, 3) is None
