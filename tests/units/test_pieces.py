from __future__ import annotations

import numpy as np
from toys import VOCABULARIES

from mixlm.engines.toy import LongestMatch
from mixlm.tokenization.incremental import Encoded
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.units.piece import PieceUnit

FIRST, SECOND = [b"a", b"ab", b"b", b"ab"], [b"b", b"abc", b"a", b"c"]


def unit(*tokens, end_ids=(), special_ids=()) -> PieceUnit:
    vocabularies = [Vocabulary.of(dict(enumerate(pieces)), len(pieces) + 3, end_ids, special_ids) for pieces in tokens]
    return PieceUnit(vocabularies, [LongestMatch(pieces) for pieces in tokens])


def test_equal_bytes_are_one_symbol_whatever_their_ids():
    pieces = unit(FIRST, SECOND, end_ids=[4, 5], special_ids=[4, 6])
    first, second = pieces.symbols(0), pieces.symbols(1)
    assert first[1] == first[3]
    assert first[0] == second[2]
    assert first[2] == second[0]
    assert len({*first[:4], *second[:4]}) == 5 == pieces.end
    # Two ends are one symbol; the special token and nothing else is masked.
    assert first[4:].tolist() == second[4:].tolist() == [5, 5, -1]
    for tokens, symbols in ((FIRST, first), (SECOND, second)):
        assert [pieces.symbol_bytes(symbol) for symbol in symbols[:4]] == tokens


def test_rows_without_bytes_are_masked():
    assert unit(FIRST).symbols(0)[4:].tolist() == [-1, -1, -1]


def test_a_vocabulary_without_end_can_be_used():
    pieces = unit(FIRST, SECOND)
    assert pieces.end not in pieces.symbols(0)


def test_each_member_reads_the_bytes_in_its_own_tokens():
    pieces = unit(FIRST, SECOND)
    state = pieces.initial_state([np.array([10]), np.array([20, 21])])
    piece = {pieces.symbol_bytes(symbol): symbol for symbol in range(pieces.end)}
    state.append(piece[b"a"])
    assert state.ids(0).tolist() == [10, 0]
    assert state.ids(1).tolist() == [20, 21, 2]
    state.append(piece[b"b"])
    # What was "a", "b" is now the one token "ab" to the first, and still two tokens to the second.
    assert state.ids(0).tolist() == [10, 1]
    assert state.ids(1).tolist() == [20, 21, 2, 0]
    assert (state.prompt_length(0), state.prompt_length(1)) == (1, 2)


def test_what_a_member_reads_depends_on_the_text_alone():
    pieces = unit(*VOCABULARIES)
    rng = np.random.default_rng(0)
    prompts = [np.array([99])] * len(VOCABULARIES)
    usable = [symbol for symbol in range(pieces.end) if pieces.symbol_bytes(symbol)]
    for _ in range(20):
        state, text = pieces.initial_state(prompts), b""
        for symbol in rng.choice(usable, size=25):
            state.append(int(symbol))
            text += pieces.symbol_bytes(int(symbol))
            member = int(rng.integers(len(VOCABULARIES)))
            assert state.ids(member)[1:].tolist() == LongestMatch(VOCABULARIES[member]).encode(text).ids


def test_a_text_that_was_rolled_back_is_read_as_if_it_had_never_been_longer():
    pieces = unit(*VOCABULARIES)
    rng = np.random.default_rng(1)
    usable = [symbol for symbol in range(pieces.end) if pieces.symbol_bytes(symbol)]
    state, symbols = pieces.initial_state([np.array([99])] * len(VOCABULARIES)), []
    for _ in range(400):
        if symbols and rng.random() < 0.4:
            count = int(rng.integers(0, min(len(symbols), 5) + 1))
            state.rollback(count)
            symbols = symbols[: len(symbols) - count]
        else:
            symbols.append(int(rng.choice(usable)))
            state.append(symbols[-1])
        if rng.random() < 0.5:
            member = int(rng.integers(len(VOCABULARIES)))
            text = b"".join(pieces.symbol_bytes(symbol) for symbol in symbols)
            assert state.ids(member)[1:].tolist() == LongestMatch(VOCABULARIES[member]).encode(text).ids
            assert state.tail(7) == text[-7:]


class Counting(LongestMatch):
    calls = 0

    def encode(self, data: bytes) -> Encoded:
        self.calls += 1
        return super().encode(data)


def test_a_text_is_encoded_only_for_the_member_whose_ids_are_read():
    vocabularies = [Vocabulary.of(dict(enumerate(pieces)), len(pieces), [], []) for pieces in (FIRST, SECOND)]
    encoders = [Counting(FIRST), Counting(SECOND)]
    state = PieceUnit(vocabularies, encoders).initial_state([np.array([0])] * 2)
    for _ in range(5):
        state.append(0)
    state.ids(0)
    state.ids(0)
    assert [encoder.calls for encoder in encoders] == [1, 0]
