"""Which kind of server has a model, and what it can do: probed when a member is loaded or a server comes back."""

from __future__ import annotations

import numpy as np

from mixlm.engines.remote.http_client import HttpClient
from mixlm.engines.remote.llamacpp_server import LlamaCppServer
from mixlm.engines.remote.model_info import ModelInfo
from mixlm.engines.remote.openai_server import OpenAIServer
from mixlm.engines.remote.server import ModelServer, TokenizerProbe
from mixlm.engines.remote.sglang_server import SGLangServer
from mixlm.errors import EngineError, RequestRefusedError, TokenizerError, UnsupportedError
from mixlm.types import Candidates

# Differences of the same log-probabilities in another batch: logits below 32 in bfloat16 are an eighth apart, and each
# may be the next one.
_SAME = 0.5
PROBE_TEXT = "The sky is blue, and 12 + 30 = 42."


async def probe(client: HttpClient, info: ModelInfo, tokenizer: TokenizerProbe, count: int) -> ModelServer:
    """Find out how a server is asked, what it can do, and whether it tokenizes as the tokenizer does.

    Args:
        count: how many of the most likely tokens it should return.

    Raises:
        EngineError: it does not answer.
        TokenizerError: it has another tokenizer.
        UnsupportedError: it lacks something, which is named.
    """
    await _compare_tokenizers(client, info, tokenizer)
    server = await _find_kind(client, info, tokenizer, count)
    await server.take_fingerprint()
    # Asked the same once more, it should have the beginning in its cache.
    usual = await server.top_tokens(tokenizer.ids, 5)
    server.reports_cached = bool(usual.cached)
    server.takes_ids = await _takes_ids(server, usual.candidates)
    server.missing = (await server.find_missing()).replace(client.base_url, "the server")  # replicas lack the same
    return server


async def _compare_tokenizers(client: HttpClient, info: ModelInfo, tokenizer: TokenizerProbe) -> None:
    vllm_body = {"model": info.name, "prompt": PROBE_TEXT, "add_special_tokens": False}
    for body in (vllm_body, {"content": PROBE_TEXT}):
        status, value = await client.request("POST", "/tokenize", body)
        ids = value.get("tokens") if status == 200 and isinstance(value, dict) else None
        if isinstance(ids, list) and ids:
            if ids != tokenizer.ids:
                raise TokenizerError(
                    f"the tokenizer in {tokenizer.folder} and the server {client.base_url} read a text differently",
                    "give the folder of the model that the server has",
                )
            return


async def _find_kind(client: HttpClient, info: ModelInfo, tokenizer: TokenizerProbe, wanted: int) -> ModelServer:
    """Return the kind of server that answers, with its limits. Raises UnsupportedError where none does."""
    reason = ""
    for kind in (SGLangServer,) if info.is_sglang else (LlamaCppServer, OpenAIServer):
        server: ModelServer = kind(client, info, tokenizer)
        for count in dict.fromkeys((wanted, 20, 5)):
            try:
                returned = (await server.top_tokens(tokenizer.first_ids, count)).returned
            except EngineError as error:
                reason = error.message
                continue
            if returned >= min(count, 5):
                known = min(returned, count)  # vLLM may add the token that it sampled
                server.limit = None if known == wanted else known
                if server.may_be_limited:
                    server.limit = await _find_limit(server, known)
                server.max_logprobs = min(wanted, server.limit or wanted)
                return server
            reason = f"it returns {returned} tokens where {count} are asked for"
    raise UnsupportedError(
        f"{client.base_url} does not return the most likely next tokens by their ids: {reason}",
        "servers that do: llama.cpp's, SGLang's, and vLLM's with --max-logprobs 80",
    )


async def _find_limit(server: ModelServer, lowest: int) -> int | None:
    """Return the most tokens that a server returns, at least `lowest`; None where it returns all.

    It is asked for all, and where it refuses, for ever closer numbers. A server that fails is taken at what it has
    returned so far.
    """
    highest = count = size = len(server.tokenizer.tokens)
    while lowest < highest:
        try:
            returned = (await server.top_tokens(server.tokenizer.first_ids, count)).returned
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


async def _takes_ids(server: ModelServer, usual: Candidates) -> bool:
    """Whether a server returns the most likely of given ids: tried with two that are hardly the most likely ones.

    usual: the most likely tokens after the probe's text. Their differences have to be those among the given ids.
    """
    order = usual.ids[np.argsort(-usual.logprobs)]
    among = np.unique([*order[1:3].tolist(), *order[-1:].tolist(), server.tokenizer.first_ids[0]])
    try:
        response = await server.top_tokens(server.tokenizer.ids, len(among), among=among)
    except EngineError:
        return False
    returned = dict(zip(response.candidates.ids.tolist(), response.candidates.logprobs.tolist(), strict=True))
    expected = dict(zip(usual.ids.tolist(), usual.logprobs.tolist(), strict=True))
    shifts = [returned[token] - expected[token] for token in among.tolist() if token in expected and token in returned]
    return {*returned} == {*among.tolist()} and max(shifts) - min(shifts) < _SAME
