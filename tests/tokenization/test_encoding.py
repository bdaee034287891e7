from __future__ import annotations

import json
import sys
from itertools import accumulate, pairwise
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from toys import VOCABULARIES
from trained import ALL, EXACT, SPECIAL, any_bytes, encoder, random_pieces, texts, trained

from mixlm.engines.toy import LongestMatch
from mixlm.errors import TokenizerError
from mixlm.tokenization.incremental import Encoded, Encoder, IncrementalEncoder, TokenizerEncoder, utf8_runs
from mixlm.tokenization.prompt_encoder import PromptEncoder
from mixlm.tokenization.vocabulary import byte_alphabet, detect_family, encode_text, token_bytes

PROSE = "The old river turns under the bridge, and 12 birds don't mind it. " * 150
CUTS = st.lists(st.integers(1, 8), max_size=40)


def steps(data: bytes, lengths: list[int]) -> list[bytes]:
    """Return the prefixes of a text that grows by some lengths, and the text."""
    ends = [end for end in accumulate(lengths) if end < len(data)]
    return [data[:end] for end in [*ends, len(data)]]


def assert_grows(encoder: Encoder, prefixes: list[bytes]) -> None:
    """Whatever the steps in which a text came, its ids are those of the whole, and what is stable stays."""
    incremental, ids, stable = IncrementalEncoder(encoder), [], []
    for prefix in prefixes:
        dropped, added = incremental.update(bytearray(prefix))
        remaining = ids[: len(ids) - dropped]
        assert remaining[: len(stable)] == stable
        ids, stable = remaining + added, remaining
        assert ids == encoder.encode(prefix).ids, prefix


def assert_stable(encoder: Encoder, data: bytes, more: bytes) -> None:
    """The stable part of an encoding is a separate part of the encoding of any longer text."""
    first, whole = encoder.encode(data), encoder.encode(data + more)
    assert 0 <= first.stable_ids <= len(first.ids)
    assert 0 <= first.stable_bytes <= len(data)
    assert whole.ids[: first.stable_ids] == first.ids[: first.stable_ids]
    assert encoder.encode((data + more)[first.stable_bytes :]).ids == whole.ids[first.stable_ids :]


def assert_many_grow(encoder: Encoder) -> None:
    rng = Random(7)
    for _ in range(300):
        assert_grows(encoder, list(accumulate(random_pieces(rng))))


def assert_many_are_stable(encoder: Encoder) -> None:
    rng = Random(8)
    for _ in range(300):
        assert_stable(encoder, b"".join(random_pieces(rng)), b"".join(random_pieces(rng)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
@given(data=any_bytes, lengths=CUTS)
def test_a_growing_text_has_the_ids_of_the_whole(name, data, lengths):
    assert_grows(encoder(trained(name)), steps(data, lengths))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_random_pieces_have_the_ids_of_the_whole(name):
    assert_many_grow(encoder(trained(name)))


@pytest.mark.parametrize("name", ALL)
def test_what_is_stable_stays(name):
    assert_many_are_stable(encoder(trained(name)))


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        # A space in front of a word belongs to the word, also where the tokenizer trims offsets.
        ("trimmed", ["one two", "one two three four", "one two three four five"]),
        # One character that normalizes to two, in two pre-tokens.
        ("gpt4", ["\u0959 ", "\u0959 x"]),
        # A mark that sorts in front of another when the text is normalized.
        ("gpt4", ["e\u0301", "e\u0301\u0327", "e\u0301\u0327\u0274\u0301", "e\u0301\u0327\u0274\u0301  x"]),
        # A plain added token that comes in parts.
        ("tools", [" <tool_ca", " <tool_call>"]),
        ("tools", ["x </tool", "x </tool_", "x </tool_call", "x </tool_call>"]),
        ("gemma", ["a\n", "a\n\n", "a\n\n\n", "a\n\n\nb", "a\n\n\nb <", "a\n\n\nb <b", "a\n\n\nb <b>"]),
        # SentencePiece's own sign for a space.
        ("gemma", ["a  ▁", "a  ▁▁", "a  ▁▁ "]),
        ("llama2", ["  ▁", "  ▁▁"]),
    ],
)
def test_a_growing_text_has_the_ids_of_the_whole_in_hard_cases(name, prefixes):
    assert_grows(encoder(trained(name)), [prefix.encode() for prefix in prefixes])


