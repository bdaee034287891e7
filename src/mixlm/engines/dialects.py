"""Asking servers for "the N likeliest tokens after these ids", and reading what they say.

llama.cpp (in this process or behind HTTP) and the servers that speak as vLLM does put the same question in two ways.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from mixlm.engines.runs import told_parameters
from mixlm.sampling import Candidates

_ID = "token_id:"


class Dialect(Protocol):
    """How one kind of server is asked."""

    name: str

    def bodies(self, ids: list[int], count: int) -> Sequence[dict[str, Any]]:
        """Return requests to make in turn until one is answered with numbers."""
        ...

    def read(self, answer: Any) -> Candidates | None:
        """Return the likeliest tokens that an answer tells, None where it tells none.

        Raises TypeError, LookupError or ValueError for what is no answer.
        """
        ...


class LlamaCpp:
    """llama.cpp's server. whole_character: the id of a token that is one."""

    name = "llama.cpp"

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


class OpenAI:
    """`/v1/completions` as vLLM answers it: ids in, ids out."""

    name = "OpenAI completions"

    def bodies(self, ids: list[int], count: int) -> Sequence[dict[str, Any]]:
        """Ask for one token with its `logprobs`, spelled as ids."""
        # A model's defaults would otherwise cut and bend what a server tells of the laws that it draws from.
        body = {"prompt": ids, **told_parameters(count)}
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


def cached_tokens(answer: Any) -> int | None:
    """Return how many tokens of the prompt a server had read before, by what it reports; None where it does not."""
    for at, name in (("timings", "cache_n"), ("usage", "prompt_tokens_details")):
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
