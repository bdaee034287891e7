"""What the study's gates look at follows from what is known at a state, and from nothing after it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scored_texts import made

from mixlm.scoring.scores import Scores
from research.scripts.router_features import (
    LENGTHS,
    copies,
    decayed_sums,
    history,
    kind,
    known_until,
    posterior,
    refreshes,
)
from research.scripts.router_scores import split_text, without_shared

TEXT = b"one two three one two three one two"


def scores(seed: int = 0, text: bytes = TEXT) -> Scores:
    table = -np.random.default_rng(seed).gamma(2.0, 1.0, size=(len(text), 3))
    return made(table, text=text)


@pytest.mark.parametrize("block", [1, 4, 8])
def test_history_is_of_the_text_before_the_last_block(block: int) -> None:
    first = scores()
    until = known_until(first, block)
    assert (until <= first.starts).all()
    assert (first.starts - until < block).all()
    cut = 18
    changed = first.logprobs.copy()
    changed[cut:] -= 5.0
    later = replace(first, logprobs=changed)
    same = until <= cut
    np.testing.assert_array_equal(history(first, block)[same], history(later, block)[same])
    assert (history(first, block)[~same] != history(later, block)[~same]).any()
    assert refreshes(first, block) == pytest.approx((len(TEXT) - 1) // block / (len(TEXT) - 1))


def test_sums_decay_by_the_byte_and_give_the_posterior() -> None:
    first = scores()
    sums = decayed_sums(first, 1)
    place, length = 9, 1
    ages = place - first.ends[:place]
    factors = np.exp(-ages / LENGTHS[length])
    centred = first.logprobs - first.logprobs.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(sums[place, length, :-1], factors @ centred[:place])
    np.testing.assert_allclose(sums[place, length, -1], factors @ first.logprobs[:place].mean(axis=1))
    em = np.array([0.5, 0.3, 0.2])
    likelihood = em * np.exp(0.7 * (factors @ first.logprobs[:place]))
    np.testing.assert_allclose(posterior(sums, em, length, 0.7)[place], likelihood / likelihood.sum())


def test_copies_look_at_the_text_before_them_alone() -> None:
    whole = copies(scores())
    for cut in range(1, len(TEXT)):
        shorter = copies(scores(text=TEXT[:cut] + b"#" * (len(TEXT) - cut)))
        np.testing.assert_array_equal(whole[: cut + 1], shorter[: cut + 1])
    assert whole[19, kind(b"w")] == 1  # after "three one t" comes what came after "one t"
    assert np.exp(whole[-1, -4]) > 12


def test_texts_are_divided_by_files_and_what_repeats_is_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(30):
        words = " ".join(map(str, rng.integers(10**6, size=150)))
        (tmp_path / f"{number}.txt").write_text(f"{words}\n")
    train, check = split_text(tmp_path, 8000, 4000)
    assert 6000 < sum(map(len, train)) <= 8000
    assert 3000 < sum(map(len, check)) <= 4000
    assert without_shared(train, check) == (check, 0)
    assert without_shared(train, [*check, train[0][100:900]]) == (check, 1)
