"""Scores of given text: against brute force, at common boundaries, in passages, behind prompts, from the cache."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scored_texts import made, probabilities, speaking, stepwise, token_scores
from toys import END, SHARED, WEIGHTS, engine, make_ensemble, toys

from mixlm.engines.toy import LongestMatch, ToyEngine, ToySession
from mixlm.errors import ConfigError, PromptTooLongError, UnsupportedError
from mixlm.routing import FixedRouter, FunctionRouter, LearnedRouter, PromptRouter
from mixlm.routing.features import FEATURES, features
from mixlm.scoring.passages import Passage, split_passages
from mixlm.scoring.score import identity, score, score_answers, score_passages
from mixlm.scoring.scores import concatenate, router_weights, split_holdout
from mixlm.types import Message

TEXT = "ab cab bab cacab a b c abba"
BYTES = [bytes([b]) for b in range(256)]


def test_by_token_the_mixture_equals_brute_force() -> None:
    toy = toys("token", 3)
    engines = [member.engine for member in toy.members]
    ids = engines[0].encoder.encode(TEXT.encode()).ids
    prefix = engines[0].prompts.raw("").tolist()
    expected = [
        np.log(
            sum(
                weight * probabilities(engine, prefix + ids[:i])[token]
                for weight, engine in zip(toy.weights, engines, strict=True)
            )
        )
        for i, token in enumerate(ids)
    ]
    scores = score(toy, TEXT)
    assert scores.unit == "token"
    assert scores.mixture(toy.weights) == pytest.approx(expected, rel=1e-6)
    assert scores.bits_per_byte(scores.mixture(toy.weights)) == pytest.approx(-sum(expected) / np.log(2) / len(TEXT))
    assert [scores.text[a:b] for a, b in zip(scores.starts, scores.ends, strict=True)] == [SHARED[i] for i in ids]


@pytest.mark.parametrize("members", [2, 3, 5])
def test_by_segment_members_meet_at_common_boundaries(members: int) -> None:
    toy = toys("piece", members)
    text = "ab cab cba ab ba"
    by_member = [
        dict(token_scores(member.engine, member.engine.prompts.raw("").tolist(), text.encode()))
        for member in toy.members
    ]
    common = sorted(set.intersection(*(set(ends) for ends in by_member)))
    scores = score(toy, text)
    assert scores.unit == "segment"
    assert scores.ends.tolist() == common
    assert scores.starts.tolist() == [0, *common[:-1]]
    for row, (start, end) in zip(scores.logprobs, zip(scores.starts, scores.ends, strict=True), strict=True):
        expected = [sum(logprob for offset, logprob in ends.items() if start < offset <= end) for ends in by_member]
        assert row == pytest.approx(expected, rel=1e-6)
    weights = np.array(WEIGHTS[:members]) / sum(WEIGHTS[:members])
    assert scores.mixture(weights) == pytest.approx(np.log(np.exp(scores.logprobs) @ weights), rel=1e-12)


def test_members_that_share_a_vocabulary_but_cut_text_otherwise_meet_in_segments() -> None:
    class Short(LongestMatch):
        """Takes no token of two bytes that does not begin with a space."""

        def __init__(self) -> None:
            super().__init__([token if token != b"ab" else b"" for token in SHARED])

    other = engine(seed=1)
    other.encoder = Short()
    scores = score(make_ensemble([engine(seed=0), other]), "ab ab c")
    assert scores.unit == "segment"
    assert "".join(scores.strings()) == "ab ab c"
    assert 1 not in scores.ends


tables = st.integers(1, 5).flatmap(
    lambda members: st.lists(
        st.lists(st.floats(-80, 0), min_size=members, max_size=members), min_size=1, max_size=12
    ).map(np.array)
)


@pytest.mark.slow
@given(tables, st.integers(0, 100))
def test_responsibilities_sum_to_one(logprobs: np.ndarray, seed: int) -> None:
    scores = made(logprobs)
    weights = np.random.default_rng(seed).dirichlet(np.ones(logprobs.shape[1]))
    shares = scores.responsibilities(weights)
    assert shares.sum(axis=1) == pytest.approx(1)
    assert (shares >= 0).all()


def test_what_a_member_cannot_generate_has_probability_zero() -> None:
    scores = made(np.array([[-np.inf, -1.0], [-np.inf, -np.inf]]))
    weights = np.array([0.25, 0.75])
    assert scores.mixture(weights)[0] == pytest.approx(-1 + np.log(0.75))
    assert scores.mixture(weights)[1] == -np.inf
    assert scores.responsibilities(weights).tolist() == [[0, 1], [0.25, 0.75]]


@given(st.text(alphabet="ab \n€𝄞é", max_size=120), st.integers(4, 40))
def test_passages_end_at_characters_and_make_up_the_text(text: str, size: int) -> None:
    data = text.encode()
    parts = split_passages(data, size)
    assert b"".join(parts) == data
    assert all(len(part) <= size for part in parts)
    for part in parts:
        part.decode()


def test_passages_end_at_lines_or_words_where_they_can() -> None:
    assert split_passages(b"aaa bbb\nccc ddd", 10) == [b"aaa bbb\n", b"ccc ddd"]
    assert split_passages(b"aaa bbb ccc ddd", 10) == [b"aaa bbb", b" ccc ddd"]
    assert split_passages(b"\x80" * 25, 10) == [b"\x80" * 10, b"\x80" * 10, b"\x80" * 5]


def test_every_passage_begins_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixlm.scoring.passages.split_passages.__defaults__", (8,))
    toy = toys("token", 2)
    scores = score(toy, "ab ba c\nab ba c\n".replace("\n", " "))
    assert scores.passages > 1
    for begin in np.unique(scores.passage_starts):
        rows = scores.passage_starts == begin
        part = scores.text[begin : scores.ends[rows].max()]
        alone = score(toy, part)
        assert scores.logprobs[rows] == pytest.approx(alone.logprobs)


def test_passages_are_split_to_fit_the_smallest_context() -> None:
    toy = make_ensemble([engine(BYTES, seed=0, context_length=20), engine(BYTES, seed=1, context_length=50)])
    scores = score(toy, "The quick brown fox jumps over the lazy dog, and once again.")
    assert "".join(scores.strings()) == "The quick brown fox jumps over the lazy dog, and once again."
    assert max(np.unique(scores.passage_starts, return_counts=True)[1]) < 20
    assert scores.passages >= 4


def test_the_text_of_segments_keeps_characters_whole() -> None:
    toy = make_ensemble([engine(BYTES, seed=0), engine(BYTES, seed=1)])
    rows = score(toy, "a€b").table(toy.weights)
    assert [row["text"] for row in rows] == ["a", "", "", "€", "b"]
    assert score(toy, b"a\xe2").strings() == ["a", "\ufffd"]


@pytest.mark.parametrize(
    ("change", "text", "part"),
    [
        (lambda text: unicodedata.normalize("NFC", text), "cafe\u0301 au lait", "at 'e\u0301 au lait' they have 'é"),
        (lambda text: text.replace("\r", ""), "one\r\ntwo", r"at '\r\ntwo' they have '\ntwo'"),
        (lambda text: text.replace("K", "k"), "Kay", "at 'Kay' they have 'kay'"),
        (lambda text: "", "gone", "at 'gone' they have ''"),
    ],
)
def test_a_tokenizer_that_changes_the_text_is_named(change: Any, text: str, part: str) -> None:
    class Changing(LongestMatch):
        def encode(self, data: bytes) -> Any:
            return super().encode(change(data.decode()).encode())

    odd = ToyEngine(BYTES, name="the odd one")
    odd.encoder = Changing(BYTES)
    with pytest.raises(ConfigError) as caught:
        score(make_ensemble([engine(BYTES), odd]), text)
    assert "the tokens of the odd one do not spell the text" in caught.value.message
    assert part in caught.value.message
    assert "take them out" in str(caught.value.hint)


def test_nothing_to_score_is_refused() -> None:
    toy = make_ensemble([engine(BYTES, seed=i) for i in range(2)])
    with pytest.raises(ConfigError, match="empty"):
        score(toy, "")
    with pytest.raises(ConfigError, match="no answers"):
        score_answers(toy, [])
    with pytest.raises(ConfigError, match="answer 2 of 2 is empty"):
        score_answers(toy, [("a", "b"), ("a", "")])


@pytest.mark.parametrize("unit", ["token", "piece"])
def test_answers_are_scored_behind_each_members_own_prompt(unit: str) -> None:
    vocabularies = [BYTES, [b"ab", *BYTES] if unit == "piece" else BYTES]
    toy = make_ensemble([engine(tokens, seed=i) for i, tokens in enumerate(vocabularies)], [0.3, 0.7])
    pairs = [("Why?", "ab a"), ([Message("system", "Be brief."), Message("user", "How?")], "bab")]
    scores = score_answers(toy, pairs, ends=False)
    offset = 0
    for begin, (prompt, answer) in zip(np.unique(scores.passage_starts), pairs, strict=True):
        rows = scores.passage_starts == begin
        messages = [Message("user", prompt)] if isinstance(prompt, str) else prompt
        text = "\n".join(message.content for message in messages).encode()
        assert begin == offset
        assert scores.starts[rows][0] == offset + len(text)
        assert scores.text[offset : offset + len(text)] == text
        for i, member in enumerate(toy.members):
            whole = token_scores(member.engine, member.engine.prompts.chat(messages).tolist(), answer.encode())
            assert scores.logprobs[rows][:, i].sum() == pytest.approx(sum(logprob for _, logprob in whole))
        offset += len(text) + len(answer)
    assert scores.size == sum(len(answer) for _, answer in pairs)
    assert "".join(scores.strings()) == "ab abab"


def test_answers_to_one_question_read_it_once(forwards: list[int]) -> None:
    toy = make_ensemble([engine(BYTES, seed=0)], [1.0])
    pairs = [("A long question?", "ab"), ("A long question?", "ba c"), ("Why?", "ab"), ("A long question?", "ab")]
    apart = [score_answers(toy, [pair]) for pair in pairs]
    forwards.clear()
    together = score_answers(toy, pairs)
    assert together.logprobs.tolist() == [row for scores in apart for row in scores.logprobs.tolist()]
    assert together.prompt_bits.tolist() == [row for scores in apart for row in scores.prompt_bits.tolist()]
    question, other = (len(toy.encode_prompt(prompt, toy.settings()).ids[0]) for prompt, _ in (pairs[0], pairs[2]))
    # The second answer runs the question's last token again, for the logits behind it; ends need no forward.
    assert sum(forwards) == (question + 2) + (1 + 4) + (other + 2) + (question + 2)


def test_by_token_an_answer_has_the_probability_of_the_dense_mixture() -> None:
    toy = make_ensemble([engine(BYTES, seed=i) for i in range(2)], [0.3, 0.7])
    prompt = [member.engine.prompts.chat([Message("user", "Why?")]).tolist() for member in toy.members]
    expected, ids = 0.0, list(b"so")
    for i, token in enumerate(ids):
        rows = [
            probabilities(member.engine, [*prefix, *ids[:i]])
            for member, prefix in zip(toy.members, prompt, strict=True)
        ]
        expected += np.log(0.3 * rows[0][token] + 0.7 * rows[1][token])
    scores = score_answers(toy, [("Why?", "so")], ends=False)
    assert scores.mixture(toy.weights).sum() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("unit", ["token", "piece"])
def test_weights_by_prompt_are_those_of_a_completion(unit: str) -> None:
    vocabularies = [BYTES, [b"ab", *BYTES] if unit == "piece" else BYTES]
    members = [engine(tokens, seed=i) for i, tokens in enumerate(vocabularies)]
    router = PromptRouter(np.array([0.3, 0.7]), 0.5)
    toy = make_ensemble(members, [0.3, 0.7], router=router)
    pairs = [("Why?", "ab a"), ("a long question", "bab"), ("abab", "c")]
    scores = score_answers(toy, pairs)
    weights = router_weights(scores, router)
    for begin, (prompt, _) in zip(np.unique(scores.passage_starts), pairs, strict=True):
        settings = toy.settings(seed=0)
        sequence = toy.context(settings).begin_sequence(toy.encode_prompt(prompt, settings))
        expected = sequence.route(sequence.state)
        rows = scores.passage_starts == begin
        assert weights[rows] == pytest.approx(np.tile(expected, (rows.sum(), 1)))
        assert abs(expected - [0.3, 0.7]).max() > 1e-4
    # Held out in the middle of an answer, the prompt is still what it was.
    late = np.flatnonzero(scores.passage_starts == 0)[2:]
    assert router_weights(scores.select(late), router) == pytest.approx(weights[late])


@pytest.mark.parametrize("kind", ["fixed", "prompt", "learned", "function"])
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("unit", ["token", "piece"])
def test_an_answer_has_the_probability_that_conventional_gives_its_steps(kind: str, ends: bool, unit: str) -> None:
    # In pieces the two distributions are one where every member spells a text in one way only, byte by byte.
    vocabularies = [SHARED, SHARED] if unit == "token" else [BYTES, BYTES[::-1]]
    toy = make_ensemble([speaking(i, tokens) for i, tokens in enumerate(vocabularies)], [0.3, 0.7], unit=unit)
    matrix = np.random.default_rng(0).normal(size=(2, FEATURES))
    toy.router = {
        "fixed": FixedRouter(toy.weights),
        "prompt": PromptRouter(toy.weights, 0.5),
        "learned": LearnedRouter(matrix, toy.names),
        "function": FunctionRouter(lambda prompt, tail: [len(prompt), 1 + tail.count(b"b")], 2),
    }[kind]
    answer = b"ab cab" if unit == "token" else b"abcab"
    pieces = [b"ab", b" c", b"ab"] if unit == "token" else [bytes([byte]) for byte in answer]
    prompts = toy.encode_prompt("ab" if unit == "token" else "ba", toy.settings(raw=True))
    scores = score_passages(toy, [Passage(answer, prompts.ids, prompts.text, ends)])
    expected = stepwise(toy, prompts, [*pieces, END] if ends else pieces)
    weights = router_weights(scores, toy.router)
    assert scores.mixture(weights).sum() == pytest.approx(expected, rel=1e-6)
    assert kind == "fixed" or abs(weights - toy.weights).max() > 1e-3


@pytest.mark.parametrize("unit", ["token", "piece"])
def test_the_end_of_an_answer_is_a_segment_of_no_bytes(unit: str) -> None:
    vocabularies = [BYTES, [b"ab", *BYTES] if unit == "piece" else BYTES]
    toy = make_ensemble([engine(tokens, seed=i) for i, tokens in enumerate(vocabularies)], [0.3, 0.7])
    pairs = [("Why?", "ab a"), ("How?", "bab")]
    scores, bare = score_answers(toy, pairs), score_answers(toy, pairs, ends=False)
    ends = scores.starts == scores.ends
    assert ends.sum() == 2
    assert scores.unit == bare.unit
    assert scores.select(~ends).logprobs == pytest.approx(bare.logprobs)
    assert (scores.size, scores.strings()[-1]) == (bare.size, "")
    for row, (prompt, answer) in zip(scores.logprobs[ends], pairs, strict=True):
        for i, member in enumerate(toy.members):
            prefix = member.engine.prompts.chat([Message("user", prompt)])
            ids = [*prefix, *member.engine.encoder.encode(answer.encode()).ids]
            assert row[i] == pytest.approx(np.log(probabilities(member.engine, ids)[-1]))


def test_where_a_member_relies_on_stop_strings_ends_are_scored_on_request_only() -> None:
    toy = make_ensemble([engine(BYTES, seed=i) for i in range(2)])
    toy.members[1].engine.stops = ("Question:",)
    assert len(score_answers(toy, [("x", "a")]).ends) == 1
    assert len(score_answers(toy, [("x", "a")], ends=True).ends) == 2


def test_a_prompt_or_an_answer_that_is_too_long_is_refused() -> None:
    toy = make_ensemble([engine(BYTES, seed=i, context_length=40) for i in range(2)])
    with pytest.raises(PromptTooLongError):
        score_answers(toy, [("x" * 60, "a")])
    with pytest.raises(ConfigError, match="context of 40"):
        score_answers(toy, [("x" * 20, "a" * 30)])


def test_what_a_member_cannot_read_is_refused_before_any_member_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = make_ensemble([engine(BYTES, seed=i, context_length=length) for i, length in enumerate((400, 40))])
    monkeypatch.setattr(ToySession, "forward", None)
    with pytest.raises(ConfigError, match="context of 40"):
        score_answers(toy, [("x" * 20, "a" * 30)])


def test_a_system_message_goes_in_front() -> None:
    toy = make_ensemble([engine(BYTES, seed=i) for i in range(2)])
    scores = score_answers(toy, [("Why?", "a")], settings=toy.settings(system="Be brief."))
    assert scores.text == b"Be brief.\nWhy?a"


def test_members_that_share_an_engine_are_scored_once() -> None:
    shared = engine(seed=0)
    seen: list[tuple[str, int, int]] = []
    scores = score(make_ensemble([shared, shared]), TEXT, progress=lambda *state: seen.append(state))
    assert seen == [("m0", 1, 1)]
    assert (scores.logprobs[:, 0] == scores.logprobs[:, 1]).all()


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Number of tokens in each forward of the toys; the cache is an empty folder."""
    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path))
    seen: list[int] = []
    monkeypatch.setattr(ToyEngine, "on_forward", staticmethod(lambda ids, last: seen.append(len(ids))))
    return seen


