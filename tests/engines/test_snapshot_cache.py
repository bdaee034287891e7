"""transformers' own cache of one sequence: few snapshots, near enough to roll back to, and bounded."""

from __future__ import annotations

import numpy as np
import pytest
from test_transformers_engine import build, load

from mixlm.engines.contract import random_ids
from mixlm.engines.transformers import snapshot_cache
from mixlm.engines.transformers.engine import HFEngine
from mixlm.engines.transformers.snapshot_cache import MAX_SNAPSHOTS


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> HFEngine:
    return load(build(tmp_path_factory.mktemp("m"), "qwen3_next"))


def test_snapshots_are_few_and_a_rollback_runs_little_more_than_was_rolled_back():
    lengths: list[int] = []
    for length in range(1, 2001):
        lengths.append(length)
        if len(lengths) > MAX_SNAPSHOTS:
            lengths.remove(snapshot_cache._expendable(lengths))
        assert lengths[-4:] == list(range(max(1, length - 3), length + 1))
        if length in (100, 777, 2000):
            for back in (1, 2, 3, 5, 8, 20, 70, 300):
                nearest = max((taken for taken in lengths if taken <= length - back), default=0)
                assert length - nearest <= 5 * back


@pytest.mark.slow
def test_appending_runs_what_is_new_and_a_rollback_what_lies_behind_a_snapshot(engine):
    ids = random_ids(engine, 80)
    session = engine.session()
    session.logits(ids[:40])
    for end in range(41, 61):
        session.logits(ids[:end])
    log = [(forward.tokens, forward.cached) for forward in session.stats.forwards]
    assert log == [(40, 0), *((1, length) for length in range(40, 60))]
    assert len(session.cache.lengths()) <= MAX_SNAPSHOTS
    other = random_ids(engine, 10, 5)
    before = [length for length in session.cache.lengths() if length <= 57]
    assert session.cached_tokens(np.append(ids[:58], other)) == 58  # of the last lengths, each has one
    session.logits(np.append(ids[:50], other))
    tokens, cached = session.stats.forwards[-1][:2]
    assert cached == max(length for length in before if length <= 50)
    assert tokens == 60 - cached
    assert max(session.cache.lengths()) == 60


def test_a_draft_that_is_rejected_rolls_back_to_the_snapshot_before_the_block(engine):
    ids = random_ids(engine, 60)
    session = engine.session()
    session.logits(ids[:40])
    session.logits(ids[:46], 6)  # a block of drafts, verified in one pass
    rest = random_ids(engine, 2, 3)
    actual = session.logits(np.append(ids[:43], rest), 2)
    assert session.stats.forwards[-1][:2] == (5, 40)
    expected = engine.session().logits(np.append(ids[:43], rest), 2)
    np.testing.assert_allclose(actual, expected, atol=1e-3)


def test_a_snapshot_is_not_changed_by_what_runs_behind_it(engine):
    ids = random_ids(engine, 50)
    session = engine.session()
    session.logits(ids[:29])
    expected = session.logits(ids[:30]).copy()
    for seed in range(3):
        session.logits(np.append(ids[:29], random_ids(engine, 4, seed)), 4)
        assert session.stats.forwards[-1][:2] == (4, 29)
        np.testing.assert_allclose(session.logits(ids[:30]), expected, atol=1e-3)


def test_where_each_token_takes_a_pass_many_of_them_are_read_anew(tmp_path):
    engine = load(build(tmp_path / "m", "mamba"))
    ids = random_ids(engine, 100)
    session = engine.session()
    session.logits(ids[:60])
    session.logits(ids[:70])
    assert session.cached_tokens(ids) == 0
    session.logits(ids)
    assert [(forward.tokens, forward.cached) for forward in session.stats.forwards] == [(60, 0), (10, 60), (100, 0)]
