"""Runs that a server of llama.cpp draws by itself: which transforms mean the same there, and what it tells of a run.

llama.cpp applies samplers in the order that a request names, so temperature, top-k, top-p and min-p mean what they mean
here. Two things it cannot do. To ban many ids costs it 3 µs for each in every request, which is too much for Gemma's
6,249. So a few are banned, and of the others it is looked at whether one was among the k likeliest: where none was,
banning it would have changed nothing, and where one was, the run is cut and the place is chosen from what is told.
Whether a place is cut so depends on the text before it and not on what was drawn there, so the law stays. And where a
character is not whole, llama.cpp tells nothing of the token: that place is asked about once more, for its numbers.
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
from mixlm.engines.base import GenerateRequest, GenerateResponse
from mixlm.engines.remote.protocols import cached_tokens
from mixlm.errors import EngineError
from mixlm.types import Candidates, Ids, Sampling, TopKFilter

COMPLETION_PATH = "/completion"  # `/v1/completions` does not tell the ids of what it wrote
_BANNED = 32  # ids that a request bans
_MOST = 256  # of the likeliest tokens, for each token of a run
_FIELDS = ["tokens", "completion_probabilities", "timings"]
_PROBED = 4

Ask = Callable[[dict[str, Any]], Awaitable[Any]]
Likeliest = Callable[[Ids, int], Awaitable[Candidates]]


@dataclass(frozen=True)
class LlamaCppRuns:
    """What a server of llama.cpp does beside telling its likeliest tokens. missing: what it lacks to draw by itself.

    tokens: the bytes of each of the model's ids. ends: ids that end a text. spare: how many more of the likeliest
    tokens are asked for than may be drawn.
    """

    missing: str
    tokens: Sequence[bytes]
    ends: frozenset[int]
    spare: int = 16

    @property
    def draws(self) -> str:
        """Whether it draws by itself, in words, and why not."""
        return f"no: {self.missing}" if self.missing else "yes"

    def writes(self, sampling: Sampling, banned: Ids) -> bool:
        """Whether it can draw with a transform.

        Top-p takes its mass from the k likeliest, which are others where one of them is banned afterwards.
        """
        return (
            not self.missing
            and not sampling.penalises
            and 1 <= sampling.top_k <= _MOST
            and (banned.size <= _BANNED or sampling.top_p == 1)
        )

    async def write(self, run: GenerateRequest, ask: Ask, likeliest: Likeliest) -> GenerateResponse:
        """Let the server draw a run. Raises EngineError, also what `ask` and `likeliest` raise.

        ask: sends a body to `PATH` and returns the answer. likeliest: returns at least so many of the likeliest tokens
        behind ids.
        """
        first, banned = _split(run.banned.tobytes(), self.ends)
        certain = len(banned) == len(first)
        answer = await ask(_body(run, first, 1 if certain else run.sampling.top_k))
        kept: list[int] = []
        logprobs: list[float] = []
        wanted = run.sampling.top_k + self.spare
        for token, said in _read(answer, self.tokens):
            told = said or _looked_up(run, await likeliest(_behind(run.ids, kept), wanted), token)
            if not certain and not banned.isdisjoint(told.among):
                break
            kept.append(token)
            logprobs.append(told.logprob)
        if not kept:
            law = _law(run, await likeliest(run.ids, wanted))
            at = Noise(run.seed).sample(law.ids, law.logprobs)
            kept, logprobs = [int(law.ids[at])], [float(law.logprobs[at])]
        return GenerateResponse(kept, logprobs, cached_tokens(answer))


@dataclass(frozen=True)
class _Told:
    """What is told of a token. among: the ids it was drawn from, the k likeliest."""

    logprob: float
    among: frozenset[int]


@lru_cache(maxsize=64)
def _split(banned: bytes, ends: frozenset[int]) -> tuple[list[int], frozenset[int]]:
    """Return the ids that a request bans, and all. Ends of text are likely, and control tokens are often the first."""
    ids = np.frombuffer(banned, dtype=np.int64).tolist()
    return sorted(ids, key=lambda one: (one not in ends, one))[:_BANNED], frozenset(ids)


def _body(run: GenerateRequest, banned: Sequence[int], told: int) -> dict[str, Any]:
    """Return the request for a run that tells so many of the tokens that each was drawn from."""
    options = run.sampling
    return {
        "prompt": run.ids.tolist(),
        "n_predict": run.length,
        "samplers": ["temperature", "top_k", "top_p", "min_p"],
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "seed": run.seed & 0x7FFFFFFF,  # it takes 32 bits, and the largest of those means any
        "logit_bias": [[one, False] for one in banned],
        "n_probs": told,
        "post_sampling_probs": True,
        "return_tokens": True,
        "response_fields": _FIELDS,
    }


def _read(answer: Any, tokens: Sequence[bytes]) -> list[tuple[int, _Told | None]]:
    """Return the tokens of an answer, and what it tells of each. Raises EngineError for what is no answer."""
    try:
        ids, entries = [int(one) for one in answer["tokens"]], list(answer.get("completion_probabilities", ()))
        whole = _ends_of_characters([tokens[one] for one in ids])
        if [one["id"] for one in entries] != [one for one, here in zip(ids, whole, strict=True) if here]:
            whole = [False] * len(ids)  # whatever it tells, of which tokens is not certain
        rest = iter(entries)
        found = [(one, _told(next(rest)) if here else None) for one, here in zip(ids, whole, strict=True)]
    except (TypeError, LookupError, ValueError, AttributeError):
        found = []
    if not found:
        raise EngineError(f"llama.cpp gives no answer: {str(answer)[:200]}")
    return found


def _told(entry: Any) -> _Told:
    return _Told(math.log(entry["prob"]), frozenset(one["id"] for one in entry["top_probs"]))


def _ends_of_characters(parts: Sequence[bytes]) -> list[bool]:
    """Tell of each part of a text whether a character ends with it."""
    return [not _cut_short(text) for text in accumulate(parts)]


def _cut_short(text: bytes) -> bool:
    """Whether a text ends within a character, as llama.cpp sees it: by the last first byte of one."""
    for back in range(1, min(len(text), 4) + 1):
        byte = text[-back]
        if byte & 0xC0 != 0x80:
            return back < (1 if byte >= 0xF8 or byte < 0xC0 else 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2)
    return False


def _behind(ids: Ids, more: Sequence[int]) -> Ids:
    return np.concatenate([ids, np.array(more, dtype=np.int64)])


def _looked_up(run: GenerateRequest, found: Candidates, token: int) -> _Told:
    """Return what would have been told of a token, by the likeliest ones at its place."""
    law = _law(run, found)
    at = np.flatnonzero(law.ids == token)
    # Rounding may have it out of the law that it was drawn from.
    logprob = float(law.logprobs[at[0]] if at.size else law.logprobs.min())
    return _Told(logprob, frozenset(found.ids[np.argsort(-found.logprobs)[: run.sampling.top_k]].tolist()))


def _law(run: GenerateRequest, found: Candidates) -> Candidates:
    """Return what a run draws from, by what was told of the likeliest tokens."""
    return Transform(run.sampling, run.banned)(TopKFilter(run.sampling.top_k, run.banned).apply(found))


async def find_missing(ask: Ask, prompt: Ids) -> str:
    """Return what a server lacks to draw by itself, "" for nothing: tried behind a few ids."""

    async def draw(seed: int, sampling: Sampling, banned: Sequence[int] = ()) -> list[dict[str, Any]]:
        run = GenerateRequest(0, prompt, _PROBED, sampling, np.zeros(0, dtype=np.int64), seed)
        answer = await ask({**_body(run, banned, 2), "ignore_eos": True, "cache_prompt": False})
        entries: list[dict[str, Any]] = answer["completion_probabilities"]
        if len(answer["tokens"]) != _PROBED or not entries:
            raise LookupError
        return entries

    hot, two = Sampling(temperature=2.0, top_k=20), Sampling(temperature=0.5, top_k=2)
    try:
        texts = [[one["id"] for one in await draw(seed, hot)] for seed in range(1, 4)]
        if all(one == texts[0] for one in texts):
            return "seeds make no difference there"
        for one in await draw(1, two):
            if abs(sum(other["prob"] for other in one["top_probs"]) - 1) > 0.01:
                return "it tells other probabilities than it draws with"
        likely = [text[0] for text in texts]
        if any([(await draw(seed, hot, likely))[0]["id"] in likely for seed in range(1, 3)]):
            return "it cannot be kept from drawing some tokens"
    except EngineError as error:
        return f"it does not take what is needed ({error.message})"
    except (TypeError, LookupError, AttributeError):
        return f"{COMPLETION_PATH} gives no token ids, or no probabilities of what it draws"
    return ""
