"""Runs that a server of llama.cpp samples itself follow the member's law, also where it cannot be told everything."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare
from test_remote import cache, file, folder, llama  # noqa: F401

pytest.importorskip("xllamacpp")

from mixlm.core.sampling import Transform
from mixlm.engines import EngineSpec, load
from mixlm.engines.base import GenerateRequest
from mixlm.engines.remote.engine import RemoteEngine
from mixlm.engines.remote.llamacpp_runs import LlamaCppRuns, find_missing
from mixlm.ensemble import Ensemble, MemberSpec
from mixlm.errors import EngineError
from mixlm.types import Candidates, Sampling

NONE = np.zeros(0, dtype=np.int64)
BEGIN = np.array([70, 71, 72, 73, 74])


@pytest.fixture(scope="module")
def engine(llama: Any) -> RemoteEngine:  # noqa: F811
    one = load(EngineSpec(llama.listening_address, "tiny"))
    assert isinstance(one, RemoteEngine)
    return one


@pytest.fixture(scope="module")
def reference(file: Any) -> Iterator[Any]:  # noqa: F811
    """The same weights in this process, and all of their tokens told."""
    return load(EngineSpec(str(file), "reference", "float32", engine="llamacpp", candidates=260, context=512))


def law(reference: Any, ids: np.ndarray, sampling: Sampling, banned: np.ndarray) -> dict[int, float]:
    found = Transform(sampling, banned)(reference.session().logits(ids)[0])
    return dict(zip(found.ids.tolist(), found.logprobs.tolist(), strict=True))


def likely(reference: Any, ids: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-reference.session().logits(ids)[0])[:count]


SAMPLINGS = [
    Sampling(temperature=1.0, top_k=5),
    Sampling(temperature=0.6, top_k=9, top_p=0.8),
    Sampling(temperature=1.7, top_k=12, min_p=0.15),
    Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_what_is_told_of_a_run_is_the_members_law(engine, reference, sampling):
    banned = np.array([256, 257])
    cut = 0
    for seed in range(12):
        run = engine.session().generate(GenerateRequest(0, BEGIN, 8, sampling, banned, seed))
        ids = BEGIN
        for token, logprob in zip(run.ids, run.logprobs, strict=True):
            assert law(reference, ids, sampling, banned)[token] == pytest.approx(logprob, abs=1e-3)
            ids = np.append(ids, token)
        # The bytes of this model seldom add up to characters: llama.cpp tells nothing of most of them.
        cut += sum(
            len(engine.vocabulary.tokens[one]) == 1 and engine.vocabulary.tokens[one] > b"\x7f" for one in run.ids
        )
    assert cut > 5


@pytest.mark.parametrize("many", [False, True], ids=["few banned", "many banned"])
@pytest.mark.parametrize("sampling", [SAMPLINGS[0], SAMPLINGS[2]], ids=str)
def test_two_tokens_are_drawn_as_often_as_the_law_says(engine, reference, sampling, many):
    first = likely(reference, BEGIN, 40)
    # Of servers that may not be drawn, some are more than a request bans, and among the likeliest.
    banned = np.unique(
        np.concatenate([np.arange(0, 120), first[[0, 3]], [256, 257]]) if many else np.sort([first[1], 256])
    )
    if many:
        assert not {*first[:5].tolist()}.isdisjoint(banned.tolist())
    samples = 1200
    seen: Counter[tuple[int, int]] = Counter()
    for seed in range(samples):
        session = engine.session()
        drawn: list[int] = []
        while len(drawn) < 2:
            ids = np.append(BEGIN, drawn).astype(np.int64)
            drawn += session.generate(
                GenerateRequest(0, ids, 2 - len(drawn), sampling, banned, 1000 * seed + len(drawn))
            ).ids
        seen[drawn[0], drawn[1]] += 1
    expected = {
        (one, other): np.exp(p + q)
        for one, p in law(reference, BEGIN, sampling, banned).items()
        for other, q in law(reference, np.append(BEGIN, one), sampling, banned).items()
    }
    assert set(seen) <= set(expected)
    large = [pair for pair, p in expected.items() if p * samples >= 5]
    found = [seen[pair] for pair in large]
    wanted = [expected[pair] * samples for pair in large]
    if (rest := samples - sum(wanted)) > 1:
        found, wanted = [*found, samples - sum(found)], [*wanted, rest]
    wanted = np.array(wanted) * sum(found) / sum(wanted)
    assert chisquare(found, wanted).pvalue > 1e-4


def test_equal_seeds_write_equal_texts_and_other_seeds_others(engine):
    pair = Ensemble([MemberSpec(engine, "a"), MemberSpec(engine, "b")])
    texts = [pair.generate("three", seed=seed, max_tokens=12, ignore_end=True, top_k=9).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_requests_are_as_many_as_runs(engine, monkeypatch):
    server = engine.replicas[0]
    asked: list[dict[str, Any]] = []
    complete = server._complete

    async def listening(body: dict[str, Any], path: str = "/v1/completions") -> Any:
        asked.append({**body, "path": path})
        return await complete(body, path)

    monkeypatch.setattr(server, "_complete", listening)
    reply = Ensemble([MemberSpec(engine, "a")]).generate("three", seed=3, max_tokens=16, ignore_end=True, top_k=9)
    runs = [one for one in asked if one["path"] == "/completion"]
    assert (len(reply.tokens), len(runs), runs[0]["n_predict"]) == (16, 1, 16)
    assert sum(one.forwards for one in reply.usage.members.values()) == 16


def test_what_it_cannot_draw_is_asked_for_token_by_token(engine):
    many, few = np.arange(33), np.arange(32)
    assert engine.samples_itself(Sampling(top_k=20), many)
    assert engine.samples_itself(Sampling(top_k=20, top_p=0.9), few)
    assert not engine.samples_itself(Sampling(top_k=20, top_p=0.9), many)
    assert not engine.samples_itself(Sampling(top_k=0), few)
    assert not engine.samples_itself(Sampling(top_k=20, presence_penalty=0.5), few)


class Stand:
    """llama.cpp's answers to runs, and what of them is wrong."""

    def __init__(self, wrong: str) -> None:
        self.wrong = wrong

    async def __call__(self, body: dict[str, Any]) -> Any:
        if self.wrong == "raises":
            raise EngineError("refuses (404)")
        if self.wrong == "refuses":
            return {"error": {"message": "no"}}
        rng = np.random.default_rng(0 if self.wrong == "seeds" else body["seed"])
        allowed = np.setdiff1d(
            np.arange(65, 91), [] if self.wrong == "bans" else [one for one, _ in body["logit_bias"]]
        )
        ids = rng.choice(allowed[: body["top_k"]], size=body["n_predict"]).tolist()
        share = 0.5 if self.wrong != "probabilities" else 0.2
        told = [{"id": one, "prob": share, "top_probs": [{"id": one, "prob": share}] * 2} for one in ids]
        return {"completion_probabilities": told, **({} if self.wrong == "tokens" else {"tokens": ids})}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("", ""),
        ("raises", r"does not take what is needed (refuses (404))"),
        ("refuses", "gives no token ids"),
        ("tokens", "gives no token ids"),
        ("seeds", "seeds make no difference"),
        ("probabilities", "other probabilities than it draws with"),
        ("bans", "cannot be kept from drawing"),
    ],
)
def test_what_a_server_lacks_is_said(wrong, said):
    found = asyncio.run(find_missing(Stand(wrong), BEGIN))
    assert (said in found) if said else found == ""
    assert LlamaCppRuns(found, [], frozenset()).draws == (f"no: {found}" if said else "yes")


