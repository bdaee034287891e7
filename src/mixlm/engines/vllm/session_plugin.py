"""A route of vLLM's server on which one sequence is continued again and again. Imported by vLLM only.

A request to `/v1/completions` carries the whole prompt, and vLLM prefills again what follows the last whole block
of its prefix cache. Here a sequence is a WebSocket: a message says how many of the tokens so far are kept, which ones
are added, and how many to generate; the response has the new tokens. Behind it is one of vLLM's streaming-input
sessions, which keeps the KV cache to the last token. A sequence that is cut back begins a new one, with what the prefix
cache has. Idle sessions count among vLLM's sequences and hold memory: few stay, and not for long.

The server loads it where it finds mixlm installed and `VLLM_PLUGINS=mixlm` is set; its keys (`--api-key`) apply here.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections import OrderedDict
from collections.abc import AsyncGenerator
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from starlette.datastructures import State
from vllm import SamplingParams
from vllm.engine.protocol import EngineClient, StreamingInput
from vllm.sampling_params import RequestOutputKind

from mixlm.engines.vllm.sampling_params import BANNED_ARGUMENT, SESSION_PATH, logprobs_parameters

_IDLE_SECONDS = 10.0  # after which a session that is not continued frees its memory
_PARAMETERS = {*logprobs_parameters(1), "stop_token_ids", "logit_bias"}


class SessionPlugin:
    """What vLLM's entry point `vllm.endpoint_plugins` asks for."""

    name = "mixlm"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route."""
        app.add_api_websocket_route(SESSION_PATH, _serve)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Note the engine."""
        if engine_client is not None:
            max_sequences = engine_client.vllm_config.scheduler_config.max_num_seqs
            state.mixlm_idle_sessions = IdleSessions(engine_client, max(max_sequences // 2, 1))


class IdleSessions:
    """The sessions that wait to be continued. The one that has been idle longest is ended when there are too many."""

    def __init__(self, engine: EngineClient, limit: int) -> None:
        self.engine = engine
        self._limit = limit
        self._sessions: OrderedDict[StreamingSession, asyncio.TimerHandle] = OrderedDict()

    def add(self, session: StreamingSession) -> None:
        """Note that a session is idle."""
        self._sessions[session] = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._end, session)
        while len(self._sessions) > self._limit:
            self._end(next(iter(self._sessions)))

    def remove(self, session: StreamingSession) -> None:
        """Note that a session is continued, or gone."""
        if (timer := self._sessions.pop(session, None)) is not None:
            timer.cancel()

    def _end(self, session: StreamingSession) -> None:
        self.remove(session)
        session.end()


class StreamingSession:
    """One connection's sequence, and the session of vLLM's that runs it, if there is one."""

    def __init__(self, idle_sessions: IdleSessions) -> None:
        self._idle_sessions = idle_sessions
        self._tokens: list[int] = []
        self._cached = 0  # tokens that the session has in the KV cache
        self._inputs: asyncio.Queue[StreamingInput | None] | None = None
        self._outputs: AsyncGenerator[Any, None] | None = None
        self._logprobs: int | None = None

    async def generate(self, message: dict[str, Any]) -> dict[str, Any]:
        """Continue the sequence.

        Args:
            message: `keep`: how many of the tokens so far are kept; `ids`: those that are added; `parameters`: of
                `vllm.SamplingParams`; `banned`: ids that may not be sampled, as ranges.

        Returns:
            `ids`: the tokens generated; `logprobs`: for each, log-probabilities by id; `cached`: tokens of the prompt
            that were in the KV cache.

        Raises:
            ValueError, KeyError: this is no such message. What vLLM refuses raises its errors.
        """
        keep, added, parameters = int(message["keep"]), message["ids"], message["parameters"]
        if not 0 <= keep <= len(self._tokens) or set(parameters) - _PARAMETERS:
            raise ValueError(f"keep is {keep} of {len(self._tokens)} tokens, parameters are {sorted(parameters)}")
        if "logit_bias" in parameters:
            parameters["logit_bias"] = {int(token): float(bias) for token, bias in parameters["logit_bias"].items()}
        params = SamplingParams(
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={BANNED_ARGUMENT: message["banned"]} if message.get("banned") else None,
            **parameters,
        )
        self._idle_sessions.remove(self)
        self._tokens = [*self._tokens[:keep], *added]
        # Which log-probabilities a session returns is settled when it begins.
        if keep < self._cached or params.logprobs != self._logprobs or len(self._tokens) <= self._cached:
            self.end()
        cached = self._cached
        new_tokens = self._tokens[self._cached :]
        inputs, outputs = self._session(params)
        inputs.put_nowait(StreamingInput({"prompt_token_ids": new_tokens}, params))
        ids: list[int] = []
        logprobs: list[dict[int, float]] = []
        while True:
            output = await anext(outputs)
            [completion] = output.outputs
            ids += completion.token_ids
            logprobs += [
                {token: logprob.logprob for token, logprob in position.items()}
                for position in completion.logprobs or ()
            ]
            if completion.finish_reason is not None:
                break
        self._tokens += ids
        self._cached = len(self._tokens) - 1  # the last token is dropped when it is continued
        if completion.finish_reason == "length":
            self._idle_sessions.add(self)
        else:
            self.end()
        return {"ids": ids, "logprobs": logprobs, "cached": cached or output.num_cached_tokens or 0}

    def end(self) -> None:
        """End vLLM's session; the tokens stay."""
        if self._inputs is not None:
            self._inputs.put_nowait(None)
            # The rest of its outputs is awaited by nobody else.
            task = asyncio.ensure_future(_drain(self._outputs))
            _tasks.add(task)
            task.add_done_callback(_tasks.discard)
        self._inputs = self._outputs = None
        self._cached = 0

    async def abort(self) -> None:
        """Drop vLLM's session, whatever it is doing."""
        self._idle_sessions.remove(self)
        if self._outputs is not None:
            await self._outputs.aclose()
        self._inputs = self._outputs = None
        self._cached = 0

    def _session(
        self, params: SamplingParams
    ) -> tuple[asyncio.Queue[StreamingInput | None], AsyncGenerator[Any, None]]:
        if self._inputs is None or self._outputs is None:
            self._inputs, self._logprobs = asyncio.Queue(), params.logprobs
            engine = self._idle_sessions.engine
            self._outputs = engine.generate(_iterate(self._inputs), params, f"mixlm-{uuid4().hex}")
        return self._inputs, self._outputs


_tasks: set[asyncio.Future[None]] = set()  # an event loop keeps no reference to them


async def _iterate(inputs: asyncio.Queue[StreamingInput | None]) -> AsyncGenerator[StreamingInput, None]:
    while (streaming_input := await inputs.get()) is not None:
        yield streaming_input


async def _drain(outputs: AsyncGenerator[Any, None] | None) -> None:
    if outputs is not None:
        async for _ in outputs:
            pass


async def _serve(websocket: WebSocket) -> None:
    """Respond to one connection's messages, one after the other."""
    await websocket.accept()
    session = StreamingSession(websocket.app.state.mixlm_idle_sessions)
    try:
        while True:
            try:
                response = await session.generate(await websocket.receive_json())
            except WebSocketDisconnect:
                break
            except Exception as error:  # whatever vLLM refuses it with: the client gets the reason, and may go on
                await session.abort()
                # vLLM refuses a request with a ValueError; its other errors are failures.
                response = {"error": str(error) or type(error).__name__, "refused": isinstance(error, ValueError)}
            await websocket.send_json(response)
    except (WebSocketDisconnect, RuntimeError):
        pass  # gone before the response was there
    finally:
        await session.abort()
