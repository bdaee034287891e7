"""Log-probabilities of given tokens from servers: what weights, scores and given answers need, without local weights.

vLLM returns those of a prompt (`prompt_logprobs`), SGLang too (`input_token_logprobs`), and so do servers with OpenAI's
`echo`. llama.cpp has nothing of the kind: there, each token is asked for by itself. A bias makes the server sample it,
and the log-probability that it returns is of the logits before any bias. Its prefix cache leaves one forward a token.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from mixlm.engines.remote.protocols import LlamaCppProtocol, ServerProtocol, SGLangProtocol, log_probability, reading
from mixlm.engines.topk_only import TokenScores
from mixlm.errors import RequestRefusedError, UnsupportedError
from mixlm.types import Candidates, Ids

_FORCED = 1000.0  # a bias above any difference of logits

Send = Callable[[dict[str, Any]], Awaitable[Any]]
AllTokens = Callable[[Ids], Awaitable[Candidates]]


async def score_prompt(protocol: ServerProtocol, ids: Ids, send: Send, all_tokens: AllTokens) -> TokenScores:
    """Ask a server for the log-probabilities of a prompt's tokens.

    Args:
        protocol: The server's.
        ids: The prompt, int64 (n,).
        send: Sends a body to the protocol's path and returns the response.
        all_tokens: Returns the log-probabilities, up to a constant, of every token after ids.

    Raises:
        EngineError: The server fails.
        UnsupportedError: It returns no log-probabilities of a prompt.
    """
    if isinstance(protocol, LlamaCppProtocol):
        return await _token_by_token(ids, send, all_tokens)
    attempts: Sequence[tuple[dict[str, Any], Callable[[Any, list[int]], TokenScores]]]
    prompt = ids.tolist()
    if isinstance(protocol, SGLangProtocol):
        attempts = [(_sglang_body(protocol, prompt), _parse_sglang)]
    else:
        common = {"prompt": prompt, "max_tokens": 1, "temperature": 1.0}
        attempts = [
            ({**common, "prompt_logprobs": 1}, _parse_vllm),
            ({**common, "echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}, _parse_echo),
        ]
    reason = ""
    for body, parse in attempts:
        try:
            response = await send(body)
        except RequestRefusedError as error:
            reason = error.message
            continue
        try:
            return parse(response, prompt)
        except (TypeError, LookupError, ValueError, AttributeError) as error:
            reason = f"its response has none ({error})"
    raise UnsupportedError(
        f"the server returns no log-probabilities of a prompt's tokens: {reason}",
        "servers that do: vLLM's, SGLang's and llama.cpp's; or use --engine hf (engine='hf')",
    )


def _parse_vllm(response: Any, ids: list[int]) -> TokenScores:
    """Read `prompt_logprobs`: for each token but the first, log-probability and rank by id."""
    entries = response["choices"][0].get("prompt_logprobs")
    if entries is None:
        entries = response["prompt_logprobs"]
    logprobs, is_top = [], []
    for token, entry in zip(ids[1:], entries[1:], strict=True):
        own = entry[str(token)]
        logprobs.append(float(own["logprob"]))
        is_top.append(all(own["logprob"] >= other["logprob"] for other in entry.values()))
    return _scores(logprobs, is_top)


def _parse_echo(response: Any, ids: list[int]) -> TokenScores:
    """Read `token_logprobs` of OpenAI's `echo`, and compare with `top_logprobs`, where tokens are spelled as ids."""
    reported = response["choices"][0]["logprobs"]
    if len(reported["token_logprobs"]) < len(ids) or reported["token_logprobs"][0] is not None:
        raise ValueError("it does not echo the prompt's tokens")
    pairs = list(zip(reported["token_logprobs"][1:], reported["top_logprobs"][1:], strict=True))[: len(ids) - 1]
    is_top = [logprob >= max(top.values(), default=logprob) for logprob, top in pairs]
    return _scores([float(logprob) for logprob, _ in pairs], is_top)


def _sglang_body(protocol: SGLangProtocol, ids: list[int]) -> dict[str, Any]:
    [body] = protocol.request_bodies(ids, 1)
    return {**body, "logprob_start_len": 0}


def _parse_sglang(response: Any, ids: list[int]) -> TokenScores:
    """Read `input_token_logprobs`: for each token, log-probability, id and text."""
    meta = response["meta_info"]
    rows, tops = meta["input_token_logprobs"], meta["input_top_logprobs"]
    if len(rows) != len(ids) or [row[1] for row in rows] != ids:
        raise ValueError("they are of other tokens")
    logprobs = [log_probability(row[0]) for row in rows[1:]]
    is_top = [logprob >= top[0][0] for logprob, top in zip(logprobs, tops[1:], strict=True)]
    return _scores(logprobs, is_top)


async def _token_by_token(ids: Ids, send: Send, all_tokens: AllTokens) -> TokenScores:
    logprobs, is_top = [], []
    for end in range(1, len(ids)):
        token = int(ids[end])
        body = {
            "prompt": ids[:end].tolist(),
            "n_predict": 1,
            "temperature": 1.0,
            "n_probs": 1,
            "logit_bias": [[token, _FORCED]],
        }
        reported = _parse_llamacpp(await send(body), token)
        if reported is None:  # a part of a character, whose numbers are withheld
            reported = _among_all(await all_tokens(ids[:end]), token)
        logprobs.append(reported[0])
        is_top.append(reported[1])
    return _scores(logprobs, is_top)


def _parse_llamacpp(response: Any, token: int) -> tuple[float, bool] | None:
    with reading("llama.cpp", response):
        content = response["choices"][0]["logprobs"]
        if content is None or not content["content"]:
            return None
        [entry] = content["content"]
        if entry["id"] != token:
            return None
        top = entry["top_logprobs"][0]
        logprob = entry["logprob"]
    return log_probability(logprob), top["id"] == token or logprob >= top["logprob"]


def _among_all(candidates: Candidates, token: int) -> tuple[float, bool]:
    """Return a token's log-probability and whether it is the top, by the whole vocabulary."""
    values = candidates.logprobs.astype(np.float64)
    own = values[candidates.ids == token]
    if not own.size:
        return -math.inf, False
    return float(own[0] - np.logaddexp.reduce(values)), bool(own[0] >= values.max())


def _scores(logprobs: list[float], is_top: list[bool]) -> TokenScores:
    values = np.array(logprobs, dtype=np.float64)
    if np.isnan(values).any() or (values > 1e-3).any():
        raise ValueError("they are no log-probabilities")
    return TokenScores(np.minimum(values, 0.0), np.array(is_top, dtype=np.bool_))