@pytest.mark.slow
@given(parts=st.lists(st.sampled_from(["<tool_call>", "</tool_call>", " ", "x", "<", "call", "\n"])), lengths=CUTS)
def test_added_tokens_that_come_in_parts_have_the_ids_of_the_whole(parts, lengths):
    assert_grows(encoder(trained("tools")), steps("".join(parts).encode(), lengths))


def test_a_space_that_two_added_tokens_want_is_no_boundary():
    tokenizer = trained("gpt2")
    now = AddedToken("now", rstrip=True, single_word=True, normalized=False)
    tokenizer.add_tokens([now, AddedToken(" x", lstrip=True, normalized=False)])
    text = b"1 2 now xnow, 3 4 now 5 x 6 now xnow aa bb, c"
    assert_grows(encoder(tokenizer), [text[:length] for length in range(len(text) + 1)])


@pytest.mark.parametrize("tokens", VOCABULARIES)
@given(text=st.text("abc ", max_size=40), lengths=CUTS)
def test_a_growing_toy_text_has_the_ids_of_the_whole(tokens, text, lengths):
    toy = LongestMatch(tokens)
    assert_grows(toy, steps(text.encode(), lengths))
    assert b"".join(tokens[i] for i in toy.encode(text.encode()).ids) == text.encode()


