"""A model on a server of llama.cpp, vLLM or SGLang: requests to it, and the check that it is still the same model.

A module for each kind of server says how it is asked, how its responses are read, and what it samples itself.
"""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mixlm.core.sampling import softmax
from mixlm.engines.base import Session
from mixlm.engines.llamacpp.slots import Slots
from mixlm.engines.remote.http_client import HttpClient
from mixlm.engines.remote.model_info import ModelInfo, read_model_card
from mixlm.engines.remote.session_client import SessionPool
from mixlm.engines.requests import GenerateRequest, GenerateResponse
from mixlm.engines.topk_only import TokenScores, TopKOnlySession
from mixlm.errors import ConfigError, EngineError, RequestRefusedError, UnsupportedError
from mixlm.types import Candidates, Ids, Sampling

# The same model in another batch returns slightly other probabilities: they differ by this total variation at most.
_SAME_MODEL = 0.2
_FINGERPRINT_TOKENS = 5
# Of 4xx, those that are about the server: it wants another key, has no such model, or was too slow.
_NOT_OF_THE_REQUEST = (401, 403, 404, 408)


@dataclass(frozen=True)
class TokenizerProbe:
    """What has to be known of a model's tokenizer to probe a server.

    ids: of `probing.PROBE_TEXT`. first_ids: of a letter. tokens: the bytes of each id. folder: where the tokenizer is
    from, for errors.
    """

    ids: list[int]
    first_ids: list[int]
    tokens: Sequence[bytes]
    folder: str


class TopTokens(NamedTuple):
    """The most likely tokens, as a server returns them.

    cached: tokens of the prompt that were in the server's prefix cache, None where it does not report it. returned: how
    many tokens there are with padding.
    """

    candidates: Candidates
    cached: int | None
    returned: int = 0


