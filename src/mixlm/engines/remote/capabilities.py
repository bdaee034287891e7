"""What a server with `/v1/completions` can do beside returning its most likely tokens: probed when a member is loaded.

It may sample itself, several tokens a request, if what it samples follows the member's distribution and is reported in
full: it returns token ids and log-probabilities of what it samples from (vLLM's `--logprobs-mode processed_logprobs`),
takes seeds, and can be kept from sampling control tokens. What is missing is named in the engine's details; then it is
asked token by token. How llama.cpp's servers sample is in `llamacpp_capabilities`.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mixlm.engines.remote.protocols import cached_tokens, generated_tokens, reading
from mixlm.engines.requests import GenerateRequest, GenerateResponse
from mixlm.engines.vllm.sampling_params import (
    BANNED_ARGUMENT,
    banned_ranges,
    generation_parameters,
    samples_identically,
    sampling_parameters,
)
from mixlm.errors import EngineError
from mixlm.types import Ids, Sampling

Complete = Callable[[dict[str, Any]], Awaitable[tuple[Any, bool]]]

_MAX_BIASES = 300  # what OpenAI allows; more are slow in every request
_PROBE_LENGTH = 6


@dataclass(frozen=True)
class ServerCapabilities:
    """What a server with vLLM's API can do.

    missing: what it lacks to sample itself, "" for nothing. masks: whether it masks banned ids by the argument of
    `vllm/banned_tokens_plugin`; else they are biased away.
    """

    missing: str = ""
    masks: bool = False

    @property
    def summary(self) -> str:
        """Whether it samples itself, in words, and why not."""
        return f"no: {self.missing}" if self.missing else "yes, masking" if self.masks else "yes"

    def samples_itself(self, sampling: Sampling, banned: Ids) -> bool:
        """Whether it can sample with these options and banned ids."""
        return not self.missing and samples_identically(sampling) and (self.masks or banned.size <= _MAX_BIASES)

    def parameters(self, request: GenerateRequest, ends: Sequence[int]) -> dict[str, Any]:
        """Return the parameters of a request, but for what `banned` has. ends: ids that end a text."""
        parameters = generation_parameters(request, ends)
        if not self.masks and request.banned.size:
            parameters["logit_bias"] = _biases(request.banned.tobytes())
        return parameters

    def banned(self, request: GenerateRequest) -> str:
        """Return the ids that may not be sampled, as ranges, where the server masks them; else ""."""
        return banned_ranges(request.banned) if self.masks else ""

    def body(self, request: GenerateRequest, ends: Sequence[int]) -> dict[str, Any]:
        """Return a request for `/v1/completions`; arguments as for `parameters`."""
        parameters = self.parameters(request, ends)
        body = {"prompt": request.ids.tolist(), **parameters, "return_token_ids": True}
        banned = self.banned(request)
        return {**body, "vllm_xargs": {BANNED_ARGUMENT: banned}} if banned else body


def parse_generation(response: Any, base_url: str) -> GenerateResponse:
    """Read the tokens that a server generated. Raises EngineError for what is no such response."""
    with reading(base_url, response):
        [choice] = response["choices"]
        ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if len(ids) != len(logprobs) or not all(type(token) is int for token in ids):
            raise ValueError
        return generated_tokens(ids, logprobs, cached_tokens(response))


async def probe_capabilities(complete: Complete, ids: Sequence[int]) -> ServerCapabilities:
    """Find out what a server can do.

    Args:
        complete: sends a body to `/v1/completions`.
        ids: the prompt that it is tried with.
    """
    prompt, none = np.array(ids), np.zeros(0, dtype=np.int64)

    async def sample(seed: int, banned: Ids = none, masks: bool = False) -> list[int]:
        request = GenerateRequest(0, prompt, _PROBE_LENGTH, Sampling(temperature=2.0, top_k=20), banned, seed)
        body = ServerCapabilities(masks=masks).body(request, ()) | {"ignore_eos": True}
        return parse_generation((await complete(body))[0], "the server").ids

    try:
        samples = [await sample(seed) for seed in (1, *range(1, 9))]
        if samples[0] != samples[1] or all(tokens == samples[0] for tokens in samples):
            return ServerCapabilities("equal seeds must sample equal tokens there, and other seeds other tokens")
        if not await _returns_processed_logprobs(complete, prompt):
            return ServerCapabilities(
                "it returns other log-probabilities than it samples with; vLLM needs --logprobs-mode processed_logprobs"
            )
        likely = np.unique([tokens[0] for tokens in samples])
        for masks in (True, False):
            if await _bans(sample, likely, masks):
                return ServerCapabilities("", masks)
    except EngineError as error:
        return ServerCapabilities(f"it does not take what is needed, or returns no token ids ({error.message})")
    return ServerCapabilities("it cannot be kept from sampling some tokens")


async def _returns_processed_logprobs(complete: Complete, prompt: Ids) -> bool:
    """Whether the probabilities of the two tokens that top-k leaves sum to one: they are what is sampled from."""
    parameters = sampling_parameters(Sampling(temperature=0.5, top_k=2), 1, 1)
    body = {"prompt": prompt.tolist(), **parameters, "logprobs": 2, "return_tokens_as_token_ids": True}
    response, _ = await complete(body)
    try:
        top = response["choices"][0]["logprobs"]["top_logprobs"][0]
        return abs(sum(map(math.exp, top.values())) - 1) < 0.01
    except (TypeError, LookupError, AttributeError):
        return False


async def _bans(sample: Callable[[int, Ids, bool], Awaitable[list[int]]], likely: Ids, masks: bool) -> bool:
    """Whether tokens that were sampled are no longer sampled when they are banned."""
    try:
        return not any([(await sample(seed, likely, masks))[0] in likely for seed in range(1, 5)])
    except EngineError:
        return False


@lru_cache(maxsize=64)
def _biases(banned: bytes) -> dict[str, float]:
    return {str(token): -100.0 for token in np.frombuffer(banned, dtype=np.int64).tolist()}
