"""A transform `A_i` in the parameters of vLLM, and of servers with its API: where it is the same distribution.

The ids that may not be sampled are many, and go as a short text: "0-16,151643,151665-151935".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from mixlm.engines.requests import GenerateRequest
from mixlm.types import PLAIN_SAMPLING, Ids, Sampling

SESSION_PATH = "/v1/mixlm/session"  # of `session_plugin`
BANNED_ARGUMENT = "mixlm_banned"  # the name in requests of the ids that may not be sampled
# vLLM raises temperatures below the first, and refuses those above the second.
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.01, 2.0


def samples_identically(sampling: Sampling) -> bool:
    """Whether the options give the same distribution there as here.

    There min-p is applied before top-k and top-p. With top-k alone it is the same; top-p would take its mass from fewer
    tokens. Penalties there count the tokens of one request, not those of the whole completion.
    """
    return (
        not sampling.has_penalties
        and _MIN_TEMPERATURE <= sampling.temperature <= _MAX_TEMPERATURE
        and (sampling.min_p == 0 or sampling.top_p == 1)
    )


def logprobs_parameters(count: int, among: Ids | None = None) -> dict[str, Any]:
    """Return the parameters of a request for the `count` most likely tokens of a model's own distribution.

    among: the ids that count, int64. The others are masked before anything else; that shows in log-probabilities with
    `logprobs_mode` "processed_logprobs".
    """
    parameters = {**sampling_parameters(PLAIN_SAMPLING, 0, 1), "logprobs": count}
    return parameters if among is None else {**parameters, "allowed_token_ids": among.tolist()}


def sampling_parameters(sampling: Sampling, seed: int, length: int) -> dict[str, Any]:
    """Return the parameters of a request for `length` tokens.

    All that could change the distribution is set: models have defaults of their own.
    """
    return {
        "max_tokens": length,
        "seed": seed,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or -1,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def generation_parameters(request: GenerateRequest, ends: Sequence[int]) -> dict[str, Any]:
    """Return the parameters of a request to sample, but for the ids that it bans. ends: ids that end a text."""
    parameters = sampling_parameters(request.sampling, request.seed, request.max_tokens)
    return {**parameters, "stop_token_ids": list(ends), "logprobs": 0}


def banned_ranges(banned: Ids) -> str:
    """Write ids, int64 (n,) in ascending order, as ranges."""
    return _ranges(banned.tobytes())  # once for all requests that ban the same ids


@lru_cache(maxsize=64)
def _ranges(banned: bytes) -> str:
    ids = np.frombuffer(banned, dtype=np.int64)
    if ids.size == 0:
        return ""
    breaks = np.flatnonzero(np.diff(ids) != 1)
    starts, ends = ids[np.append(0, breaks + 1)].tolist(), ids[np.append(breaks, ids.size - 1)].tolist()
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def parse_ranges(ranges: str) -> Ids:
    """Read what `banned_ranges` returns. Raises ValueError for anything else."""
    ids: list[int] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ValueError(f"{part!r} is no id and no range of ids")
        ids.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return np.array(ids, dtype=np.int64)
