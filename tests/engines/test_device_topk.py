"""The largest logits alone: every sample is the one of the whole row, ties and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_transformers_engine import build

from mixlm.binding import LoadedMember
from mixlm.core.rng import Noise
from mixlm.core.sampling import Transform
from mixlm.engines import EngineSpec
from mixlm.engines.requests import LogitsRequest, SampleRequest
from mixlm.engines.transformers.device_topk import DeviceTopK
from mixlm.engines.transformers.engine import HFEngine
from mixlm.ensemble import Ensemble
from mixlm.types import Candidates, Sampling, TopKFilter

METHODS = ("mixture", "conventional", "speculative", "single")


def random_case(seed: int) -> tuple[torch.Tensor, Transform]:
    """Logits of a row, and a transform with top-k."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(20, 3000))
    logits = torch.tensor(rng.normal(scale=rng.choice([0.1, 1.0, 5.0]), size=size))
    logits = logits.to([torch.bfloat16, torch.float32][int(rng.integers(2))])
    logits[rng.random(size) < rng.choice([0.0, 0.3])] = -torch.inf
    banned = np.flatnonzero(rng.random(size) < rng.choice([0.0, 0.2, 0.9]))
    if banned.size == size or not torch.isfinite(logits[np.setdiff1d(np.arange(size), banned)]).any():
        return random_case(seed + 100_000)
    sampling = Sampling(
        top_k=int(rng.integers(1, 80)),
        temperature=float(rng.choice([0.5, 1.0, 1.3])),
        top_p=float(rng.choice([1.0, 0.9])),
        min_p=float(rng.choice([0.0, 0.05])),
    )
    return logits, Transform(sampling, banned)


@pytest.mark.slow
def test_samples_are_those_of_the_whole_row() -> None:
    largest, short = DeviceTopK(), 0
    for seed in range(400):
        logits, transform = random_case(seed)
        assert transform.top_k_filter is not None
        [row] = largest.transfer(logits[None], [transform.top_k_filter])
        short += isinstance(row, Candidates)
        actual, expected = transform(row), transform(logits.float().numpy())
        np.testing.assert_array_equal(actual.ids, expected.ids)
        np.testing.assert_array_equal(actual.logprobs, expected.logprobs)
        noise = Noise(seed)
        assert noise.sample(*actual) == noise.sample(*expected)
    assert short > 100


def test_rows_of_many_filters_are_transferred_together() -> None:
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=(7, 900)), dtype=torch.bfloat16)
    cuts = [TopKFilter(k, rng.choice(900, size=20, replace=False)) for k in (1, 5, 445)]
    requests = [cuts[0], None, cuts[1], cuts[0], cuts[2], None, cuts[1]]
    rows = DeviceTopK().transfer(logits, requests)
    for row, cut, member_options in zip(rows, requests, logits, strict=True):
        whole = member_options.float().numpy()
        if cut is None or cut.k == 445:  # nearly all of the row
            np.testing.assert_array_equal(row, whole)
            continue
        assert isinstance(row, Candidates)
        whole[cut.banned] = -np.inf
        expected = np.flatnonzero(whole >= np.sort(whole)[-cut.k])
        np.testing.assert_array_equal(row.ids, expected)
        np.testing.assert_array_equal(row.logprobs, whole[expected])


@pytest.mark.parametrize("value", [0.0, -np.inf, np.nan])
def test_a_row_where_others_might_be_tied_with_the_last_comes_whole(value: float) -> None:
    logits = torch.full((1, 500), value)
    logits[0, 7] = 1.0
    [row] = DeviceTopK().transfer(logits, [TopKFilter(3, np.array([9]))])
    np.testing.assert_array_equal(row, logits[0].numpy())


def test_what_depends_on_more_than_the_largest_has_no_filter() -> None:
    banned = np.array([1, 2])
    for options in ({"top_k": 0}, {"top_k": 5, "repetition_penalty": 1.1}, {"top_k": 5, "presence_penalty": 0.5}):
        assert Transform(Sampling(**options), banned).top_k_filter is None
    cut = Transform(Sampling(top_k=5), banned).top_k_filter
    assert cut is not None
    assert cut.k == 5
    assert cut.banned is banned


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[HFEngine]:
    folders: list[Path] = [build(tmp_path_factory.mktemp(kind), kind) for kind in ("llama", "gemma3")]
    return [
        HFEngine.from_pretrained(EngineSpec(folder.name, folder.name, "bfloat16", "cpu"), str(folder))
        for folder in folders
    ]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"top_k": 4}, {"top_k": 12, "top_p": 0.8}, {"top_k": 0}, {"min_p": 0.1}])
@pytest.mark.parametrize("method", METHODS)
def test_texts_are_those_of_whole_rows(
    pair: list[HFEngine], method: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Ensemble([LoadedMember(engine, f"m{index}") for index, engine in enumerate(pair)], [0.6, 0.4])
    texts = []
    for largest in (None, DeviceTopK()):
        for tensor in pair:
            monkeypatch.setattr(tensor.runner, "device_top_k", largest)
        completions = [
            both.generate("the river", method=method, max_tokens=20, seed=seed, **options) for seed in range(2)
        ]
        texts.append(
            [[(token.data, token.member, token.logprob) for token in completion.tokens] for completion in completions]
        )
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_an_engine_returns_what_is_needed_and_no_more(pair: list[HFEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = pair[0]
    monkeypatch.setattr(engine.runner, "device_top_k", DeviceTopK())
    seen: list[Any] = []
    ids, cut = np.arange(20, 30), TopKFilter(3, np.array([0]))
    session = engine.session()

    def choose(row: Any) -> Any:
        seen.append(row)
        return row

    requests = [
        (session, SampleRequest(0, ids, choose, cut)),
        (engine.session(), LogitsRequest(0, ids[:8], 2, cut)),
        (session, LogitsRequest(0, ids)),
    ]
    _, rows, whole = engine.respond(requests)
    assert isinstance(seen[0], Candidates)
    assert [type(row) for row in rows] == [Candidates] * 2
    assert whole.shape == (1, engine.vocabulary.size)
    order = np.argsort(-whole[0], kind="stable")
    assert set(order[:3]) <= set(seen[0].ids)
    again = engine.respond([(session, SampleRequest(0, ids, choose, cut))])[0]
    np.testing.assert_array_equal(again, whole[0])  # known by now, so nothing is run and nothing is brought over
