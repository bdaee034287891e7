"""A transform `A_i` in the parameters of vLLM, and of servers with its API: where it is the same distribution."""

from __future__ import annotations

from typing import Any

from mixlm.types import Ids, Sampling

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
    parameters = {**sampling_parameters(Sampling(temperature=1.0, top_k=0), 0, 1), "logprobs": count}
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
