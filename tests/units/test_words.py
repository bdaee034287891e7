from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import VOCABULARIES, engine, make_ensemble

from mixlm.units.word import begins_word


def words(pieces: list[str | bytes]) -> list[bytes]:
    """The words that pieces make up."""
    out: list[bytes] = []
    before = b""
    for piece in pieces:
        data = piece.encode() if isinstance(piece, str) else piece
        if not out or begins_word(data, before):
            out.append(b"")
        out[-1] += data
        before += data
    return out


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["The", " riv", "er", " turns", "."], ["The", " river", " turns."]),
        (["It", "'s", " 3", ".", "5", " km", ",", " or", " so"], ["It's", " 3.5", " km,", " or", " so"]),
        (["a", " ", " b", "  ", "c"], ["a", "  b", "  c"]),
        ([" a", " b"], [" a", " b"]),
        (["end", ".", "\n\n", "Next"], ["end.", "\n\nNext"]),
        (["end", ".\n", "Next", "\n"], ["end.\nNext", "\n"]),
        (["of", " the same", " kind"], ["of", " the same", " kind"]),
        (
            ["def", " f", "(x", "):", "\n", "    ", "return", " x", "\n\n"],
            ["def", " f(x):", "\n    return", " x", "\n\n"],
        ),
        (["if", " x", ":", "\r\n", "\t", "\t", " y"], ["if", " x:", "\r\n\t\t y"]),
        (["日本", "語", "の", "テ", "キ", "スト"], ["日本", "語", "の", "テ", "キ", "スト"]),
        (["中文", "。", "x", "y", "，", "他"], ["中文", "。xy，", "他"]),
        (["한국", "어", " 문", "장"], ["한국어", " 문장"]),
        (["Zü", "rich", " caf", "é"], ["Zürich", " café"]),
        (["ok", "👍", "🏽", " ok"], ["ok👍🏽", " ok"]),
        (["a\u3000", "b", "\u3000", "c"], ["a\u3000b", "\u3000c"]),
        ([b"x", "日".encode()[:1], "日".encode()[1:], b"y"], ["x", "日y"]),
        (["日".encode()[:2], "日".encode()[2:] + b" ", b"y"], ["日 y"]),
    ],
)
def test_where_words_begin(pieces, expected):
    assert words(pieces) == [word.encode() for word in expected]


@given(text=st.text(alphabet="日本語のテ한aé👍 \n", max_size=12), cuts=st.sets(st.integers(1, 30)))
def test_no_character_is_split_between_words(text, cuts):
    data = text.encode()
    offsets = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    for word in words([data[a:b] for a, b in pairwise(offsets) if b > a]):
        assert not 0x80 <= word[0] < 0xC0 or not data[: data.index(word)]


TOKENS = [*VOCABULARIES[0], b"\n", b"\t\t", b"\x0b", b"\xe6\x97", b"\xa5", "本".encode(), b"\xea", b"\xe2", b"\xc2\xa0"]


@pytest.mark.parametrize("before", [b"", b"a", b" ", b"a\n", b"\xe6", "日".encode(), b"\xa0"])
def test_word_starts_agree_with_the_rule(before):
    unit = make_ensemble([engine(TOKENS), engine(VOCABULARIES[2])], unit="word").unit
    marks = unit.word_starts(np.arange(unit.end + 1), before)
    assert marks.tolist() == [*(begins_word(unit.symbol_bytes(symbol), before) for symbol in range(unit.end)), True]


def test_a_symbol_belongs_to_one_member():
    toy = make_ensemble([engine(), engine(VOCABULARIES[2])], unit="word")
    unit = toy.unit
    seen: dict[int, tuple[int, bytes]] = {}
    for member, spec in enumerate(toy.members):
        vocabulary = spec.engine.vocabulary
        for token, symbol in enumerate(unit.symbols(member).tolist()):
            if token in vocabulary.end_ids:
                assert symbol == unit.end
            elif token in vocabulary.special_ids:
                assert symbol == -1
            else:
                assert (symbol // unit.count, unit.symbol_bytes(symbol)) == (member, vocabulary.tokens[token])
                assert seen.setdefault(symbol, (member, vocabulary.tokens[token])) == (member, vocabulary.tokens[token])


def test_a_state_knows_the_owner_of_its_word_also_after_a_rollback():
    toy = make_ensemble([engine(), engine(VOCABULARIES[2])], unit="word")
    state = toy.unit.initial_state([np.array([6]), np.array([8])])
    assert state.owner is None
    a, c = (int(toy.unit.symbols(i)[token]) for i, token in ((0, 0), (1, 2)))
    for symbol, owner in ((a, 0), (c, 1), (a, 0)):
        state.append(symbol)
        assert state.owner == owner
    state.rollback(0)
    assert (state.owner, state.tail(9)) == (0, b"a ca")
    state.rollback(1)
    assert (state.owner, state.tail(9), state.ids(0).tolist()) == (1, b"a c", [6, 0, 3])
    assert state.word_start_marker()(np.array([a, c, toy.unit.end])).tolist() == [False, True, True]
    state.rollback(2)
    assert (state.owner, state.tail(9)) == (None, b"")
