"""A transform `A_i` in the words of vLLM, and of servers that speak as it does: where it is the same law."""

from __future__ import annotations

from typing import Any

from mixlm.types import Sampling

# vLLM raises temperatures below the first, and refuses those above the second.
_COLDEST, _HOTTEST = 0.01, 2.0


def samples_identically(sampling: Sampling) -> bool:
    """Whether the options mean there what they mean here.

    There min-p is applied in front of top-k and top-p. With top-k alone it is the same; top-p would take its mass from
    fewer tokens. Penalties there look at what one request wrote, which is not the reply.
    """
    return (
        not sampling.has_penalties
        and _COLDEST <= sampling.temperature <= _HOTTEST
        and (sampling.min_p == 0 or sampling.top_p == 1)
    )


def logprobs_parameters(count: int) -> dict[str, Any]:
    """Return the parameters of a request for the `count` likeliest tokens of a model's own law."""
    return {**sampling_parameters(Sampling(temperature=1.0, top_k=0), 0, 1), "logprobs": count}


def sampling_parameters(sampling: Sampling, seed: int, length: int) -> dict[str, Any]:
    """Return the parameters of a request. All that could change the law is given: models have defaults of their own."""
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
