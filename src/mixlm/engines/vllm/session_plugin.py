"""A route of vLLM's server on which one text is continued again and again. Imported by vLLM only.

A request to `/v1/completions` carries the whole text, and vLLM reads the part of it anew that fills no whole block of
its prefix cache. Here a text is a WebSocket: a message says how much of what the connection holds is kept, what is
added, and how many tokens to write; the answer has the tokens. Behind it is one of vLLM's streaming-input sessions,
which keeps keys and values to the last token. A text that is taken back begins a new one, with what the prefix cache
has. Sessions at rest count among vLLM's sequences and hold memory: few rest, and not for long.

The server loads it where it finds mixlm installed and `VLLM_PLUGINS=mixlm` is set; its keys (`--api-key`) hold here.
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

from mixlm.engines.remote.session_client import SESSION_PATH
from mixlm.engines.vllm.id_ranges import BANNED_ARGUMENT

_RESTING = 10.0  # seconds after which a session that is not continued gives its memory back
_PARAMETERS = frozenset(
    [
        "max_tokens",
        "seed",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "stop_token_ids",
        "logprobs",
        "logit_bias",
    ]
)


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
            most = engine_client.vllm_config.scheduler_config.max_num_seqs
            state.mixlm_rest = IdleSessions(engine_client, max(most // 2, 1))


class IdleSessions:
    """The sessions that wait to be continued. The one that has rested longest is ended when there are too many."""

    def __init__(self, engine: EngineClient, most: int) -> None:
        self.engine = engine
        self._most = most
        self._sessions: OrderedDict[StreamingSession, asyncio.TimerHandle] = OrderedDict()

    def add(self, text: StreamingSession) -> None:
        """Let a session rest."""
        self._sessions[text] = asyncio.get_running_loop().call_later(_RESTING, self._end, text)
        while len(self._sessions) > self._most:
            self._end(next(iter(self._sessions)))

    def remove(self, text: StreamingSession) -> None:
        """A session is continued, or gone."""
        if (timer := self._sessions.pop(text, None)) is not None:
            timer.cancel()

    def _end(self, text: StreamingSession) -> None:
        self.remove(text)
        text.end()


class StreamingSession:
    """One connection's text, and the session of vLLM's that holds it, if there is one."""

    def __init__(self, rest: IdleSessions) -> None:
        self._rest = rest
        self._held: list[int] = []
        self._read = 0  # tokens that the session has keys and values of
        self._inputs: asyncio.Queue[StreamingInput | None] | None = None
        self._outputs: AsyncGenerator[Any, None] | None = None
        self._told: int | None = None

    async def write(self, message: dict[str, Any]) -> dict[str, Any]:
        """Continue. Raises ValueError or KeyError for what is no message; vLLM's errors for what it refuses."""
        keep, added, parameters = int(message["keep"]), message["ids"], message["parameters"]
        if not 0 <= keep <= len(self._held) or set(parameters) - _PARAMETERS:
            raise ValueError(f"keep is {keep} of {len(self._held)} tokens, parameters are {sorted(parameters)}")
        if "logit_bias" in parameters:
            parameters["logit_bias"] = {int(one): float(bias) for one, bias in parameters["logit_bias"].items()}
        params = SamplingParams(
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={BANNED_ARGUMENT: message["banned"]} if message.get("banned") else None,
            **parameters,
        )
        self._rest.remove(self)
        self._held = [*self._held[:keep], *added]
        # What a session tells of its tokens is settled when it begins.
        if keep < self._read or params.logprobs != self._told or len(self._held) <= self._read:
            self.end()
        cached = self._read
        new = self._held[self._read :]
        inputs, outputs = self._session(params)
        inputs.put_nowait(StreamingInput({"prompt_token_ids": new}, params))
        ids: list[int] = []
        told: list[dict[int, float]] = []
        while True:
            found = await anext(outputs)
            [part] = found.outputs
            ids += part.token_ids
            told += [{i: one.logprob for i, one in position.items()} for position in part.logprobs or ()]
            if part.finish_reason is not None:
                break
        self._held += ids
        self._read = len(self._held) - 1  # the last token is dropped when it is continued
        if part.finish_reason == "length":
            self._rest.add(self)
        else:
            self.end()
        return {"ids": ids, "told": told, "cached": cached or found.num_cached_tokens or 0}

    def end(self) -> None:
        """End the session; the text stays."""
        if self._inputs is not None:
            self._inputs.put_nowait(None)
            # The rest of its outputs is awaited by nobody else.
            task = asyncio.ensure_future(_drain(self._outputs))
            _tasks.add(task)
            task.add_done_callback(_tasks.discard)
        self._inputs = self._outputs = None
        self._read = 0

    async def abort(self) -> None:
        """Drop the session in the middle of whatever it does."""
        self._rest.remove(self)
        if self._outputs is not None:
            await self._outputs.aclose()
        self._inputs = self._outputs = None
        self._read = 0

    def _session(
        self, params: SamplingParams
    ) -> tuple[asyncio.Queue[StreamingInput | None], AsyncGenerator[Any, None]]:
        if self._inputs is None or self._outputs is None:
            self._inputs, self._told = asyncio.Queue(), params.logprobs
            self._outputs = self._rest.engine.generate(_all(self._inputs), params, f"mixlm-{uuid4().hex}")
        return self._inputs, self._outputs


_tasks: set[asyncio.Future[None]] = set()


async def _all(inputs: asyncio.Queue[StreamingInput | None]) -> AsyncGenerator[StreamingInput, None]:
    while (one := await inputs.get()) is not None:
        yield one


async def _drain(outputs: AsyncGenerator[Any, None] | None) -> None:
    if outputs is not None:
        async for _ in outputs:
            pass


async def _serve(websocket: WebSocket) -> None:
    """Answer one connection's messages, one after the other."""
    await websocket.accept()
    text = StreamingSession(websocket.app.state.mixlm_rest)
    try:
        while True:
            try:
                answer = await text.write(await websocket.receive_json())
            except WebSocketDisconnect:
                break
            except Exception as error:  # whatever vLLM refuses it with: the client is told, and may go on
                await text.abort()
                answer = {"error": str(error) or type(error).__name__}
            await websocket.send_json(answer)
    except (WebSocketDisconnect, RuntimeError):
        pass  # gone before the answer was there
    finally:
        await text.abort()
