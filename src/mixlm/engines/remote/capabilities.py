"""What a server with `/v1/completions` does beside telling its likeliest tokens: tried out when a member is loaded.

It may draw by itself, several tokens a request, if what it draws follows our law and can be told: it gives token ids,
log-probabilities of what it draws from (vLLM's `--logprobs-mode processed_logprobs`), takes seeds, and can be kept from
drawing control tokens. What is missing is named in the engine's details; then it is asked token by token. How servers
of llama.cpp draw is in `engines/remote/llamacpp_runs`.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mixlm.engines.base import GenerateRequest, GenerateResponse
from mixlm.engines.remote.protocols import cached_tokens
from mixlm.engines.vllm.id_ranges import BANNED_ARGUMENT, format_ranges
from mixlm.engines.vllm.sampling_params import samples_identically, sampling_parameters
from mixlm.errors import EngineError
from mixlm.types import Ids, Sampling

Complete = Callable[[dict[str, Any]], Awaitable[tuple[Any, bool]]]

_MOST_BIASES = 300  # what OpenAI allows; more are slow in every request
_PROBED = 6


@dataclass(frozen=True)
class ServerCapabilities:
    """What a server does. missing: what it lacks to draw by itself, "" for nothing, None where it was not tried.

    masks: whether ids are banned by the argument of `vllm_mask`; else by `logit_bias`.
    """

    missing: str | None = None
    masks: bool = False

    @property
    def draws(self) -> str:
        """Whether it draws by itself, in words, and why not; "" where that was not tried."""
        if self.missing is None:
            return ""
        return f"no: {self.missing}" if self.missing else "yes, masking" if self.masks else "yes"

    def writes(self, sampling: Sampling, banned: Ids) -> bool:
        """Whether it can draw with a transform."""
        return self.missing == "" and samples_identically(sampling) and (self.masks or banned.size <= _MOST_BIASES)

    def parameters(self, run: GenerateRequest, length: int, ends: Sequence[int]) -> dict[str, Any]:
        """Return how a run is drawn, what `banned` says aside."""
        own = {**sampling_parameters(run.sampling, run.seed, length), "stop_token_ids": list(ends), "logprobs": 0}
        return own if self.masks or run.banned.size == 0 else {**own, "logit_bias": _biases(run.banned.tobytes())}

    def banned(self, run: GenerateRequest) -> str:
        """Return the ids that may not be drawn where the server masks them, as ranges."""
        return _ranges(run.banned.tobytes()) if self.masks else ""

    def body(self, run: GenerateRequest, length: int, ends: Sequence[int]) -> dict[str, Any]:
        """Return the request for a run."""
        body = {"prompt": run.ids.tolist(), **self.parameters(run, length, ends), "return_token_ids": True}
        banned = self.banned(run)
        return {**body, "vllm_xargs": {BANNED_ARGUMENT: banned}} if banned else body


def parse_generation(answer: Any, base: str) -> GenerateResponse:
    """Read what a server wrote. Raises EngineError for what is no answer."""
    try:
        [choice] = answer["choices"]
        ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        good = len(ids) == len(logprobs) > 0 and all(type(one) is int for one in ids)
        written = GenerateResponse(list(ids), [float(one) for one in logprobs], cached_tokens(answer))
    except (TypeError, LookupError, ValueError, AttributeError):
        good = False
    if not good or not all(math.isfinite(one) for one in written.logprobs):
        raise EngineError(f"{base} gives no answer: {str(answer)[:200]}")
    return written


async def probe_capabilities(complete: Complete, ids: Sequence[int]) -> ServerCapabilities:
    """Find out what a server does behind a few ids."""
    prompt, none = np.array(ids), np.zeros(0, dtype=np.int64)

    async def draw(seed: int, banned: Ids = none, masks: bool = False) -> list[int]:
        run = GenerateRequest(0, prompt, _PROBED, Sampling(temperature=2.0, top_k=20), banned, seed)
        body = ServerCapabilities(masks=masks).body(run, _PROBED, ()) | {"ignore_eos": True}
        return parse_generation((await complete(body))[0], "the server").ids

    try:
        drawn = [await draw(seed) for seed in (1, *range(1, 9))]
        if drawn[0] != drawn[1] or all(one == drawn[0] for one in drawn):
            return ServerCapabilities("equal seeds must draw equal tokens there, and others others")
        if not await _told_as_drawn(complete, prompt):
            return ServerCapabilities(
                "it tells other log-probabilities than it draws with; vLLM needs --logprobs-mode processed_logprobs"
            )
        likely = np.unique([one[0] for one in drawn])
        for masks in (True, False):
            if await _bans(draw, likely, masks):
                return ServerCapabilities("", masks)
    except EngineError as error:
        return ServerCapabilities(f"it does not take what is needed, or tells no token ids ({error.message})")
    return ServerCapabilities("it cannot be kept from drawing some tokens")


async def _told_as_drawn(complete: Complete, prompt: Ids) -> bool:
    """Whether the probabilities of the two tokens that top-k leaves sum to one: they are what is drawn from."""
    parameters = sampling_parameters(Sampling(temperature=0.5, top_k=2), 1, 1)
    body = {"prompt": prompt.tolist(), **parameters, "logprobs": 2, "return_tokens_as_token_ids": True}
    value, _ = await complete(body)
    try:
        told = value["choices"][0]["logprobs"]["top_logprobs"][0]
        return abs(sum(math.exp(one) for one in told.values()) - 1) < 0.01
    except (TypeError, LookupError, AttributeError):
        return False


async def _bans(draw: Callable[[int, Ids, bool], Awaitable[list[int]]], likely: Ids, masks: bool) -> bool:
    """Whether tokens that were drawn are not drawn any more when they are banned."""
    try:
        return not any([(await draw(seed, likely, masks))[0] in likely for seed in range(1, 5)])
    except EngineError:
        return False


@lru_cache(maxsize=64)
def _ranges(banned: bytes) -> str:
    return format_ranges(np.frombuffer(banned, dtype=np.int64))


@lru_cache(maxsize=64)
def _biases(banned: bytes) -> dict[str, float]:
    return {str(one): -100.0 for one in np.frombuffer(banned, dtype=np.int64).tolist()}
