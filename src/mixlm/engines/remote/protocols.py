"""How servers are asked for the N most likely next tokens, and how their responses are read.

llama.cpp (in this process or over HTTP), servers with vLLM's API, and SGLang each have a protocol of their own:

    path            where requests are sent
    may_be_limited  whether such a server may be set to return fewer of the most likely tokens than there are
    request_bodies  for the `count` most likely tokens after `ids` (of `among`, where those ids alone count), to be sent
                    in turn until a response has probabilities; those for the last are in the whole vocabulary
    parse           the most likely tokens in a response, None where it has no probabilities; TypeError, LookupError or
                    ValueError for what is no response of such a server
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from mixlm.engines.requests import GenerateResponse
from mixlm.engines.vllm.sampling_params import logprobs_parameters
from mixlm.errors import EngineError
from mixlm.types import Candidates, Ids

_ID_PREFIX = "token_id:"
# Added to the logits of ids that count, in float32: so much moves none of them by more than 4e-6, and logits are hardly
# ever so far apart. Where they are, the ids are not among the top ones, and more are requested.
_BIAS = 100.0


class LlamaCppProtocol:
    """llama.cpp's server.

    Args:
        letter_token: the id of a token that consists of whole characters.
    """

    name = "llama.cpp"
    path = "/v1/completions"
    may_be_limited = False

    def __init__(self, letter_token: int) -> None:
        self._forced = [[letter_token, 1000.0]]

    def request_bodies(self, ids: list[int], count: int, among: Ids | None = None) -> Sequence[dict[str, Any]]:
        """Ask for the probabilities among the top N; then for those before llama.cpp's own sampling.

        Where the token that it sampled is part of a character, it withholds the probabilities until the rest comes. The
        second request makes it sample a whole one. Always asking that way would sort the whole vocabulary every time.
        The ids that count become the top ones by an equal bias; that is part of the sampling, so the second request is
        for the top tokens of all.
        """
        common = {"prompt": ids, "n_predict": 1, "temperature": 1.0, "seed": 0, "n_probs": count}
        biases = {} if among is None else {"logit_bias": [[token, _BIAS] for token in among.tolist()]}
        return (
            {**common, "samplers": ["top_k"], "top_k": count, "post_sampling_probs": True, **biases},
            {**common, "logit_bias": self._forced},
        )

    def parse(self, response: Any) -> Candidates | None:
        """Read `top_probs` or `top_logprobs` of the one token."""
        logprobs = response["choices"][0]["logprobs"]
        if logprobs is None:
            return None
        [token] = logprobs["content"]
        if "top_probs" in token:
            return listed_candidates((entry["id"], _log(entry["prob"])) for entry in token["top_probs"])
        return listed_candidates((entry["id"], entry["logprob"]) for entry in token["top_logprobs"])


class OpenAIProtocol:
    """`/v1/completions` as vLLM serves it: ids in, ids out."""

    name = "OpenAI completions"
    path = "/v1/completions"
    may_be_limited = True

    def request_bodies(self, ids: list[int], count: int, among: Ids | None = None) -> Sequence[dict[str, Any]]:
        """Ask for one token with its `logprobs`, spelled as ids."""
        return ({"prompt": ids, **logprobs_parameters(count, among), "return_tokens_as_token_ids": True},)

    def parse(self, response: Any) -> Candidates | None:
        """Read `top_logprobs` of the one token; None where tokens are spelled as text."""
        logprobs = response["choices"][0]["logprobs"]
        if logprobs is None:
            return None
        top = logprobs["top_logprobs"][0]
        if not all(token.startswith(_ID_PREFIX) for token in top):
            return None
        return listed_candidates((int(token.removeprefix(_ID_PREFIX)), logprob) for token, logprob in top.items())


class SGLangProtocol:
    """SGLang's own `/generate`: its `/v1/completions` spells the most likely tokens as text.

    Fields are those of version 0.5.23 of October 2026; 0.4.6, 0.5.3 and 0.5.6 have the same.

    Args:
        adapter: name of the LoRA adapter to use, "" for the model itself.
    """

    name = "SGLang"
    path = "/generate"
    may_be_limited = False
    missing = (
        "it takes seeds with --enable-deterministic-inference only, and returns log-probabilities from before top-k, "
        "top-p and min-p"
    )

    def __init__(self, adapter: str = "") -> None:
        self._adapter = {"lora_path": adapter} if adapter else {}

    def request_bodies(self, ids: list[int], count: int, among: Ids | None = None) -> Sequence[dict[str, Any]]:
        """Ask for one token with the top N, or with given ids.

        It returns the log-probabilities of the logits divided by the temperature, before any truncation, so at
        temperature 1 they are the model's own. All that could change them is set: a server may have other defaults.
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
        logprobs: dict[str, Any] = {"return_logprob": True, "logprob_start_len": -1}
        logprobs |= {"top_logprobs_num": count} if among is None else {"token_ids_logprob": among.tolist()}
        return ({"input_ids": ids, "sampling_params": sampling, **logprobs, **self._adapter},)

    def parse(self, response: Any) -> Candidates | None:
        """Read the log-probability, id and text of each of the top tokens, or of the given ids."""
        reported = response["meta_info"]
        positions = reported.get("output_token_ids_logprobs") or reported.get("output_top_logprobs")
        if positions is None:
            return None
        [top] = positions
        return listed_candidates((token, log_probability(logprob)) for logprob, token, _ in top)


ServerProtocol = LlamaCppProtocol | OpenAIProtocol | SGLangProtocol


def cached_tokens(response: Any) -> int | None:
    """Return how many tokens of the prompt were in the server's prefix cache; None where it does not report it."""
    for section, name in (("timings", "cache_n"), ("usage", "prompt_tokens_details"), ("meta_info", "cached_tokens")):
        value = (response.get(section) or {}).get(name)
        if isinstance(value, dict):
            value = value.get("cached_tokens")
        if isinstance(value, int):
            return value
    return None


@contextmanager
def reading(server: str, response: Any) -> Iterator[None]:
    """Raise EngineError for a response that is of another form than it is read in."""
    try:
        yield
    except (TypeError, LookupError, ValueError, AttributeError) as error:
        raise EngineError(f"{server} sends a malformed response: {str(response)[:200]}") from error


def generated_tokens(ids: Sequence[int], logprobs: Iterable[float], cached: int | None) -> GenerateResponse:
    """Return the tokens that a server generated. Raises ValueError where they are none, or not all have a number."""
    generated = GenerateResponse(list(ids), [float(logprob) for logprob in logprobs], cached)
    if not generated.ids or not all(map(math.isfinite, generated.logprobs)):
        raise ValueError("there is a token without a number, or there is none")
    return generated


def listed_candidates(entries: Iterable[tuple[int, float]]) -> Candidates:
    """Return candidates of ids and log-probabilities. Raises ValueError where they are none, or not distinct."""
    pairs = list(entries)
    ids = np.array([token for token, _ in pairs], dtype=np.int64)
    logprobs = np.array([logprob for _, logprob in pairs], dtype=np.float64)
    if ids.size == 0 or np.isnan(logprobs).any() or ids.min() < 0 or len(set(ids)) != ids.size:
        raise ValueError("the tokens returned are not distinct ids with numbers")
    return Candidates(ids, logprobs)


def log_probability(reported: float) -> float:
    """Return a log-probability. That of a probability that is 0 in float32 comes as the lowest number that there is."""
    return reported if reported > -1e38 else -math.inf


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf
