"""Asking servers for "the N likeliest tokens after these ids", and reading what they say.

llama.cpp (in this process or behind HTTP), the servers that speak as vLLM does, and SGLang are each asked in their own
way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from mixlm.engines.vllm.sampling_params import logprobs_parameters
from mixlm.types import Candidates

_ID = "token_id:"
_LOWEST = -1e38


class ServerProtocol(Protocol):
    """How one kind of server is asked. path: where to."""

    name: str
    path: str

    def bodies(self, ids: list[int], count: int) -> Sequence[dict[str, Any]]:
        """Return requests to make in turn until one is answered with numbers."""
        ...

    def read(self, answer: Any) -> Candidates | None:
        """Return the likeliest tokens that an answer tells, None where it tells none.

        Raises TypeError, LookupError or ValueError for what is no answer.
        """
        ...


class LlamaCppProtocol:
    """llama.cpp's server. whole_character: the id of a token that is one."""

    name = "llama.cpp"
    path = "/v1/completions"

    def __init__(self, whole_character: int) -> None:
        self._forced = [[whole_character, 1000.0]]

    def bodies(self, ids: list[int], count: int) -> Sequence[dict[str, Any]]:
        """Ask for the probabilities among the N likeliest; then for those before llama.cpp's own draw.

        Where what it drew is a part of a character, it keeps the numbers back until the rest comes. The second request
        has it draw a whole one. To ask like that every time would sort the whole vocabulary for each token.
        """
        common = {"prompt": ids, "n_predict": 1, "temperature": 1.0, "seed": 0, "n_probs": count}
        return (
            {**common, "samplers": ["top_k"], "top_k": count, "post_sampling_probs": True},
            {**common, "logit_bias": self._forced},
        )

    def read(self, answer: Any) -> Candidates | None:
        """Read `top_probs` or `top_logprobs` of the one token."""
        told = answer["choices"][0]["logprobs"]
        if told is None:
            return None
        [token] = told["content"]
        if "top_probs" in token:
            return _candidates((one["id"], _log(one["prob"])) for one in token["top_probs"])
        return _candidates((one["id"], one["logprob"]) for one in token["top_logprobs"])


class OpenAIProtocol:
    """`/v1/completions` as vLLM answers it: ids in, ids out."""

    name = "OpenAI completions"
    path = "/v1/completions"

    def bodies(self, ids: list[int], count: int) -> Sequence[dict[str, Any]]:
        """Ask for one token with its `logprobs`, spelled as ids."""
        # A model's defaults would otherwise cut and bend what a server tells of the laws that it draws from.
        body = {"prompt": ids, **logprobs_parameters(count)}
        return ({**body, "return_tokens_as_token_ids": True},)

    def read(self, answer: Any) -> Candidates | None:
        """Read `top_logprobs` of the one token; None where tokens are told by their text."""
        told = answer["choices"][0]["logprobs"]
        if told is None:
            return None
        likeliest = told["top_logprobs"][0]
        if not all(one.startswith(_ID) for one in likeliest):
            return None
        return _candidates((int(one.removeprefix(_ID)), value) for one, value in likeliest.items())


class SGLangProtocol:
    """SGLang's own `/generate`: its `/v1/completions` spells the likeliest tokens as text.

    adapter: name of the LoRA adapter to ask, "" for the model itself. Fields are those of version 0.5.23 of October
    2026; 0.4.6, 0.5.3 and 0.5.6 have the same.
    """

    name = "SGLang"
    path = "/generate"
    missing = (
        "it takes seeds with --enable-deterministic-inference only, and tells log-probabilities from before top-k, "
        "top-p and min-p"
    )

    def __init__(self, adapter: str = "") -> None:
        self._adapter = {"lora_path": adapter} if adapter else {}

    def bodies(self, ids: list[int], count: int) -> Sequence[dict[str, Any]]:
        """Ask for one token with the likeliest N.

        What is told are the log-probabilities of the logits divided by the temperature, in front of any cut, so a
        temperature of 1 tells the model's own. A server may have defaults of its own for all that could bend them.
        """
        sampling = {
            "max_new_tokens": 1,
            "min_new_tokens": 0,
            "ignore_eos": True,
            "temperature": 1.0,
            "top_k": -1,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        told = {"return_logprob": True, "top_logprobs_num": count, "logprob_start_len": -1}
        return ({"input_ids": ids, "sampling_params": sampling, **told, **self._adapter},)

    def read(self, answer: Any) -> Candidates | None:
        """Read `output_top_logprobs` of the one token: a log-probability, an id and a text for each."""
        told = answer["meta_info"].get("output_top_logprobs")
        if told is None:
            return None
        [likeliest] = told
        # A probability that is 0 in float32 is told as the lowest number that there is.
        return _candidates((one, value if value > _LOWEST else -math.inf) for value, one, _ in likeliest)


def is_sglang(card: dict[str, Any]) -> bool:
    """Whether what a server says of a model in `/v1/models` is as SGLang says it."""
    return card.get("owned_by") == "sglang"


def sglang_context(card: dict[str, Any], said: dict[str, Any]) -> int | None:
    """Return how many tokens a prompt may have, by `/v1/models` and `/server_info`; None where neither says it.

    SGLang refuses prompts of `max_req_input_len` tokens and more: that is 6 less than the context, or than what its
    cache of keys and values has room for where that is less.
    """
    limit = int(said.get("max_req_input_len") or 0) or int(card.get("max_model_len") or 0) - 6
    return limit - 1 if limit > 1 else None


def cached_tokens(answer: Any) -> int | None:
    """Return how many tokens of the prompt a server had read before, by what it reports; None where it does not."""
    for at, name in (("timings", "cache_n"), ("usage", "prompt_tokens_details"), ("meta_info", "cached_tokens")):
        value = (answer.get(at) or {}).get(name)
        if isinstance(value, dict):
            value = value.get("cached_tokens")
        if isinstance(value, int):
            return value
    return None


def _candidates(found: Iterable[tuple[int, float]]) -> Candidates:
    pairs = list(found)
    ids = np.array([one for one, _ in pairs], dtype=np.int64)
    values = np.array([value for _, value in pairs], dtype=np.float64)
    if ids.size == 0 or np.isnan(values).any() or ids.min() < 0 or len(set(ids)) != ids.size:
        raise ValueError("the tokens told are not distinct ids with numbers")
    return Candidates(ids, values)


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf
