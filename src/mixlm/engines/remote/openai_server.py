"""A server with vLLM's API: `/v1/completions` with ids in and ids out, or mixlm's session route, where it has that.

It may sample itself, several tokens a request, if what it samples follows the member's distribution and is reported in
full: it returns token ids and log-probabilities of what it samples from (vLLM's `--logprobs-mode processed_logprobs`),
takes seeds, and can be kept from sampling control tokens. What is missing is named in the engine's details; then it is
asked token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from mixlm.engines.base import Session
from mixlm.engines.remote.server import (
    ModelServer,
    TopTokens,
    cached_tokens,
    generated_tokens,
    probe_sampling,
    reading,
    token_scores,
)
from mixlm.engines.remote.session_client import SessionPool
from mixlm.engines.requests import GenerateRequest, GenerateResponse
from mixlm.engines.topk_only import TokenScores, listed_candidates
from mixlm.engines.vllm.sampling_params import (
    BANNED_ARGUMENT,
    banned_ranges,
    generation_parameters,
    logprobs_parameters,
    samples_identically,
    sampling_parameters,
)
from mixlm.types import Candidates, Ids, Sampling

_ID_PREFIX = "token_id:"
_AS_IDS = {"return_tokens_as_token_ids": True}
_MAX_BIASES = 300  # what OpenAI allows; more are slow in every request
_PROBE_LENGTH = 6


class OpenAIServer(ModelServer):
    """A model on a server with vLLM's API.

    masks: whether it masks banned ids by the argument of `vllm/banned_tokens_plugin`; else they are biased away.
    """

    name = "OpenAI completions"
    may_be_limited = True
    masks = False

    def request_bodies(self, ids: list[int], count: int, among: Ids | None = None) -> Sequence[dict[str, Any]]:
        """Ask for one token with its `logprobs`, spelled as ids."""
        return ({"prompt": ids, **logprobs_parameters(count, among), **_AS_IDS},)

    def parse(self, response: Any) -> Candidates | None:
        """Read `top_logprobs` of the one token; None where tokens are spelled as text."""
        logprobs = response["choices"][0]["logprobs"]
        if logprobs is None:
            return None
        top = logprobs["top_logprobs"][0]
        if not all(token.startswith(_ID_PREFIX) for token in top):
            return None
        return listed_candidates((int(token.removeprefix(_ID_PREFIX)), logprob) for token, logprob in top.items())

    def score_requests(self, ids: list[int]) -> Sequence[tuple[dict[str, Any], Callable[[Any], TokenScores]]]:
        """Ask for vLLM's `prompt_logprobs`, or for OpenAI's `echo`."""
        common = {"prompt": ids, "max_tokens": 1, "temperature": 1.0}
        return (
            ({**common, "prompt_logprobs": 1}, partial(_parse_prompt_logprobs, ids)),
            ({**common, "echo": True, "logprobs": 1, **_AS_IDS}, partial(_parse_echo, ids)),
        )

    async def find_missing(self) -> str:
        """Find out what it lacks to sample itself, whether it `masks`, and whether it has the session route."""
        pool = SessionPool(self.client, self.check)
        self.sessions = pool if await pool.is_available() else None
        hint = "; vLLM needs --logprobs-mode processed_logprobs"
        probe = partial(probe_sampling, self._sample, self._top_two, hint, repeats=True)
        self.masks = True
        if await probe():
            self.masks = False
            return await probe()
        return ""

    @property
    def samples(self) -> str:
        """Whether it samples itself, in words, and why not."""
        return "yes, masking" if self.masks and not self.missing else super().samples

    def samples_itself(self, sampling: Sampling, banned: Ids) -> bool:
        """Whether it can sample with these options and banned ids."""
        return not self.missing and samples_identically(sampling) and (self.masks or banned.size <= _MAX_BIASES)

    async def candidates(self, session: Session, ids: Ids, count: int, among: Ids | None = None) -> TopTokens:
        """Ask for the most likely tokens, by the session route where all ids count: it takes none."""
        if self.sessions is None or among is not None:
            return await super().candidates(session, ids, count, among)
        response = await self.sessions.generate(session, ids, logprobs_parameters(count))
        with reading(self.client.base_url, response):
            [top] = response["logprobs"]
            candidates = listed_candidates((int(token), logprob) for token, logprob in top.items())
        return TopTokens(self.without_padding(candidates), response.get("cached"))

    async def generate(self, session: Session, request: GenerateRequest, ends: Sequence[int]) -> GenerateResponse:
        """Let it sample tokens itself."""
        if self.sessions is None:
            return self._parse_generation(await self.complete(self._generation_body(request, ends)))
        parameters, masked = self._generation_parameters(request, ends)
        response = await self.sessions.generate(session, request.ids, parameters, masked)
        with reading(self.client.base_url, response):
            ids = [int(token) for token in response["ids"]]
            logprobs = (top[str(token)] for token, top in zip(ids, response["logprobs"], strict=True))
            return generated_tokens(ids, logprobs, response.get("cached"))

    def _generation_parameters(self, request: GenerateRequest, ends: Sequence[int]) -> tuple[dict[str, Any], str]:
        """Return the parameters of a request to sample, and the ids that the server masks, as ranges."""
        parameters = generation_parameters(request, ends)
        if self.masks:
            return parameters, banned_ranges(request.banned)
        biases = _biases(request.banned.tobytes())
        return {**parameters, "logit_bias": biases} if biases else parameters, ""

    def _generation_body(self, request: GenerateRequest, ends: Sequence[int] = ()) -> dict[str, Any]:
        parameters, masked = self._generation_parameters(request, ends)
        body = {"prompt": request.ids.tolist(), **parameters, "return_token_ids": True}
        return {**body, "vllm_xargs": {BANNED_ARGUMENT: masked}} if masked else body

    def _parse_generation(self, response: Any) -> GenerateResponse:
        with reading(self.client.base_url, response):
            [choice] = response["choices"]
            ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            if len(ids) != len(logprobs) or not all(type(token) is int for token in ids):
                raise ValueError
            return generated_tokens(ids, logprobs, cached_tokens(response))

    async def _sample(self, seed: int, banned: Ids) -> list[int]:
        sampling = Sampling(temperature=2.0, top_k=20)
        request = GenerateRequest(0, np.array(self.tokenizer.ids), _PROBE_LENGTH, sampling, banned, seed)
        response = await self.complete({**self._generation_body(request), "ignore_eos": True})
        return self._parse_generation(response).ids

    async def _top_two(self) -> list[float]:
        parameters = sampling_parameters(Sampling(temperature=0.5, top_k=2), 1, 1)
        response = await self.complete({"prompt": self.tokenizer.ids, **parameters, "logprobs": 2, **_AS_IDS})
        with reading(self.client.base_url, response):
            return [sum(map(math.exp, response["choices"][0]["logprobs"]["top_logprobs"][0].values()))]


@lru_cache(maxsize=64)
def _biases(banned: bytes) -> dict[str, float]:
    return {str(token): -100.0 for token in np.frombuffer(banned, dtype=np.int64).tolist()}


def _parse_prompt_logprobs(ids: list[int], response: Any) -> TokenScores:
    """Read for each token but the first, log-probability and rank by id."""
    entries = response["choices"][0].get("prompt_logprobs")
    if entries is None:
        entries = response["prompt_logprobs"]
    logprobs, is_top = [], []
    for token, entry in zip(ids[1:], entries[1:], strict=True):
        own = entry[str(token)]
        logprobs.append(float(own["logprob"]))
        is_top.append(all(own["logprob"] >= other["logprob"] for other in entry.values()))
    return token_scores(logprobs, is_top)


def _parse_echo(ids: list[int], response: Any) -> TokenScores:
    """Read `token_logprobs`, and compare with `top_logprobs`, where tokens are spelled as ids."""
    reported = response["choices"][0]["logprobs"]
    if len(reported["token_logprobs"]) < len(ids) or reported["token_logprobs"][0] is not None:
        raise ValueError("it does not echo the prompt's tokens")
    pairs = list(zip(reported["token_logprobs"][1:], reported["top_logprobs"][1:], strict=True))[: len(ids) - 1]
    is_top = [logprob >= max(top.values(), default=logprob) for logprob, top in pairs]
    return token_scores([float(logprob) for logprob, _ in pairs], is_top)
