"""What a server of llama.cpp samples itself follows the member's distribution, also where it cannot ban every id."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare
from servers import RecordingServer
from test_remote import cache, file, folder, llama  # noqa: F401

pytest.importorskip("xllamacpp")

from mixlm.binding import LoadedMember
from mixlm.core.sampling import Transform
from mixlm.engines import EngineSpec, load
from mixlm.engines.remote.engine import RemoteEngine
from mixlm.engines.remote.llamacpp_server import LlamaCppServer
from mixlm.engines.remote.model_info import ModelInfo
from mixlm.engines.remote.server import TokenizerProbe, TopTokens
from mixlm.engines.requests import GenerateRequest
from mixlm.ensemble import Ensemble
from mixlm.errors import EngineError
from mixlm.types import Candidates, Sampling

NONE = np.zeros(0, dtype=np.int64)
BYTES = [bytes([byte]) for byte in range(256)]
PROMPT = np.array([70, 71, 72, 73, 74])


@pytest.fixture(scope="module")
def engine(llama: Any) -> RemoteEngine:  # noqa: F811
    engine = load(EngineSpec(llama.listening_address, "tiny"))
    assert isinstance(engine, RemoteEngine)
    return engine


@pytest.fixture(scope="module")
def reference(file: Any) -> Iterator[Any]:  # noqa: F811
    """The same weights in this process, with all of their tokens returned."""
    return load(EngineSpec(str(file), "reference", "float32", engine="llamacpp", candidates=260, context=512))


def distribution_of(reference: Any, ids: np.ndarray, sampling: Sampling, banned: np.ndarray) -> dict[int, float]:
    distribution = Transform(sampling, banned)(reference.session().logits(ids)[0])
    return dict(zip(distribution.ids.tolist(), distribution.logprobs.tolist(), strict=True))


def likely(reference: Any, ids: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-reference.session().logits(ids)[0])[:count]


SAMPLINGS = [
    Sampling(temperature=1.0, top_k=5),
    Sampling(temperature=0.6, top_k=9, top_p=0.8),
    Sampling(temperature=1.7, top_k=12, min_p=0.15),
    Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.05),
]


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_log_probabilities_are_those_of_the_members_distribution(engine, reference, sampling):
    banned = np.array([256, 257])
    incomplete = 0
    for seed in range(12):
        response = engine.session().generate(GenerateRequest(0, PROMPT, 8, sampling, banned, seed))
        ids = PROMPT
        for token, logprob in zip(response.ids, response.logprobs, strict=True):
            assert distribution_of(reference, ids, sampling, banned)[token] == pytest.approx(logprob, abs=1e-3)
            ids = np.append(ids, token)
        # The bytes of this model seldom add up to characters: llama.cpp has no probabilities for most of them.
        incomplete += sum(
            len(engine.vocabulary.tokens[token]) == 1 and engine.vocabulary.tokens[token] > b"\x7f"
            for token in response.ids
        )
    assert incomplete > 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampling", "many"), [(SAMPLINGS[0], False), (SAMPLINGS[2], True)], ids=["few banned", "many banned"]
)
def test_two_tokens_are_sampled_as_often_as_the_distribution_says(engine, reference, sampling, many):
    first = likely(reference, PROMPT, 40)
    # Of servers that may not be sampled, some are more than a request bans, and among the likeliest.
    banned = np.unique(
        np.concatenate([np.arange(0, 120), first[[0, 3]], [256, 257]]) if many else np.sort([first[1], 256])
    )
    if many:
        assert not {*first[:5].tolist()}.isdisjoint(banned.tolist())
    samples = 500  # a total variation of 0.2 is found with probability 0.99
    counts: Counter[tuple[int, int]] = Counter()
    for seed in range(samples):
        session = engine.session()
        sampled: list[int] = []
        while len(sampled) < 2:
            ids = np.append(PROMPT, sampled).astype(np.int64)
            sampled += session.generate(
                GenerateRequest(0, ids, 2 - len(sampled), sampling, banned, 1000 * seed + len(sampled))
            ).ids
        counts[sampled[0], sampled[1]] += 1
    expected = {
        (first, second): np.exp(p + q)
        for first, p in distribution_of(reference, PROMPT, sampling, banned).items()
        for second, q in distribution_of(reference, np.append(PROMPT, first), sampling, banned).items()
    }
    assert set(counts) <= set(expected)
    large = [pair for pair, p in expected.items() if p * samples >= 5]
    observed = [counts[pair] for pair in large]
    frequencies = [expected[pair] * samples for pair in large]
    if (rest := samples - sum(frequencies)) > 1:
        observed, frequencies = [*observed, samples - sum(observed)], [*frequencies, rest]
    frequencies = np.array(frequencies) * sum(observed) / sum(frequencies)
    assert chisquare(observed, frequencies).pvalue > 1e-4


def test_equal_seeds_give_equal_texts_and_other_seeds_others(engine):
    pair = Ensemble([LoadedMember(engine, "a"), LoadedMember(engine, "b")])
    texts = [pair.generate("three", seed=seed, max_tokens=12, ignore_end=True, top_k=9).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_sixteen_tokens_are_one_request(llama):  # noqa: F811
    server = RecordingServer(llama.listening_address).start()
    try:
        engine = load(EngineSpec(server.url, "tiny"))
        server.posted.clear()
        completion = Ensemble([LoadedMember(engine, "a")]).generate(
            "three", seed=3, max_tokens=16, ignore_end=True, top_k=9
        )
    finally:
        server.stop()
    [request] = [body for path, body in server.posted if path == "/completion"]
    assert (len(completion.tokens), request["n_predict"]) == (16, 16)
    assert sum(member.forwards for member in completion.usage.members.values()) == 16


def test_what_it_cannot_sample_is_requested_token_by_token(engine):
    many, few = np.arange(33), np.arange(32)
    assert engine.samples_itself(Sampling(top_k=20), many)
    assert engine.samples_itself(Sampling(top_k=20, top_p=0.9), few)
    assert not engine.samples_itself(Sampling(top_k=20, top_p=0.9), many)
    assert not engine.samples_itself(Sampling(top_k=0), few)
    assert not engine.samples_itself(Sampling(top_k=20, presence_penalty=0.5), few)


def server_with(complete: Any, candidates: Any = None) -> LlamaCppServer:
    """A server that responds with these functions."""
    client: Any = SimpleNamespace(base_url="http://x")
    probe = TokenizerProbe(PROMPT.tolist(), [65], BYTES, "")
    server: Any = LlamaCppServer(client, ModelInfo({"id": "x"}, {}), probe)
    server.complete, server.candidates = complete, candidates
    return server


class FakeLlamaCpp:
    """llama.cpp's responses, and what is wrong with them."""

    def __init__(self, wrong: str) -> None:
        self.wrong, self.requests = wrong, 0

    async def __call__(self, body: dict[str, Any], path: str) -> Any:
        if self.wrong == "raises":
            raise EngineError("refuses (404)")
        if self.wrong == "refuses":
            return {"error": {"message": "no"}}
        self.requests += 1
        rng = np.random.default_rng(
            0 if self.wrong == "seeds" else self.requests if self.wrong == "rounding" else body["seed"]
        )
        allowed = np.setdiff1d(
            np.arange(65, 91), [] if self.wrong == "bans" else [token for token, _ in body["logit_bias"]]
        )
        ids = rng.choice(allowed[: body["top_k"]], size=body["n_predict"]).tolist()
        prob = {"probabilities": 0.2, "numbers": np.nan}.get(self.wrong, 0.5)
        entries = [{"id": token, "prob": prob, "top_probs": [{"id": token, "prob": prob}] * 2} for token in ids]
        return {"completion_probabilities": entries, **({} if self.wrong == "tokens" else {"tokens": ids})}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("", ""),
        ("raises", "does not take what is needed, or returns no token ids (refuses (404))"),
        ("refuses", "returns no token ids"),
        ("tokens", "returns no token ids"),
        ("seeds", "no: other seeds must sample other tokens"),
        ("probabilities", "no: it returns other log-probabilities than it samples with"),
        ("numbers", "other log-probabilities than it samples with"),
        ("rounding", ""),
        ("bans", "cannot be kept from sampling"),
    ],
)
def test_what_a_server_lacks_is_named(wrong, message):
    server = server_with(FakeLlamaCpp(wrong))
    server.missing = missing = asyncio.run(server.find_missing())
    assert server.samples == (f"no: {missing}" if message else "yes")
    assert message in server.samples
    assert "vLLM" not in missing


