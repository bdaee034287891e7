from __future__ import annotations

import codecs
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlm.core.detokenize import StreamingDetokenizer
from mixlm.types import Token


def token(data: bytes) -> Token:
    return Token("", data, "m", -1.0)


def shown(pieces, stops=()) -> tuple[list[list[str]], StreamingDetokenizer]:
    stream = StreamingDetokenizer(stops)
    return [[token.text for token in stream.push(token(piece))] for piece in pieces], stream


def test_tokens_are_shown_as_they_come():
    steps, stream = shown([b"one", b" two"])
    assert steps == [["one"], [" two"]]
    assert stream.flush() == []
    assert stream.found is None


def test_a_character_cut_over_tokens_comes_with_the_token_that_completes_it():
    emoji = "🎉".encode()
    steps, stream = shown([b"a" + emoji[:1], emoji[1:3], emoji[3:] + b"b"])
    assert steps == [["a"], [""], ["🎉b"]]
    assert stream.flush() == []


def test_bytes_that_are_no_text_come_as_replacement_characters():
    steps, _ = shown([b"\xff", b"\xc3", b"x"])
    assert steps == [["\ufffd"], [""], ["\ufffdx"]]


def test_a_character_still_open_at_the_end_stays_out_of_the_text():
    steps, stream = shown([b"a", b"\xf0\x9f"])
    assert steps == [["a"], [""]]
    assert stream.flush() == []


def test_a_stop_string_inside_a_token_cuts_it():
    steps, stream = shown([b"ab", b"cSTOPd"], ["STOP"])
    assert steps == [["ab"], ["c"]]
    assert stream.found is not None


def test_a_stop_string_across_tokens_is_never_shown():
    steps, stream = shown([b"ab\nQue", b"sti", b"on: more"], ["\nQuestion:"])
    assert steps == [[], [], ["ab"]]
    assert stream.found is not None


def test_tokens_held_back_are_shown_once_they_cannot_be_the_beginning_of_a_stop_string():
    steps, stream = shown([b"a", b"S", b"T", b"x", b"S"], ["STOP"])
    assert steps == [["a"], [], [], ["S", "T", "x"], []]
    assert [token.text for token in stream.flush()] == ["S"]
    assert stream.found is None


def test_a_stop_string_whose_beginning_repeats_is_found():
    steps, stream = shown([b"a", b"a", b"a", b"b"], ["aab"])
    assert steps == [[], [], ["a"], []]
    assert stream.found is not None


def test_the_earliest_of_several_stop_strings_counts():
    steps, _ = shown([b"one two three"], ["three", "two"])
    assert steps == [["one "]]


def test_a_text_that_begins_with_a_stop_string_is_empty():
    steps, stream = shown([b"ST", b"OP"], ["STOP"])
    assert steps == [[], []]
    assert stream.found is not None


def test_a_stop_string_may_begin_where_none_may_end_yet():
    stream = StreamingDetokenizer(["STOP"])
    early = [shown.text for piece in (b"xSTOPy", b"ST") for shown in stream.push(token(piece), may_stop=False)]
    assert early == ["xSTOPy"]
    assert stream.found is None
    assert stream.push(token(b"OP")) == []
    assert stream.found is not None


def test_empty_stop_strings_stop_nothing():
    steps, stream = shown([b"abc"], ["", ""])
    assert steps == [["abc"]]
    assert stream.found is None


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ([b"abcSTOP"], "abc"),
        ([b"\xc3", b"\xa9STOP"], "é"),
        ([b"\xf0\x9f", b"\x8e", b"\x89xSTOP"], "🎉x"),
        ([b"aSTOP\xf0\x9f"], "a"),
        ([b"\xc3", b"\xa9STOP\xc3"], "é"),
        ([b"aSTOP\xffb"], "a"),
    ],
)
def test_what_is_left_of_a_cut_token_has_the_bytes_of_the_text(pieces, text):
    stream = StreamingDetokenizer(["STOP"])
    tokens = [emitted for piece in pieces for emitted in stream.push(token(piece))]
    assert "".join(token.text for token in tokens) == text
    assert b"".join(token.data for token in tokens) == text.encode()


@pytest.mark.parametrize(
    ("data", "kept"), [(b"a\xff\xfeSTOP", 3), (b"\xc3STOP\xff", 1), (b"\xf0\x9fSTOP", 2), (b"\xf0\x9f\x8eSTOP\xc3", 3)]
)
def test_stray_bytes_before_a_stop_string_are_kept_in_a_cut_token(data, kept):
    stream = StreamingDetokenizer(["STOP"])
    [cut] = stream.push(token(data))
    assert cut.data == data[:kept]
    assert cut.text == data[:kept].decode(errors="replace")


def reference(pieces: list[bytes], stops: list[str]) -> tuple[str, bool]:
    """The whole text, or what stands before the first stop string once a token has completed one."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = ""
    for piece in pieces:
        text += decoder.decode(piece)
        places = [text.index(stop) for stop in stops if stop in text]
        if places:
            return text[: min(places)], True
    return text, False


letters = st.text("abé🎉", min_size=1, max_size=4)


@pytest.mark.slow
@given(
    pieces=st.lists(letters.map(str.encode) | st.binary(min_size=1, max_size=3), max_size=12),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    stops=st.lists(letters, max_size=3),
)
def test_joined_text_is_the_text_before_the_first_stop_string(pieces, cuts, stops):
    data = b"".join(pieces)
    edges = [0, *sorted({cut for cut in cuts if cut < len(data)}), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(edges) if a < b]
    stream, tokens = StreamingDetokenizer(stops), []
    for piece in pieces:
        tokens += stream.push(token(piece))
        if stream.found is not None:
            break
    else:
        tokens += stream.flush()
    text, stopped = reference(pieces, stops)
    assert "".join(token.text for token in tokens) == text
    assert (stream.found is not None) is stopped
    if not stopped:
        assert b"".join(token.data for token in tokens) == data
