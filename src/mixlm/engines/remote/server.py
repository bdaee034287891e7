"""One server of llama.cpp, vLLM or SGLang, probed: how it is asked, what it can do, whether it still has its model.

The model is checked again whenever a connection had to be made anew: a text is never continued by another model under
the same name.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mixlm.engines.base import Session
from mixlm.engines.llamacpp.slots import Slots
from mixlm.engines.remote.capabilities import ServerCapabilities, parse_generation, probe_capabilities
from mixlm.engines.remote.endpoint import CandidatesResponse, Endpoint, ModelIdentity
from mixlm.engines.remote.http_client import HttpClient
from mixlm.engines.remote.llamacpp_capabilities import COMPLETION_PATH, LlamaCppCapabilities, find_missing
from mixlm.engines.remote.model_info import ModelInfo
from mixlm.engines.remote.prompt_scores import score_prompt
from mixlm.engines.remote.protocols import LlamaCppProtocol, OpenAIProtocol, ServerProtocol, SGLangProtocol
from mixlm.engines.remote.session_client import SessionPool, parse_generated, parse_top_tokens
from mixlm.engines.requests import GenerateRequest, GenerateResponse
from mixlm.engines.topk_only import TokenScores, TopKOnlySession
from mixlm.engines.vllm.sampling_params import logprobs_parameters
from mixlm.errors import EngineError, RequestRefusedError, TokenizerError, UnsupportedError
from mixlm.types import Candidates, Ids

# Differences of the same log-probabilities in another batch: logits below 32 in bfloat16 are an eighth apart, and each
# may be the next one.
_SAME = 0.5
PROBE_TEXT = "The sky is blue, and 12 + 30 = 42."


@dataclass(frozen=True)
class TokenizerProbe:
    """What has to be known of a model's tokenizer to probe a server.

    ids: of `PROBE_TEXT`. first_ids: a shorter prompt. letter_token: a token that is a letter. tokens: the
    bytes of each id. ends: ids that end a text. folder: where the tokenizer is from, for errors.
    """

    ids: list[int]
    first_ids: list[int]
    letter_token: int
    tokens: Sequence[bytes]
    ends: frozenset[int]
    folder: str


@dataclass(eq=False)
class ModelServer:
    """A model on a server. `ModelServer.probe` makes one.

    max_logprobs: how many of the most likely tokens it returned when asked for as many as are wanted, or for the most
    that it returns. limit: the most that it returns, None for all. capabilities: whether it samples itself, and with
    which options. sessions: connections to mixlm's session route, None where the server has none. reports_cached:
    whether it reports what its prefix cache held. takes_ids: whether it returns the most likely of given ids.
    """

    identity: ModelIdentity
    max_logprobs: int
    limit: int | None
    capabilities: ServerCapabilities | LlamaCppCapabilities
    sessions: SessionPool | None
    reports_cached: bool
    takes_ids: bool

    def __post_init__(self) -> None:
        self.protocol = self.identity.protocol
        self._endpoint = self.identity.endpoint
        slot_count = _slots_of(self.identity.info, self.protocol)
        self._slots = None if slot_count is None else Slots(slot_count)
        self._idle_slots = asyncio.Semaphore(slot_count or 0)

    @classmethod
    async def probe(
        cls, client: HttpClient, info: ModelInfo, tokenizer: TokenizerProbe, count: int, *, use_sessions: bool = True
    ) -> ModelServer:
        """Find out how a server is asked, what it can do, and whether it tokenizes as the tokenizer does.

        Args:
            count: how many of the most likely tokens it should return.
            use_sessions: whether mixlm's session route is used where the server has it.

        Raises:
            EngineError: it does not answer.
            TokenizerError: it has another tokenizer.
            UnsupportedError: it lacks something, which is named.
        """
        endpoint = Endpoint(client, info.name, len(tokenizer.tokens))
        await _compare_tokenizers(endpoint, tokenizer)
        protocol, max_logprobs, limit = await _probe_protocol(endpoint, info, tokenizer, count)
        probe_slot = None if _slots_of(info, protocol) is None else info.total_slots - 1
        identity = await ModelIdentity.read(endpoint, info, protocol, tokenizer.ids, probe_slot)
        # Asked the same once more, it should have the beginning in its cache.
        usual = await endpoint.candidates(protocol, tokenizer.ids, 5)
        takes_ids = await _takes_ids(endpoint, protocol, tokenizer, usual.candidates)
        capabilities: ServerCapabilities | LlamaCppCapabilities
        sessions: SessionPool | None = None
        if isinstance(protocol, LlamaCppProtocol):
            complete = partial(identity.complete, path=COMPLETION_PATH)
            missing = await find_missing(complete, np.array(tokenizer.ids))
            capabilities = LlamaCppCapabilities(missing, tokenizer.tokens, tokenizer.ends)
        elif isinstance(protocol, SGLangProtocol):
            capabilities = ServerCapabilities(protocol.missing)
        else:
            capabilities = await probe_capabilities(endpoint.complete, tokenizer.ids)
            pool = SessionPool(client.base_url, client.key, client.limits, identity.check)
            if use_sessions and await pool.is_available():
                sessions = pool
        return cls(identity, max_logprobs, limit, capabilities, sessions, bool(usual.cached), takes_ids)

    async def candidates(self, session: Session, ids: Ids, count: int, among: Ids | None = None) -> CandidatesResponse:
        """Ask for at least the `count` most likely tokens after `ids`, of all or of some. Raises EngineError."""
        if self.sessions is not None and among is None:  # its route takes no ids that count
            response = await self.sessions.generate(session, ids, logprobs_parameters(count))
            top_tokens = parse_top_tokens(response, self._endpoint.client.base_url)
            return CandidatesResponse(self._endpoint.without_padding(top_tokens), response.get("cached"))
        async with self._slot(session, ids) as slot:
            normalized = isinstance(session, TopKOnlySession) and session.normalized
            candidates = await self._endpoint.candidates(
                self.protocol, ids.tolist(), count, slot, among, normalized=normalized
            )
        await self.identity.check(candidates.new_connection)
        return candidates

    async def prompt_scores(self, session: Session, ids: Ids) -> TokenScores:
        """Return the log-probabilities of a prompt's tokens but the first.

        Raises:
            EngineError: It fails.
            UnsupportedError: It returns none.
        """
        async with self._slot(session, ids) as slot:
            send = partial(self.identity.complete, path=self.protocol.path, slot=slot)

            async def all_tokens(prompt: Ids) -> Candidates:
                size = self._endpoint.vocabulary_size
                return (await self._endpoint.candidates(self.protocol, prompt.tolist(), size, slot)).candidates

            try:
                return await score_prompt(self.protocol, ids, send, all_tokens)
            except UnsupportedError as error:
                raise UnsupportedError(f"{self._endpoint.client.base_url}: {error.message}", error.hint) from error

    async def generate(self, session: Session, request: GenerateRequest, ends: Sequence[int]) -> GenerateResponse:
        """Let it sample tokens itself.

        Args:
            ends: ids that end a text.

        Raises:
            EngineError: it fails.
        """
        if isinstance(self.capabilities, LlamaCppCapabilities):
            return await self._generate_on_llamacpp(self.capabilities, session, request)
        base_url = self._endpoint.client.base_url
        if self.sessions is not None:
            parameters = self.capabilities.parameters(request, ends)
            banned = self.capabilities.banned(request)
            return parse_generated(await self.sessions.generate(session, request.ids, parameters, banned), base_url)
        body = self.capabilities.body(request, ends)
        return parse_generation(await self.identity.complete(body), base_url)

    def release(self, session: Session) -> None:
        """Note that a sequence goes on elsewhere, or begins anew."""
        if self.sessions is not None:
            self.sessions.release(session)

    def close(self) -> None:
        """Close the connections of sequences."""
        if self.sessions is not None:
            self.sessions.close()

    async def _generate_on_llamacpp(
        self, capabilities: LlamaCppCapabilities, session: Session, request: GenerateRequest
    ) -> GenerateResponse:
        async def complete(body: dict[str, Any]) -> Any:
            async with self._slot(session, request.ids) as slot:
                return await self.identity.complete(body, COMPLETION_PATH, slot)

        async def top_tokens(ids: Ids, count: int) -> Candidates:
            return (await self.candidates(session, ids, count)).candidates

        return await capabilities.generate(request, complete, top_tokens)

    @asynccontextmanager
    async def _slot(self, session: Session, ids: Ids) -> AsyncIterator[int | None]:
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


def _slots_of(info: ModelInfo, protocol: ServerProtocol) -> int | None:
    """Return how many slots of llama.cpp are for sequences: the last of several is for checks of the model."""
    total = info.total_slots
    return max(total - 1, 1) if total and isinstance(protocol, LlamaCppProtocol) else None


async def _compare_tokenizers(endpoint: Endpoint, tokenizer: TokenizerProbe) -> None:
    client = endpoint.client
    vllm_body = {"model": endpoint.model, "prompt": PROBE_TEXT, "add_special_tokens": False}
    for body in (vllm_body, {"content": PROBE_TEXT}):
        response = await client.request("POST", "/tokenize", body)
        ids = response.value.get("tokens") if response.status == 200 and isinstance(response.value, dict) else None
        if isinstance(ids, list) and ids:
            if ids != tokenizer.ids:
                raise TokenizerError(
                    f"the tokenizer in {tokenizer.folder} and the server {client.base_url} read a text differently",
                    "give the folder of the model that the server has",
                )
            return


async def _takes_ids(
    endpoint: Endpoint, protocol: ServerProtocol, tokenizer: TokenizerProbe, usual: Candidates
) -> bool:
    """Whether a server returns the most likely of given ids: tried with two that are hardly the most likely ones.

    usual: the most likely tokens after the probe's text. Their differences have to be those among the given ids.
    """
    order = usual.ids[np.argsort(-usual.logprobs)]
    among = np.unique([*order[1:3].tolist(), *order[-1:].tolist(), tokenizer.letter_token])
    try:
        response = await endpoint.candidates(protocol, tokenizer.ids, len(among), None, among)
    except EngineError:
        return False
    returned = dict(zip(response.candidates.ids.tolist(), response.candidates.logprobs.tolist(), strict=True))
    expected = dict(zip(usual.ids.tolist(), usual.logprobs.tolist(), strict=True))
    common = [token for token in among.tolist() if token in expected]
    shifts = [returned[token] - expected[token] for token in common if token in returned]
    return {*returned} == {*among.tolist()} and max(shifts) - min(shifts) < _SAME


async def _probe_protocol(
    endpoint: Endpoint, info: ModelInfo, tokenizer: TokenizerProbe, wanted: int
) -> tuple[ServerProtocol, int, int | None]:
    """Return the protocol that a server answers to, and the `max_logprobs` and the `limit` of `ModelServer`.

    Raises UnsupportedError where it answers to none.
    """
    protocols: tuple[ServerProtocol, ...] = (LlamaCppProtocol(tokenizer.letter_token), OpenAIProtocol())
    if info.is_sglang:
        protocols = (SGLangProtocol(info.adapter),)
    reason = ""
    for protocol in protocols:
        for count in dict.fromkeys((wanted, 20, 5)):
            try:
                response = await endpoint.candidates(protocol, tokenizer.first_ids, count)
            except EngineError as error:
                reason = error.message
                continue
            returned = len(response.candidates.ids)
            if returned >= min(count, 5):
                known = min(returned, count)  # vLLM may add the token that it sampled
                limit = None if known == wanted else known
                if protocol.may_be_limited:
                    limit = await _find_limit(endpoint, protocol, tokenizer.first_ids, known)
                return protocol, min(wanted, limit or wanted), limit
            reason = f"it returns {returned} tokens where {count} are asked for"
    raise UnsupportedError(
        f"{endpoint.client.base_url} does not return the most likely next tokens by their ids: {reason}",
        "servers that do: llama.cpp's, SGLang's, and vLLM's with --max-logprobs 80",
    )


async def _find_limit(endpoint: Endpoint, protocol: ServerProtocol, ids: list[int], lowest: int) -> int | None:
    """Return the most tokens that a server returns, at least `lowest`; None where it returns all.

    It is asked for all, and where it refuses, for ever closer numbers. A server that fails is taken at what it has
    returned so far.
    """
    size = endpoint.vocabulary_size
    endpoint = replace(endpoint, vocabulary_size=sys.maxsize)  # padding counts here
    highest = count = size
    while lowest < highest:
        try:
            returned = len((await endpoint.candidates(protocol, ids, count)).candidates.ids)
        except RequestRefusedError:
            highest = count - 1
        except EngineError:
            return lowest
        else:
            if returned < count:
                return max(returned, lowest)
            lowest = count
        count = min(4 * lowest, (lowest + highest + 1) // 2)
    return None if lowest >= size else lowest