def test_probabilities_that_are_not_certain_are_requested_again():
    prompts: list[list[int]] = []

    async def complete(*_: Any) -> Any:
        entries = [{"id": token, "prob": 0.9, "top_probs": []} for token in (65, 66)]
        return {"tokens": [65, 67, 66], "completion_probabilities": entries}

    async def candidates(session: Any, ids: np.ndarray, count: int) -> TopTokens:
        prompts.append(ids.tolist())
        return TopTokens(Candidates(np.array([65, 66, 67]), np.log([0.2, 0.3, 0.5])), None)

    request = GenerateRequest(0, PROMPT, 3, Sampling(top_k=5, temperature=1.0), NONE, 1)
    response = asyncio.run(server_with(complete, candidates).generate(None, request, ()))
    assert prompts == [[*PROMPT], [*PROMPT, 65], [*PROMPT, 65, 67]]
    assert (response.ids, response.logprobs) == ([65, 67, 66], pytest.approx(np.log([0.2, 0.5, 0.3])))


@pytest.mark.parametrize("response", [{}, None, {"tokens": []}, {"tokens": ["x"]}, {"tokens": [9999]}, {"tokens": 3}])
def test_a_malformed_response_is_an_error(response):
    async def complete(*_: Any) -> Any:
        return response

    request = GenerateRequest(0, PROMPT, 2, Sampling(top_k=5), NONE, 1)
    with pytest.raises(EngineError, match=r"llama\.cpp sends a malformed response"):
        asyncio.run(server_with(complete).generate(None, request, ()))