def test_cached_scores_need_no_forward(forwards: list[int], tmp_path: Path) -> None:
    toy = toys("piece", 2)
    first = score(toy, TEXT, identities=["a", "b"])
    assert len(list((tmp_path / "scores").iterdir())) == 2
    assert forwards
    forwards.clear()
    again = score(toy, TEXT, identities=["a", "b"])
    assert forwards == []
    assert (first.logprobs == again.logprobs).all()
    assert (first.ends == again.ends).all()


@pytest.mark.parametrize("change", ["text", "model", "passages", "none", "details"])
def test_what_differs_is_scored_again(forwards: list[int], change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = toys("piece", 2)
    score(toy, TEXT, identities=["a", "b"])
    forwards.clear()
    if change == "details":
        toy.members[0].engine.details = {"dtype": "bfloat16"}
    if change == "passages":
        monkeypatch.setattr("mixlm.scoring.passages.split_passages.__defaults__", (10,))
    models = {"model": ["a", "c"], "none": None}.get(change, ["a", "b"])
    score(toy, TEXT + "a" if change == "text" else TEXT, identities=models)
    assert forwards


def test_a_third_member_is_scored_alone(forwards: list[int]) -> None:
    score(toys("piece", 2), TEXT, identities=["a", "b"])
    before = sum(forwards)
    forwards.clear()
    score(toys("piece", 3), TEXT, identities=["a", "b", "c"])
    assert 0 < sum(forwards) < before


def _as_npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def _shortened(path: Path) -> None:
    with np.load(path) as file:
        arrays = {name: array[: len(array) // 2] if array.ndim else array for name, array in file.items()}
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.write_bytes(path.read_bytes()[:100]), _as_npy, _shortened],
    ids=["cut", "npy", "short"],
)
def test_a_damaged_cache_file_is_written_again(
    forwards: list[int], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    toy = toys("token", 2)
    first = score(toy, TEXT, identities=["a", "b"])
    for path in (tmp_path / "scores").iterdir():
        damage(path)
    again = score(toy, TEXT, identities=["a", "b"])
    assert (first.logprobs == again.logprobs).all()
    forwards.clear()
    score(toy, TEXT, identities=["a", "b"])
    assert forwards == []


def test_a_cache_that_cannot_be_written_is_no_error(forwards: list[int], tmp_path: Path) -> None:
    (tmp_path / "scores").write_text("in the way")
    assert score(toys("token", 2), TEXT, identities=["a", "b"]).size == len(TEXT)


def test_the_least_recently_used_files_are_evicted(
    forwards: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = toys("token", 2)
    texts = [TEXT, TEXT * 2, TEXT * 3]
    for text in texts:
        score(toy, text, identities=["a", "b"])
    files = sorted((tmp_path / "scores").iterdir(), key=lambda path: path.stat().st_size)
    assert len(files) == 6
    for age, path in enumerate(files):
        os.utime(path, (age, age))
    score(toy, TEXT, identities=["a", "b"])  # the oldest, used again
    # Room for two pairs of three: the largest limit that no third file of the old ones fits.
    monkeypatch.setenv("MIXLM_SCORES_MB", str(sum(path.stat().st_size for path in files[:3]) / 1e6))
    score(toy, TEXT + "a", identities=["a", "b"])
    forwards.clear()
    score(toy, TEXT + "a", identities=["a", "b"])
    assert forwards == []
    score(toy, TEXT * 2, identities=["a", "b"])
    assert forwards
    monkeypatch.setenv("MIXLM_SCORES_MB", "0")
    score(toy, "ab", identities=["a", "b"])
    assert list((tmp_path / "scores").iterdir()) == []
    monkeypatch.setenv("MIXLM_SCORES_MB", "many")
    with pytest.raises(ConfigError, match="MIXLM_SCORES_MB is 'many'; it must be a number"):
        score(toy, "abab", identities=["a", "b"])


def test_scores_know_what_scoring_took(forwards: list[int]) -> None:
    toy = toys("piece", 2)
    first = score(toy, TEXT, identities=["a", "b"])
    assert first.seconds > 0
    assert score(toy, TEXT, identities=["a", "b"]).seconds == first.seconds
    assert sum(part.seconds for part in split_holdout(first, 0.5)) == pytest.approx(first.seconds)
    assert concatenate([first, first]).seconds == pytest.approx(2 * first.seconds)


def test_a_models_identity_changes_with_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    first = identity(str(folder))
    assert str(folder) in first
    (folder / "config.json").write_text("{ }")
    assert identity(str(folder)) != first
    assert identity("toy:1") != identity("toy:2")


def test_texts_are_joined_and_split() -> None:
    toy = toys("piece", 2)
    long, short = score(toy, TEXT), score(toy, "ab ba")
    both = concatenate([long, short])
    assert "".join(both.strings()) == TEXT + "ab ba"
    assert both.passages == 2
    assert both.mixture(toy.weights).sum() == pytest.approx(
        long.mixture(toy.weights).sum() + short.mixture(toy.weights).sum()
    )
    first, last = split_holdout(both, 5 / (5 + len(TEXT)))
    assert (first.size, last.size) == (len(TEXT), 5)
    first, last = split_holdout(long, 0.5)
    assert first.size + last.size == long.size
    assert 0.3 < first.size / long.size < 0.7
    with pytest.raises(ConfigError, match="different members"):
        concatenate([long, score(toys("piece", 3), "ab")])
    with pytest.raises(ConfigError, match="single segment"):
        split_holdout(made(np.zeros((1, 2))), 0.5)
    raw = toy.settings(raw=True)
    with pytest.raises(ConfigError, match="single segment"):  # an answer and its end
        split_holdout(score_answers(toy, [("ab", "c")], settings=raw, ends=True), 0.5)
    for part in split_holdout(score_answers(toy, [("ab", "c"), ("b", "a")], settings=raw, ends=True), 0.01):
        assert part.size
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split_holdout(long, 1.0)


@given(st.integers(2, 300), st.floats(0.01, 0.99), st.integers(1, 9))
def test_both_parts_of_a_split_hold_something(count: int, holdout: float, passages: int) -> None:
    begins = np.arange(count) * passages // count
    begins = np.searchsorted(begins, begins)
    scores = made(np.zeros((count, 2)), begins=begins.tolist())
    first, last = split_holdout(scores, holdout)
    assert len(first.ends) >= 1
    assert len(last.ends) >= 1
    assert first.ends.tolist() + last.ends.tolist() == scores.ends.tolist()
    assert abs(last.size / scores.size - holdout) <= 0.1 + 1 / count


def test_weights_of_every_kind_of_router() -> None:
    toy = toys("piece", 2)
    scores = concatenate([score(toy, TEXT), score(toy, "c ab")])
    assert (router_weights(scores, FixedRouter(toy.weights)) == toy.weights).all()
    assert router_weights(scores, PromptRouter(toy.weights)) == pytest.approx(
        np.tile(toy.weights, (len(scores.ends), 1))
    )
    learned = LearnedRouter(np.random.default_rng(0).normal(size=(2, FEATURES)), scores.names)
    by_function = FunctionRouter(
        lambda prompt, tail: (
            learned.weights_at(features(tail, np.array([len(tail)])), None)[0].tolist() if not prompt else [1, 0]
        ),
        2,
    )
    assert router_weights(scores, learned) == pytest.approx(router_weights(scores, by_function))


def test_a_router_that_reads_tokens_is_refused() -> None:
    class TokenRouter:
        def begin(self, context: Any) -> Any:
            return lambda state: np.array([len(state.ids(0)), 1.0])

    toy = toys("piece", 2)
    with pytest.raises(UnsupportedError, match="reads the members' tokens"):
        router_weights(score(toy, TEXT), TokenRouter())