def test_numbers_that_are_not_certain_are_asked_for_again():
    asked: list[list[int]] = []

    async def ask(body: dict[str, Any]) -> Any:
        told = [{"id": one, "prob": 0.9, "top_probs": []} for one in (65, 66)]
        return {"tokens": [65, 67, 66], "completion_probabilities": told}

    async def likeliest(ids: np.ndarray, count: int) -> Candidates:
        asked.append(ids.tolist())
        return Candidates(np.array([65, 66, 67]), np.log([0.2, 0.3, 0.5]))

    runs = LlamaCppRuns("", [bytes([one]) for one in range(256)], frozenset())
    found = asyncio.run(
        runs.generate(GenerateRequest(0, BEGIN, 3, Sampling(top_k=5, temperature=1.0), NONE, 1), ask, likeliest)
    )
    assert asked == [[*BEGIN], [*BEGIN, 65], [*BEGIN, 65, 67]]
    assert (found.ids, found.logprobs) == ([65, 67, 66], pytest.approx(np.log([0.2, 0.5, 0.3])))


@pytest.mark.parametrize("answer", [{}, None, {"tokens": []}, {"tokens": ["x"]}, {"tokens": [9999]}, {"tokens": 3}])
def test_what_is_no_run_is_an_error(answer):
    async def ask(body: dict[str, Any]) -> Any:
        return answer

    async def likeliest(ids: np.ndarray, count: int) -> Candidates:
        raise AssertionError

    runs = LlamaCppRuns("", [bytes([one]) for one in range(256)], frozenset())
    with pytest.raises(EngineError, match=r"llama\.cpp gives no answer"):
        asyncio.run(runs.generate(GenerateRequest(0, BEGIN, 2, Sampling(top_k=5), NONE, 1), ask, likeliest))
