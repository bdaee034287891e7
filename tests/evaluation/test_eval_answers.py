"""Answers are found in what models write, and in no other place."""

from __future__ import annotations

import pytest

from mixlm.evaluation import answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16 - 7 = 9, times 2.\nAnswer: 18", "18"),
        ("**Answer:** $1,234.50 in all.", "1234.5"),
        ("The answer is -7.", "-7"),
        ("Answer: 3 + 4 = 7", "7"),
        ("First 5, then 10-5", "5"),
        ("so we get 42 eggs", "42"),
        ("Answer: unknown, perhaps 3", "3"),
        ("Answer:\n12", "12"),
        ("8.0", "8"),
        ("Answer: 1000000", "1000000"),
        ("I do not know", ""),
        ("", ""),
    ],
)
def test_numbers(text: str, expected: str) -> None:
    assert answers.number_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: B", "B"),
        ("I think A fits, but no.\nThe answer is (C).", "C"),
        ("**Answer: D. The river**", "D"),
        ("B. Planetary days", "B"),
        ("C", "C"),
        ("it must be (A)", "A"),
        ("A dog is an animal", ""),
        ("The answer is a river", ""),
        ("Answer: I'd say so", ""),
        ("", ""),
    ],
)
def test_letters(text: str, expected: str) -> None:
    assert answers.letter_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Not True is False.\nAnswer: False", "false"),
        ("So the answer is (B).", "b"),
        ("Answer: (B) 12/24/2001", "b"),
        ("Answer: **Yes**.", "yes"),
        ("Answer: ] } )", "]})"),
        ("Answer: apple bird", "applebird"),
        ("thinking\nvalid\n", "valid"),
        ("", ""),
    ],
)
def test_phrases(text: str, expected: str) -> None:
    assert answers.phrase_answer(text) == expected


def test_filters_keep_the_shape() -> None:
    assert answers.numbers([["Answer: 1", "2"], ["x"]], [{}, {}]) == [["1", "2"], [""]]
