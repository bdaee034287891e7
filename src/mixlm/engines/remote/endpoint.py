"""Requests for one model of one server, and the check that the server still has that model."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mixlm.core.sampling import softmax
from mixlm.engines.remote.http_client import HttpClient
from mixlm.engines.remote.model_info import ModelInfo, read_model_card
from mixlm.engines.remote.protocols import ServerProtocol, cached_tokens, reading
from mixlm.errors import ConfigError, EngineError, RequestRefusedError, UnsupportedError
from mixlm.types import Candidates, Ids

# The same model in another batch returns slightly other probabilities: they differ by this total variation at most.
_SAME_MODEL = 0.2
_FINGERPRINT_TOKENS = 5
# Of 4xx, those that are about the server: it wants another key, has no such model, or was too slow.
_NOT_OF_THE_REQUEST = (401, 403, 404, 408)


@dataclass(frozen=True)
class CandidatesResponse:
    """The most likely tokens.

    cached: tokens of the prompt that were in the server's prefix cache, None where it does not report it.
    new_connection: whether a connection was made for it.
    """

    candidates: Candidates
    cached: int | None
    new_connection: bool = False


@dataclass(frozen=True)
class Endpoint:
    """One model at one server. vocabulary_size: ids from here on are padding, and dropped from responses."""

    client: HttpClient
    model: str
    vocabulary_size: int

    async def complete(
        self, body: dict[str, Any], path: str = "/v1/completions", slot: int | None = None
    ) -> tuple[Any, bool]:
        """Send a request; return the JSON of the response, and whether a connection was made for it.

        slot: of a llama.cpp server, None to leave it to the server.

        Raises:
            EngineError: there is no response, or the server fails.
            RequestRefusedError: the server refuses the request.
        """
        slot_option = {} if slot is None else {"id_slot": slot}
        response = await self.client.request("POST", path, {**body, "model": self.model, **slot_option})
        if response.status != 200:
            of_request = 400 <= response.status < 500 and response.status not in _NOT_OF_THE_REQUEST
            refusal = f"{self.client.base_url} refuses ({response.status}): {_error_message(response.value)}"
            raise RequestRefusedError(refusal) if of_request else EngineError(refusal)
        return response.value, response.new_connection

    async def candidates(
        self,
        protocol: ServerProtocol,
        ids: list[int],
        count: int,
        slot: int | None = None,
        among: Ids | None = None,
        *,
        normalized: bool = False,
    ) -> CandidatesResponse:
        """Ask for at least the `count` most likely tokens after `ids`.

        Args:
            slot: as for `complete`.
            among: the ids that count, None for all; for a server that takes them.
            normalized: whether probabilities in the whole vocabulary are needed.

        Raises:
            EngineError: there is no response, or it has no probabilities.
        """
        new_connection = False
        bodies = protocol.request_bodies(ids, count, among)
        for body in bodies[-1:] if normalized else bodies:
            value, is_new = await self.complete(body, protocol.path, slot)
            new_connection |= is_new
            with reading(self.client.base_url, value):
                candidates = protocol.parse(value)
            if candidates is not None:
                return CandidatesResponse(self.without_padding(candidates), cached_tokens(value), new_connection)
        raise EngineError(f"{self.client.base_url} returns no probabilities of {self.model}")

    def without_padding(self, candidates: Candidates) -> Candidates:
        """Return candidates without the padding rows behind the last token."""
        is_token = candidates.ids < self.vocabulary_size
        return Candidates(candidates.ids[is_token], candidates.logprobs[is_token])


@dataclass(eq=False)
class ModelIdentity:
    """Whether a server still has the model that it had: the same card, and the same response to a fixed prompt.

    probe_ids: the fixed prompt. slot: of a llama.cpp server, for these requests. fingerprint: probabilities of the most
    likely tokens after the fixed prompt, by id.
    """

    endpoint: Endpoint
    info: ModelInfo
    protocol: ServerProtocol
    probe_ids: list[int]
    slot: int | None
    fingerprint: dict[int, float]
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _checks_started: int = 0
    _last_check: tuple[int, bool] = (0, True)  # the last that was completed: its number and its result

    @classmethod
    async def read(
        cls, endpoint: Endpoint, info: ModelInfo, protocol: ServerProtocol, probe_ids: list[int], slot: int | None
    ) -> ModelIdentity:
        """Take the fingerprint of the model that a server has now. Raises EngineError."""
        fingerprint = await _fingerprint(endpoint, protocol, probe_ids, slot)
        return cls(endpoint, info, protocol, probe_ids, slot, fingerprint)

    def matches(self, fingerprint: dict[int, float]) -> bool:
        """Whether a fingerprint is of the same model."""
        ids = {*fingerprint, *self.fingerprint}
        return 0.5 * sum(abs(fingerprint.get(i, 0) - self.fingerprint.get(i, 0)) for i in ids) < _SAME_MODEL

    async def is_unchanged(self) -> bool:
        """Whether the server has the model that it had. Raises EngineError where it does not answer."""
        try:
            card = await read_model_card(self.endpoint.client, self.endpoint.model)
            if not self.info.has_card(card):
                return False
            return self.matches(await _fingerprint(self.endpoint, self.protocol, self.probe_ids, self.slot))
        except (ConfigError, UnsupportedError, RequestRefusedError):  # it once answered the same request
            return False

    async def complete(self, body: dict[str, Any], path: str = "/v1/completions", slot: int | None = None) -> Any:
        """Send a request as `Endpoint.complete` does, and `check` the model. Returns the JSON of the response."""
        value, new_connection = await self.endpoint.complete(body, path, slot)
        await self.check(new_connection)
        return value

    async def check(self, new_connection: bool = True) -> None:
        """Check the model if a connection was made anew: another server may have accepted it.

        Many connections are made at once when sequences start together: a check that starts from now on counts for all
        that wait for one by then.

        Raises:
            EngineError: the server has another model, or does not answer.
        """
        if not new_connection:
            return
        number_needed = self._checks_started + 1
        async with self._lock:
            if self._last_check[0] < number_needed:
                self._checks_started += 1
                number = self._checks_started
                self._last_check = (number, await self.is_unchanged())
            is_unchanged = self._last_check[1]
        if not is_unchanged:
            base_url, model = self.endpoint.client.base_url, self.endpoint.model
            raise EngineError(f"the server {base_url} has another model now, under the name {model}")


async def _fingerprint(
    endpoint: Endpoint, protocol: ServerProtocol, probe_ids: list[int], slot: int | None
) -> dict[int, float]:
    candidates = (await endpoint.candidates(protocol, probe_ids, _FINGERPRINT_TOKENS, slot)).candidates
    order = np.argsort(-candidates.logprobs)[:_FINGERPRINT_TOKENS]
    probabilities = softmax(candidates.logprobs[order]).tolist()
    return dict(zip(candidates.ids[order].tolist(), probabilities, strict=True))


def _error_message(value: Any) -> str:
    error = value.get("error", value) if isinstance(value, dict) else value
    return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
