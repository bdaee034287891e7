from __future__ import annotations

import numpy as np
from toys import VOCABULARIES

from mixlm.engines.toy import LongestMatch
from mixlm.tokenization.incremental import Encoded
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.units.piece import PieceUnit

FIRST, SECOND = [b"a", b"ab", b"b", b"ab"], [b"b", b"abc", b"a", b"c"]


def unit(*tokens, ends=(), control=()) -> PieceUnit:
    vocabularies = [Vocabulary.of(dict(enumerate(one)), len(one) + 3, ends, control) for one in tokens]
    return PieceUnit(vocabularies, [LongestMatch(one) for one in tokens])


def test_equal_bytes_are_one_symbol_whatever_their_ids():
    both = unit(FIRST, SECOND, ends=[4, 5], control=[4, 6])
    first, second = both.symbols(0), both.symbols(1)
    assert first[1] == first[3]
    assert first[0] == second[2]
    assert first[2] == second[0]
    assert len({*first[:4], *second[:4]}) == 5 == both.end
    # Two ends are one symbol; the control token and nothing else is masked.
    assert first[4:].tolist() == second[4:].tolist() == [5, 5, -1]
    for tokens, symbols in ((FIRST, first), (SECOND, second)):
        assert [both.data(symbol) for symbol in symbols[:4]] == tokens


def test_rows_without_bytes_are_masked():
    assert unit(FIRST).symbols(0)[4:].tolist() == [-1, -1, -1]


def test_a_vocabulary_without_end_can_be_used():
    both = unit(FIRST, SECOND)
    assert both.end not in both.symbols(0)


def test_each_member_reads_the_bytes_in_its_own_tokens():
    both = unit(FIRST, SECOND)
    state = both.begin([np.array([10]), np.array([20, 21])])
    piece = {both.data(symbol): symbol for symbol in range(both.end)}
    state.append(piece[b"a"])
    assert state.ids(0).tolist() == [10, 0]
    assert state.ids(1).tolist() == [20, 21, 2]
    state.append(piece[b"b"])
    # What was "a", "b" is now the one token "ab" to the first, and still two tokens to the second.
    assert state.ids(0).tolist() == [10, 1]
    assert state.ids(1).tolist() == [20, 21, 2, 0]
    assert (state.prompt_length(0), state.prompt_length(1)) == (1, 2)


def test_what_a_member_reads_depends_on_the_text_alone():
    those = unit(*VOCABULARIES)
    rng = np.random.default_rng(0)
    prompts = [np.array([99])] * len(VOCABULARIES)
    usable = [symbol for symbol in range(those.end) if those.data(symbol)]
    for _ in range(20):
        state, text = those.begin(prompts), b""
        for symbol in rng.choice(usable, size=25):
            state.append(int(symbol))
            text += those.data(int(symbol))
            member = int(rng.integers(len(VOCABULARIES)))
            assert state.ids(member)[1:].tolist() == LongestMatch(VOCABULARIES[member]).encode(text).ids


def test_a_text_that_was_cut_back_is_read_as_if_it_had_never_been_longer():
    those = unit(*VOCABULARIES)
    rng = np.random.default_rng(1)
    usable = [symbol for symbol in range(those.end) if those.data(symbol)]
    state, written = those.begin([np.array([99])] * len(VOCABULARIES)), []
    for _ in range(400):
        if written and rng.random() < 0.4:
            count = int(rng.integers(0, min(len(written), 5) + 1))
            state.cut(count)
            written = written[: len(written) - count]
        else:
            written.append(int(rng.choice(usable)))
            state.append(written[-1])
        if rng.random() < 0.5:
            member = int(rng.integers(len(VOCABULARIES)))
            text = b"".join(those.data(symbol) for symbol in written)
            assert state.ids(member)[1:].tolist() == LongestMatch(VOCABULARIES[member]).encode(text).ids
            assert state.tail(7) == text[-7:]


class Counting(LongestMatch):
    calls = 0

    def encode(self, data: bytes) -> Encoded:
        self.calls += 1
        return super().encode(data)


def test_a_text_is_encoded_only_for_a_member_that_is_asked():
    vocabularies = [Vocabulary.of(dict(enumerate(one)), len(one), [], []) for one in (FIRST, SECOND)]
    encoders = [Counting(FIRST), Counting(SECOND)]
    state = PieceUnit(vocabularies, encoders).begin([np.array([0])] * 2)
    for _ in range(5):
        state.append(0)
    state.ids(0)
    state.ids(0)
    assert [one.calls for one in encoders] == [1, 0]