class ModelServer(ABC):
    """A model on a server. `probing.probe` makes one, and finds out what it can do.

    name: of the server's kind, for display. path: where requests are sent. may_be_limited: whether such a server may be
    set to return fewer of the most likely tokens than there are. missing: what `find_missing` found. sessions:
    connections to mixlm's session route, None where the server has none. max_logprobs: how many of the most likely
    tokens it returned when asked for as many as are wanted, or for the most that it returns. limit: the most that it
    returns, None for all. reports_cached: whether it reports what its prefix cache held. takes_ids: whether it returns
    the most likely of given ids.
    """

    name: str
    path = "/v1/completions"
    may_be_limited = False
    missing = ""
    sessions: SessionPool | None = None
    max_logprobs = 0
    limit: int | None = None
    reports_cached = False
    takes_ids = False

    def __init__(self, client: HttpClient, info: ModelInfo, tokenizer: TokenizerProbe) -> None:
        self.client = client
        self.info = info
        self.tokenizer = tokenizer
        # The last of several slots of llama.cpp is for checks of the model.
        self._slots = Slots(max(info.total_slots - 1, 1)) if info.total_slots else None
        self._idle_slots = asyncio.Semaphore(self._slots.count if self._slots else 0)
        self._fingerprint: dict[int, float] = {}
        self._check = asyncio.Lock()

    @abstractmethod
    def request_bodies(self, ids: list[int], count: int, among: Ids | None = None) -> Sequence[dict[str, Any]]:
        """Return requests for the `count` most likely tokens after `ids`, or of `among`, where those ids alone count.

        They are sent in turn until a response has probabilities; those for the last are in the whole vocabulary.
        """

    @abstractmethod
    def parse(self, response: Any) -> Candidates | None:
        """Return the most likely tokens in a response, None where it has no probabilities.

        Raises TypeError, LookupError or ValueError for what is no response of such a server.
        """

    @abstractmethod
    async def find_missing(self) -> str:
        """Find out what it lacks to sample itself, "" for nothing."""

    @property
    def samples(self) -> str:
        """Whether it samples itself, in words, and why not."""
        return f"no: {self.missing}" if self.missing else "yes"

    def samples_itself(self, sampling: Sampling, banned: Ids) -> bool:
        """Whether it can sample with these options and banned ids."""
        return False

    async def generate(self, session: Session, request: GenerateRequest, ends: Sequence[int]) -> GenerateResponse:
        """Let it sample tokens itself. ends: ids that end a text. Raises EngineError."""
        raise UnsupportedError(f"{self.client.base_url} does not sample: {self.missing}")

    def score_requests(self, ids: list[int]) -> Sequence[tuple[dict[str, Any], Callable[[Any], TokenScores]]]:
        """Return requests for the scores of a prompt, the first choice first, and what reads their responses.

        What reads them raises TypeError, LookupError, ValueError or AttributeError where there are none.
        """
        return ()

    async def prompt_scores(self, session: Session, ids: Ids) -> TokenScores:
        """Return the log-probabilities of a prompt's tokens but the first.

        Raises:
            EngineError: it fails.
            UnsupportedError: it returns none.
        """
        reason = ""
        for body, parse in self.score_requests(ids.tolist()):
            try:
                return parse(await self.complete(body))
            except RequestRefusedError as error:
                reason = error.message
            except (TypeError, LookupError, ValueError, AttributeError) as error:
                reason = f"its response has none ({error})"
        raise UnsupportedError(
            f"{self.client.base_url}: the server returns no log-probabilities of a prompt's tokens: {reason}",
            "servers that do: vLLM's, SGLang's and llama.cpp's; or use --engine hf (engine='hf')",
        )

    async def complete(self, body: dict[str, Any], path: str | None = None, slot: int | None = None) -> Any:
        """Send a request, and return the JSON of the response.

        slot: of a llama.cpp server, None to leave it to the server.

        Raises:
            EngineError: there is no response, or the server fails.
            RequestRefusedError: the server refuses the request.
        """
        slot_option = {} if slot is None else {"id_slot": slot}
        body = {**body, "model": self.info.name, **slot_option}
        status, value = await self.client.request("POST", path or self.path, body)
        if status == 200:
            return value
        of_request = 400 <= status < 500 and status not in _NOT_OF_THE_REQUEST
        refusal = f"{self.client.base_url} refuses ({status}): {_error_message(value)}"
        raise RequestRefusedError(refusal) if of_request else EngineError(refusal)

    async def top_tokens(
        self, ids: list[int], count: int, slot: int | None = None, among: Ids | None = None, *, normalized: bool = False
    ) -> TopTokens:
        """Ask for at least the `count` most likely tokens after `ids`.

        Args:
            slot: as for `complete`.
            among: the ids that count, None for all; where it `takes_ids`.
            normalized: whether probabilities in the whole vocabulary are needed.

        Raises:
            EngineError: there is no response, or it has no probabilities.
        """
        bodies = self.request_bodies(ids, count, among)
        for body in bodies[-1:] if normalized else bodies:
            value = await self.complete(body, slot=slot)
            with reading(self.client.base_url, value):
                candidates = self.parse(value)
            if candidates is not None:
                return TopTokens(self.without_padding(candidates), cached_tokens(value), len(candidates.ids))
        raise EngineError(f"{self.client.base_url} returns no probabilities of {self.info.name}")

    async def candidates(self, session: Session, ids: Ids, count: int, among: Ids | None = None) -> TopTokens:
        """Ask for at least the `count` most likely tokens after a sequence's `ids`; see `top_tokens`."""
        normalized = isinstance(session, TopKOnlySession) and session.normalized
        async with self.slot(session, ids) as slot:
            return await self.top_tokens(ids.tolist(), count, slot, among, normalized=normalized)

    def without_padding(self, candidates: Candidates) -> Candidates:
        """Return candidates without the padding rows after the last token."""
        is_token = candidates.ids < len(self.tokenizer.tokens)
        return Candidates(candidates.ids[is_token], candidates.logprobs[is_token])

    @asynccontextmanager
    async def slot(self, session: Session, ids: Ids) -> AsyncIterator[int | None]:
        """Hold a slot of a llama.cpp server for a sequence while it runs `ids`; None where the server has none.

        So the sequence finds its KV cache again. Left to itself, the server would put sequences with a common beginning
        into one slot, in turn.
        """
        if self._slots is None:
            yield None
            return
        async with self._idle_slots:
            slot = self._slots.acquire(session, ids)
            assert slot is not None  # no more are in use than there are
            try:
                yield slot[0]
            finally:
                self._slots.release(slot[0])

    def release(self, session: Session) -> None:
        """Note that a sequence goes on elsewhere, or begins anew."""
        if self.sessions is not None:
            self.sessions.release(session)

    def close(self) -> None:
        """Close the connections of sequences."""
        if self.sessions is not None:
            self.sessions.close()

    async def take_fingerprint(self) -> None:
        """Note which model the server has now, for `check`. Raises EngineError."""
        self.client.unchecked.clear()
        self._fingerprint = await self._read_fingerprint()

    async def check(self) -> None:
        """Check the model if this task made a connection since the last check: another server may have accepted it.

        A text is never continued by another model under the same name: where a task ended without a check of its
        connections, the next one checks. Many connections are made at once when sequences start together: one check
        counts for all that were made before it starts.

        Raises:
            EngineError: the server has another model, or does not answer.
        """
        if not self._needs_check():
            return
        async with self._check:
            if not self._needs_check():
                return
            made_before = [*self.client.unchecked]
            if not await self.is_unchanged():
                base_url = self.client.base_url
                raise EngineError(f"the server {base_url} has another model now, under the name {self.info.name}")
            for number in made_before:
                self.client.unchecked.pop(number, None)

    def _needs_check(self) -> bool:
        own = asyncio.current_task()
        return any(task is own or task.done() for task in self.client.unchecked.values())

    async def is_unchanged(self) -> bool:
        """Whether the server has the model that it had. Raises EngineError where it does not answer."""
        try:
            if not self.info.has_card(await read_model_card(self.client, self.info.name)):
                return False
            return self._matches(await self._read_fingerprint())
        except (ConfigError, UnsupportedError, RequestRefusedError):  # it once answered the same request
            return False

    def has_model_of(self, other: ModelServer) -> bool:
        """Whether another server had the same model when both were probed."""
        return self._matches(other._fingerprint)

    def _matches(self, fingerprint: dict[int, float]) -> bool:
        ids = {*fingerprint, *self._fingerprint}
        return 0.5 * sum(abs(fingerprint.get(i, 0) - self._fingerprint.get(i, 0)) for i in ids) < _SAME_MODEL

    async def _read_fingerprint(self) -> dict[int, float]:
        """Return the probabilities of the most likely tokens after a fixed prompt, by id."""
        slot = self.info.total_slots - 1 if self.info.total_slots else None
        candidates = (await self.top_tokens(self.tokenizer.ids, _FINGERPRINT_TOKENS, slot)).candidates
        order = np.argsort(-candidates.logprobs)[:_FINGERPRINT_TOKENS]
        probabilities = softmax(candidates.logprobs[order]).tolist()
        return dict(zip(candidates.ids[order].tolist(), probabilities, strict=True))