class Counting:
    """An encoder that records the lengths it was given."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.lengths: list[int] = []

    def encode(self, data: bytes) -> Encoded:
        self.lengths.append(len(data))
        return self.encoder.encode(data)


@pytest.mark.parametrize("name", ALL)
def test_only_the_end_of_a_long_text_is_encoded_again(name):
    counting = Counting(encoder(trained(name)))
    incremental = IncrementalEncoder(counting)
    data = PROSE.encode()
    for end in range(7, len(data), 7):
        incremental.update(data[:end])
    assert max(counting.lengths) < 100


@pytest.mark.parametrize("text", ["and 0" + "1234567890" * 100, "1234567890" * 100], ids=["changed", "as it is"])
def test_a_long_run_that_tokens_may_join_is_not_normalized_at_every_place(text):
    gemma, normalized = encoder(trained("gemma")), 0

    def count(_frame, event, function):
        nonlocal normalized
        normalized += event == "c_call" and function.__name__ == "normalize_str"

    sys.setprofile(count)
    try:
        gemma.encode(text.encode())
    finally:
        sys.setprofile(None)
    assert 0 < normalized < 100


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
@given(text=texts, more=st.lists(st.sampled_from(SPECIAL), max_size=3))
def test_special_tokens_never_result_from_text(name, text, more):
    tokenizer = trained(name)
    special = {tokenizer.token_to_id(spelling) for spelling in SPECIAL}
    assert not special & set(encoder(tokenizer).encode((text + "".join(more) + text).encode()).ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
@given(data=any_bytes)
@example(data="日本語🎉é".encode())
@example(data="क\u0959é".encode())
def test_every_prefix_is_spelled_by_its_tokens_also_inside_a_character(name, data):
    tokenizer = trained(name)
    tokens, _ = token_bytes(tokenizer, detect_family(tokenizer, name), name)
    plain = encoder(tokenizer)
    if tokenizer.normalizer is not None and "NFC" in repr(tokenizer.normalizer):
        text = normalizers.NFC().normalize_str(data.decode(errors="ignore"))
        data = text.encode()
    if "▁".encode() in data:
        return
    for end in range(max(0, len(data) - 12), len(data) + 1):
        assert b"".join(tokens[i] for i in plain.encode(data[:end]).ids) == data[:end]


@given(data=any_bytes)
def test_runs_of_text_and_of_stray_bytes_make_up_the_data(data):
    runs, cut = utf8_runs(data)
    assert b"".join(raw for _, raw in runs) + cut == data
    for text, raw in runs:
        assert raw
        assert text is None or text.encode() == raw
    assert not any(a[0] is None and b[0] is None for a, b in pairwise(runs))


@pytest.mark.parametrize(
    ("data", "runs", "cut"),
    [
        (b"", [], b""),
        (b"a\xc3", [("a", b"a")], b"\xc3"),
        (b"\xf0\x9f\x8e", [], b"\xf0\x9f\x8e"),
        (b"\xffa", [(None, b"\xff"), ("a", b"a")], b""),
        (b"\xe2\x82(\xff\xff", [(None, b"\xe2\x82"), ("(", b"("), (None, b"\xff\xff")], b""),
    ],
)
def test_stray_bytes_and_incomplete_characters_are_told_apart(data, runs, cut):
    assert utf8_runs(data) == (runs, cut)


def test_stray_bytes_are_one_token_each():
    assert len(encoder(trained("gpt2")).encode(b"\xff\xfe\x80").ids) == 3


def test_bytes_without_a_token_are_unknown_or_left_out():
    fragment = {"a": 0, "b": 1, "<unk>": 2}
    known = Tokenizer(models.BPE(fragment, [], unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    unknown = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    unknown.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert encoder(known).encode(b"a\xffb").ids == [0, 2, 1]
    assert encoder(unknown).encode(b"a\xffb").ids == [0, 1]


@pytest.mark.slow
@given(text=st.text("ab \x04é1", max_size=20), lengths=CUTS)
@example(text="\x04a b", lengths=[])
def test_a_vocabulary_that_lacks_bytes_still_reads_the_rest(text, lengths):
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = encoder(tokenizer)
    assert_grows(plain, steps(text.encode(), lengths))
    assert "".join("ab "[i] for i in plain.encode(text.encode()).ids) == "".join(c for c in text if c in "ab ")


def test_a_character_whose_first_byte_a_vocabulary_lacks_does_not_come_twice():
    # As SmolLM2's does, for characters that are not assigned; an incomplete character follows.
    alphabet = {byte: character for character, byte in byte_alphabet().items()}
    tokenizer = Tokenizer(models.BPE({alphabet[b]: b for b in range(256) if b != 0xF2}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = b"\xf2\xa5\xa5\xae\xf2\xa6\x96\xa3\xf2\x98\x91\xbd\xf2\xae\x9a\xae"
    assert bytes(encoder(tokenizer).encode(text + b"\xc8").ids) == text.replace(b"\xf2", b"") + b"\xc8"


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("gpt2", "never"),
        ("gpt4", "never"),
        ("prefixed", "always"),
        ("llama2", "doubled"),
        ("gemma", "never"),
        ("unigram", "always"),
    ],
)
def test_a_tokenizers_leading_space_is_known_and_taken_away(name, rule):
    tokenizer = trained(name)
    plain = encoder(tokenizer)
    assert plain.leading_space == rule
    tokens, _ = token_bytes(tokenizer, detect_family(tokenizer, name), name)
    assert tokens[plain.encode(b"river").ids[0]][:1] == b"r"


def test_a_leading_space_at_the_first_place_only_is_known():
    tokenizer = trained("unigram")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    assert encoder(tokenizer).leading_space == "first"


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
@given(text=texts.filter(lambda text: text and not any(spelling in text for spelling in SPECIAL)))
@example(text=" a river")
@example(text="  two")
def test_a_raw_prompt_has_the_ids_of_the_tokenizer_itself(name, text):
    plain = encoder(trained(name))
    raw = PromptEncoder(plain, {}, lambda _: "").raw(text)
    assert raw.tolist() == trained(name).encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def demo(demo_models) -> dict[str, TokenizerEncoder]:
    from mixlm.engines.tokenizer_setup import _make_special

    encoders = {}
    for name, folder in demo_models.items():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        _make_special(tokenizer, json.loads((folder / "mixlm.json").read_text())["control"])
        encoders[name] = encoder(tokenizer)
    return encoders


@pytest.mark.models
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
class TestRealTokenizers:
    @given(data=any_bytes, lengths=CUTS)
    @example(data=b"\x04a b", lengths=[])
    def test_a_growing_text_has_the_ids_of_the_whole(self, demo, name, data, lengths):
        assert_grows(demo[name], steps(data, lengths))

    def test_random_pieces_have_the_ids_of_the_whole(self, demo, name):
        assert_many_grow(demo[name])

    def test_what_is_stable_stays(self, demo, name):
        assert_many_are_stable(demo[name])

    def test_only_the_end_of_a_long_text_is_encoded_again(self, demo, name):
        counting = Counting(demo[name])
        incremental = IncrementalEncoder(counting)
        data = PROSE.encode()
        for end in range(7, len(data), 7):
            incremental.update(data[:end])
        assert max(counting.lengths) < 100


LOOKING_AHEAD = {
    "thousands": (r"\d{1,3}(?=(\d{3})*(?!\d))", "isolated"),
    "thousands merged": (r"\d{1,3}(?=(\d{3})*(?!\d))", "merged_with_previous"),
    "spaces": (r"\s+(?!\S)", "isolated"),
    "spaces merged": (r"\s+(?!\S)", "merged_with_next"),
    "backtracking": ("a+b|a", "isolated"),
    "whole line": (r"\p{L}+(?=.*\d)", "isolated"),
    "whole text": (r"(?m:\p{L}+(?=.*\d))", "isolated"),
    "behind": (r"(?<=a)b|\d", "isolated"),
    "word edges": (r"\bthe\b|\d+", "contiguous"),
    "again": (r"(.)\1", "isolated"),
    "counted twice": ("tha?{2}er|.", "isolated"),
    "bracket in a class": ("[^]a]+", "isolated"),
    "bracket alone in a class": (r"[^]]+|\]", "isolated"),
    "folding": (r"(?i:st|ss)|\p{L}", "isolated"),
    "lines": (r"[^\n]+|\n+", "isolated"),
}


def _looking_ahead(name: str) -> Tokenizer:
    pattern, behavior = LOOKING_AHEAD[name]
    tokenizer = trained("gpt2")
    split = pre_tokenizers.Split(Regex(pattern), behavior)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "lines")]
    )
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOKING_AHEAD)
@given(
    parts=st.lists(
        st.sampled_from(["1", "23", "a", "b", "the", " ", "  ", "\n", "ﬆ", "ß", "s", "t", "."]), max_size=25
    ),
    lengths=CUTS,
)
@example(parts=list("12345678"), lengths=[1] * 8)
@example(parts=list("aaaaaab"), lengths=[1] * 8)
@example(parts=["the", "r"], lengths=[3])
@example(parts=["the", " ", "the", " ", "a", " ", "1"], lengths=[1] * 12)
def test_a_pre_tokenizer_that_looks_ahead_gives_the_ids_of_the_whole(name, parts, lengths):
    tokenizer = _looking_ahead(name)
    assert_grows(encoder(tokenizer), steps("".join(parts).encode(), lengths))


@pytest.mark.parametrize("name", ["thousands", "spaces", "lines"])
def test_where_a_pattern_stops_looking_ahead_text_is_stable(name):
    data = b"abc 12345678 def\n\nthe end, 12\nx 1"
    assert encoder(_looking_ahead(name)).encode(data).stable_bytes >= 12


@pytest.mark.parametrize(
    "name",
    [
        *("whole text", "behind", "word edges", "again", "counted twice"),
        *("bracket in a class", "bracket alone in a class"),
    ],
)
def test_where_nothing_can_be_proven_nothing_is_stable(name):
    assert encoder(_looking_ahead(name)).encode(b"abc 12 def\n\nthe end, 12.").stable_bytes == 0


def test_a_normalizer_of_single_characters_leaves_the_last_word_stable():
    assert encoder(trained("gemma")).encode(b".\t").stable_bytes == 1


def test_a_long_text_is_encoded_so_that_other_threads_go_on():
    tokenizer, text, methods = trained("gpt2"), "the river " * 300, []

    class Recording:
        def __getattr__(self, name):
            methods.append(name)
            return getattr(tokenizer, name)

    expected = tokenizer.encode(text, add_special_tokens=False)
    whole, ids = encode_text(Recording(), text), encode_text(Recording(), text, ids_only=True)
    assert (whole.ids, whole.offsets, ids.ids) == (expected.ids, expected.offsets, expected.ids)
    assert methods == ["encode_batch", "encode_batch_fast"]  # `encode` holds Python's lock


def test_what_the_tokenizers_library_cannot_encode_is_an_error_that_says_so():
    class PanicException(BaseException):
        """What Rust code raises in Python."""

    class Panicking:
        def encode(self, text: str, add_special_tokens: bool) -> None:
            raise PanicException("bad split")

    with pytest.raises(TokenizerError, match=r"cannot encode 'a b' with this tokenizer: bad split"):
        encode_text(Panicking(), "a b")


@pytest.mark.slow
def test_random_tokenizers_have_the_ids_of_the_whole():
    from random import Random

    from research.fuzz_tokenizers import check, random_case

    outcomes = []
    for seed in range(40):
        rng = Random(seed)
        outcomes.append(check(random_case(rng), rng, texts=6))
    assert outcomes.count(None) > 15
