"""Several tokens a request that a server of llama.cpp samples itself: with which options, and how they are read.

llama.cpp applies samplers in the order that a request names, so temperature, top-k, top-p and min-p mean what they mean
here. Two things it cannot do. To ban many ids costs it 3 µs for each in every request, which is too much for Gemma's
6,249. So a few are banned, and each position is checked for the others: where none of them is among the top k, banning
it would have changed nothing, and where one is, the response is cut there and that position is sampled here, from the
top tokens. Whether a position is cut depends on the text before it and not on what was sampled there, so the
distribution stays. And where a character is incomplete, llama.cpp returns no probabilities: that position is asked for
once more, for its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from mixlm.core.rng import Noise
from mixlm.core.sampling import Transform
from mixlm.engines.remote.protocols import cached_tokens, reading
from mixlm.engines.requests import GenerateRequest, GenerateResponse
from mixlm.errors import EngineError
from mixlm.types import Candidates, Ids, Sampling, TopKFilter

COMPLETION_PATH = "/completion"  # `/v1/completions` does not return the ids of the tokens
_MAX_BANNED = 32  # ids that a request bans
_MAX_TOP_K = 256  # top tokens returned for each token
_FIELDS = ["tokens", "completion_probabilities", "timings"]
_PROBE_LENGTH = 4

Complete = Callable[[dict[str, Any]], Awaitable[Any]]
TopTokens = Callable[[Ids, int], Awaitable[Candidates]]


@dataclass(frozen=True)
class LlamaCppCapabilities:
    """What a server of llama.cpp can do beside returning its most likely tokens.

    missing: what it lacks to sample itself, "" for nothing. tokens: the bytes of each of the model's ids. ends: ids
    that end a text. spare: how many more of the top tokens are asked for than may be sampled.
    """

    missing: str
    tokens: Sequence[bytes]
    ends: frozenset[int]
    spare: int = 16

    @property
    def summary(self) -> str:
        """Whether it samples itself, in words, and why not."""
        return f"no: {self.missing}" if self.missing else "yes"

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

    async def generate(self, request: GenerateRequest, complete: Complete, top_tokens: TopTokens) -> GenerateResponse:
        """Let the server sample.

        Args:
            complete: sends a body to `COMPLETION_PATH` and returns the response.
            top_tokens: returns at least so many of the most likely tokens after ids.

        Raises:
            EngineError: the server fails, or what `complete` and `top_tokens` raise.
        """
        banned_there, banned = _select_banned(request.banned.tobytes(), self.ends)
        all_banned = len(banned_there) == len(banned)
        response = await complete(_body(request, banned_there, 1 if all_banned else request.sampling.top_k))
        ids: list[int] = []
        logprobs: list[float] = []
        count = request.sampling.top_k + self.spare
        for token, reported in _parse(response, self.tokens):
            info = reported or _token_info(request, await top_tokens(_append(request.ids, ids), count), token)
            if not all_banned and not banned.isdisjoint(info.top_k):
                break
            ids.append(token)
            logprobs.append(info.logprob)
        if not ids:
            distribution = _distribution(request, await top_tokens(request.ids, count))
            index = Noise(request.seed).sample(distribution.ids, distribution.logprobs)
            ids, logprobs = [int(distribution.ids[index])], [float(distribution.logprobs[index])]
        return GenerateResponse(ids, logprobs, cached_tokens(response))


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


def _body(request: GenerateRequest, banned: Sequence[int], top_probs: int) -> dict[str, Any]:
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


def _parse(response: Any, tokens: Sequence[bytes]) -> list[tuple[int, _TokenInfo | None]]:
    """Return the tokens of a response, and what it reports of each. Raises EngineError for what is no response."""
    with reading("llama.cpp", response):
        ids, entries = [int(token) for token in response["tokens"]], list(response.get("completion_probabilities", ()))
        is_reported = _ends_of_characters([tokens[token] for token in ids])
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


def _ends_of_characters(parts: Sequence[bytes]) -> list[bool]:
    """Return for each part of a text whether a character ends with it."""
    return [not _is_cut_short(text) for text in accumulate(parts)]


def _is_cut_short(text: bytes) -> bool:
    """Whether a text ends within a character, as llama.cpp sees it: by the last first byte of one."""
    for back in range(1, min(len(text), 4) + 1):
        byte = text[-back]
        if byte & 0xC0 != 0x80:
            return back < (1 if byte >= 0xF8 or byte < 0xC0 else 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2)
    return False


def _append(ids: Ids, tokens: Sequence[int]) -> Ids:
    return np.concatenate([ids, np.array(tokens, dtype=np.int64)])


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


async def find_missing(complete: Complete, prompt: Ids) -> str:
    """Return what a server lacks to sample itself, "" for nothing: probed after a few ids.

    Args:
        complete: sends a body to `COMPLETION_PATH` and returns the response.
    """

    async def sample(seed: int, sampling: Sampling, banned: Sequence[int] = ()) -> list[dict[str, Any]]:
        request = GenerateRequest(0, prompt, _PROBE_LENGTH, sampling, np.zeros(0, dtype=np.int64), seed)
        response = await complete({**_body(request, banned, 2), "ignore_eos": True, "cache_prompt": False})
        entries: list[dict[str, Any]] = response["completion_probabilities"]
        if len(response["tokens"]) != _PROBE_LENGTH or not entries:
            raise LookupError
        return entries

    hot, top_two = Sampling(temperature=2.0, top_k=20), Sampling(temperature=0.5, top_k=2)
    try:
        texts = [[entry["id"] for entry in await sample(seed, hot)] for seed in range(1, 4)]
        if all(text == texts[0] for text in texts):
            return "seeds make no difference there"
        for entry in await sample(1, top_two):
            if abs(sum(top["prob"] for top in entry["top_probs"]) - 1) > 0.01:
                return "it returns other probabilities than it samples with"
        likely = [text[0] for text in texts]
        if any([(await sample(seed, hot, likely))[0]["id"] in likely for seed in range(1, 3)]):
            return "it cannot be kept from sampling some tokens"
    except EngineError as error:
        return f"it does not take what is needed ({error.message})"
    except (TypeError, LookupError, AttributeError):
        return f"{COMPLETION_PATH} returns no token ids, or no probabilities of what it samples"
    return ""
