"""A server of llama.cpp, which samples several tokens a request itself, and scores given tokens one by one.

It applies samplers in the order that a request names, so temperature, top-k, top-p and min-p mean what they mean here.
Two things it cannot do. To ban many ids costs it 3 µs for each in every request, which is too much for Gemma's 6,249.
So a few are banned, and each position is checked for the others: where none of them is among the top k, banning it
would have changed nothing, and where one is, the response is cut there and that position is sampled here, from the top
tokens. Whether a position is cut depends on the text before it and not on what was sampled there, so the distribution
stays. And where a character is incomplete, llama.cpp returns no probabilities: that position is asked for once more,
for its numbers.

It returns no log-probabilities of a prompt: a bias makes it sample each given token, and the log-probability that it
returns is of the logits before any bias. Its prefix cache leaves one forward a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from mixlm.core.rng import Noise
from mixlm.core.sampling import Transform
from mixlm.engines.base import Session
from mixlm.engines.llamacpp.protocol import FORCING_BIAS, LlamaCppProtocol
from mixlm.engines.remote.http_client import HttpClient
from mixlm.engines.remote.model_info import ModelInfo
from mixlm.engines.remote.server import (
    ModelServer,
    TokenizerProbe,
    cached_tokens,
    log_probability,
    probe_sampling,
    reading,
    token_scores,
)
from mixlm.engines.requests import GenerateRequest, GenerateResponse
from mixlm.engines.topk_only import TokenScores
from mixlm.types import Candidates, Ids, Sampling, TopKFilter

_SAMPLING_PATH = "/completion"  # `/v1/completions` does not return the ids of the tokens
_MAX_BANNED = 32  # ids that a request bans
_MAX_TOP_K = 256  # top tokens returned for each token
_SPARE = 16  # how many more of the top tokens are asked for than may be sampled
_FIELDS = ["tokens", "completion_probabilities", "timings"]
_PROBE_LENGTH = 4


class LlamaCppServer(LlamaCppProtocol, ModelServer):
    """A model on a server of llama.cpp."""

    name = "llama.cpp"

    def __init__(self, client: HttpClient, info: ModelInfo, tokenizer: TokenizerProbe) -> None:
        ModelServer.__init__(self, client, info, tokenizer)
        LlamaCppProtocol.__init__(self, letter_token=tokenizer.first_ids[0])

    async def find_missing(self) -> str:
        """Find out what it lacks to sample itself."""
        return await probe_sampling(self._sample, self._top_two)

    def samples_itself(self, sampling: Sampling, banned: Ids) -> bool:
        """Whether it can sample with these options and banned ids.

        Top-p takes its mass from the top k, which are other tokens where one of them is banned afterwards.
        """
        return (
            not self.missing
            and not sampling.has_penalties
            and 1 <= sampling.top_k <= _MAX_TOP_K
            and (banned.size <= _MAX_BANNED or sampling.top_p == 1)
        )

    async def generate(self, session: Session, request: GenerateRequest, ends: Sequence[int]) -> GenerateResponse:
        """Let it sample tokens itself."""
        banned_there, banned = _select_banned(request.banned.tobytes(), frozenset(ends))
        all_banned = len(banned_there) == len(banned)
        body = _generation_body(request, banned_there, 1 if all_banned else request.sampling.top_k)
        async with self.slot(session, request.ids) as slot:
            response = await self.complete(body, _SAMPLING_PATH, slot)
        ids: list[int] = []
        logprobs: list[float] = []
        count = request.sampling.top_k + _SPARE
        for token, reported in _parse_generation(response, self.tokenizer.tokens):
            if (info := reported) is None:
                prompt = np.concatenate([request.ids, np.array(ids, dtype=np.int64)])
                info = _token_info(request, (await self.candidates(session, prompt, count)).candidates, token)
            if not all_banned and not banned.isdisjoint(info.top_k):
                break
            ids.append(token)
            logprobs.append(info.logprob)
        if not ids:
            distribution = _distribution(request, (await self.candidates(session, request.ids, count)).candidates)
            index = Noise(request.seed).sample(distribution.ids, distribution.logprobs)
            ids, logprobs = [int(distribution.ids[index])], [float(distribution.logprobs[index])]
        return GenerateResponse(ids, logprobs, cached_tokens(response))

    async def prompt_scores(self, session: Session, ids: Ids) -> TokenScores:
        """Return the log-probabilities of a prompt's tokens but the first, asked for one by one."""
        scores = []
        async with self.slot(session, ids) as slot:
            for end in range(1, len(ids)):
                prompt, token = ids[:end].tolist(), int(ids[end])
                forced = {"logit_bias": [[token, FORCING_BIAS]]}
                body = {"prompt": prompt, "n_predict": 1, "temperature": 1.0, "n_probs": 1, **forced}
                score = _parse_score(await self.complete(body, slot=slot), token)
                if score is None:  # a part of a character, whose numbers are withheld
                    everything = await self.top_tokens(prompt, len(self.tokenizer.tokens), slot)
                    score = _score_among(everything.candidates, token)
                scores.append(score)
        return token_scores([logprob for logprob, _ in scores], [is_top for _, is_top in scores])

    async def _probe(self, seed: int, sampling: Sampling, banned: Ids) -> tuple[list[int], list[dict[str, Any]]]:
        """Return a few tokens, and what is reported of those that end a character."""
        request = GenerateRequest(0, np.array(self.tokenizer.ids), _PROBE_LENGTH, sampling, banned, seed)
        body = {**_generation_body(request, banned.tolist(), 2), "ignore_eos": True, "cache_prompt": False}
        response = await self.complete(body, _SAMPLING_PATH)
        with reading(self.client.base_url, response):
            tokens, entries = response["tokens"], response["completion_probabilities"]
            if len(tokens) != _PROBE_LENGTH or not entries:
                raise ValueError
        return tokens, entries

    async def _sample(self, seed: int, banned: Ids) -> list[int]:
        return (await self._probe(seed, Sampling(temperature=2.0, top_k=20), banned))[0]

    async def _top_two(self) -> list[float]:
        _, entries = await self._probe(1, Sampling(temperature=0.5, top_k=2), np.zeros(0, dtype=np.int64))
        with reading(self.client.base_url, entries):
            return [sum(top["prob"] for top in entry["top_probs"]) for entry in entries]


@dataclass(frozen=True)
class _TokenInfo:
    """A sampled token's log-probability, and the ids that it was sampled from, the top k."""

    logprob: float
    top_k: frozenset[int]


@lru_cache(maxsize=64)
def _select_banned(banned: bytes, ends: frozenset[int]) -> tuple[list[int], frozenset[int]]:
    """Return the ids that a request bans, and all. Ends of text are likely, and control tokens are often the first."""
    ids = np.frombuffer(banned, dtype=np.int64).tolist()
    return sorted(ids, key=lambda token: (token not in ends, token))[:_MAX_BANNED], frozenset(ids)


def _generation_body(request: GenerateRequest, banned: Sequence[int], top_probs: int) -> dict[str, Any]:
    """Return a request that has `top_probs` of the tokens returned that each token was sampled from."""
    options = request.sampling
    return {
        "prompt": request.ids.tolist(),
        "n_predict": request.max_tokens,
        "samplers": ["temperature", "top_k", "top_p", "min_p"],
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "seed": request.seed & 0x7FFFFFFF,  # it takes 32 bits, and the largest of those means any
        "logit_bias": [[token, False] for token in banned],
        "n_probs": top_probs,
        "post_sampling_probs": True,
        "return_tokens": True,
        "response_fields": _FIELDS,
    }


def _parse_generation(response: Any, tokens: Sequence[bytes]) -> list[tuple[int, _TokenInfo | None]]:
    """Return the tokens of a response, and what it reports of each. Raises EngineError for what is no response."""
    with reading("llama.cpp", response):
        ids, entries = [int(token) for token in response["tokens"]], list(response.get("completion_probabilities", ()))
        is_reported = [not _is_cut_short(text) for text in accumulate(tokens[token] for token in ids)]
        if [entry["id"] for entry in entries] != [i for i, reported in zip(ids, is_reported, strict=True) if reported]:
            is_reported = [False] * len(ids)  # it is not certain which tokens the entries belong to
        rest = iter(entries)
        if not ids:
            raise ValueError
        return [
            (token, _parse_entry(next(rest)) if reported else None)
            for token, reported in zip(ids, is_reported, strict=True)
        ]


def _parse_entry(entry: Any) -> _TokenInfo:
    return _TokenInfo(math.log(entry["prob"]), frozenset(top["id"] for top in entry["top_probs"]))


def _is_cut_short(text: bytes) -> bool:
    """Whether a text ends within a character, as llama.cpp sees it: by the last first byte of one."""
    for back in range(1, min(len(text), 4) + 1):
        byte = text[-back]
        if byte & 0xC0 != 0x80:
            return back < (1 if byte >= 0xF8 or byte < 0xC0 else 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2)
    return False


def _token_info(request: GenerateRequest, candidates: Candidates, token: int) -> _TokenInfo:
    """Return what would have been reported of a token, by the top tokens at its position."""
    distribution = _distribution(request, candidates)
    index = np.flatnonzero(distribution.ids == token)
    # By rounding it may be missing from the distribution that it was sampled from.
    logprob = float(distribution.logprobs[index[0]] if index.size else distribution.logprobs.min())
    top_k = candidates.ids[np.argsort(-candidates.logprobs)[: request.sampling.top_k]]
    return _TokenInfo(logprob, frozenset(top_k.tolist()))


def _distribution(request: GenerateRequest, candidates: Candidates) -> Candidates:
    """Return what a request samples from, by the top tokens at its position."""
    top_k = TopKFilter(request.sampling.top_k, request.banned).apply(candidates)
    return Transform(request.sampling, request.banned)(top_k)


def _parse_score(response: Any, token: int) -> tuple[float, bool] | None:
    """Return the log-probability of a token that was forced, and whether it is the top; None where it is withheld."""
    with reading("llama.cpp", response):
        content = response["choices"][0]["logprobs"]
        if content is None or not content["content"]:
            return None
        [entry] = content["content"]
        if entry["id"] != token:
            return None
        top = entry["top_logprobs"][0]
        logprob = entry["logprob"]
    return log_probability(logprob), top["id"] == token or logprob >= top["logprob"]


def _score_among(candidates: Candidates, token: int) -> tuple[float, bool]:
    """Return a token's log-probability and whether it is the top, by the whole vocabulary."""
    values = candidates.logprobs.astype(np.float64)
    own = values[candidates.ids == token]
    if not own.size:
        return -math.inf, False
    return float(own[0] - np.logaddexp.reduce(values)), bool(own[0] >= values.max())