def _error_message(value: Any) -> str:
    error = value.get("error", value) if isinstance(value, dict) else value
    return str(error.get("message", error) if isinstance(error, dict) else error)[:200]


async def probe_sampling(
    sample: Callable[[int, Ids], Awaitable[list[int]]],
    top_two: Callable[[], Awaitable[list[float]]],
    hint: str = "",
    *,
    repeats: bool = False,
) -> str:
    """Return what a server lacks to sample itself, "" for nothing.

    It has to sample other tokens with other seeds, to report the probabilities that it samples with, and not to sample
    ids that are banned.

    Args:
        sample: returns a few tokens sampled with a seed, without the banned ids, int64.
        top_two: returns the sum of the probabilities of the two tokens that top-k leaves, at each position.
        hint: how it is made to report the probabilities that it samples with.
        repeats: whether it also has to sample equal tokens with equal seeds.
    """
    none = np.zeros(0, dtype=np.int64)
    try:
        texts = [await sample(seed, none) for seed in (1, 1, 2, 3)]
        if (repeats and texts[0] != texts[1]) or all(text == texts[0] for text in texts):
            also = "equal seeds must sample equal tokens there, and " if repeats else ""
            return f"{also}other seeds must sample other tokens"
        if not all(abs(total - 1) <= 0.01 for total in await top_two()):
            return f"it returns other log-probabilities than it samples with{hint}"
        likely = np.unique([text[0] for text in texts])
        if any([(await sample(seed, likely))[0] in likely for seed in (1, 2, 3)]):
            return "it cannot be kept from sampling some tokens"
    except EngineError as error:
        return f"it does not take what is needed, or returns no token ids ({error.message})"
    return ""


@contextmanager
def reading(server: str, response: Any) -> Iterator[None]:
    """Raise EngineError for a response that is of another form than it is read in."""
    try:
        yield
    except (TypeError, LookupError, ValueError, AttributeError) as error:
        raise EngineError(f"{server} sends a malformed response: {str(response)[:200]}") from error


def cached_tokens(response: Any) -> int | None:
    """Return how many tokens of the prompt were in the server's prefix cache; None where it does not report it."""
    for section, name in (("timings", "cache_n"), ("usage", "prompt_tokens_details"), ("meta_info", "cached_tokens")):
        value = (response.get(section) or {}).get(name)
        if isinstance(value, dict):
            value = value.get("cached_tokens")
        if isinstance(value, int):
            return value
    return None


def generated_tokens(ids: Sequence[int], logprobs: Iterable[float], cached: int | None) -> GenerateResponse:
    """Return the tokens that a server generated. Raises ValueError where they are none, or not all have a number."""
    generated = GenerateResponse(list(ids), [float(logprob) for logprob in logprobs], cached)
    if not generated.ids or not all(map(math.isfinite, generated.logprobs)):
        raise ValueError("there is a token without a number, or there is none")
    return generated


def token_scores(logprobs: list[float], is_top: list[bool]) -> TokenScores:
    """Return the scores of a prompt's tokens. Raises ValueError for what are no log-probabilities."""
    values = np.array(logprobs, dtype=np.float64)
    if np.isnan(values).any() or (values > 1e-3).any():
        raise ValueError("they are no log-probabilities")
    return TokenScores(np.minimum(values, 0.0), np.array(is_top, dtype=np.bool_))


def log_probability(reported: float) -> float:
    """Return a log-probability. That of a probability that is 0 in float32 comes as the lowest number that there is."""
    return reported if reported > -1e38 else -math.inf
