"""The ASGI application: the routes, and what they share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from mixlm.server.api_errors import unsupported_field
from mixlm.server.chat_schemas import ChatBody
from mixlm.server.completion_handler import CompletionHandler
from mixlm.server.completions_format import CompletionsFormat
from mixlm.server.json_encoding import to_json
from mixlm.server.limits import ServerLimits
from mixlm.server.metrics import CONTENT_TYPE, ServerMetrics
from mixlm.server.middleware import RequestMiddleware
from mixlm.server.model_registry import ModelRegistry
from mixlm.server.model_thread import ModelThread
from mixlm.server.openapi import openapi_document
from mixlm.server.page_files import PAGE_FILES
from mixlm.server.preparation import RequestPreparer
from mixlm.server.protocols.messages import MessagesFormat
from mixlm.server.protocols.messages_body import MessagesBody
from mixlm.server.protocols.response_store import ResponseStore
from mixlm.server.protocols.responses import ResponsesFormat
from mixlm.server.protocols.responses_body import ResponsesBody
from mixlm.server.request_body import read_body
from mixlm.server.request_parsing import ParsedRequest, check_length, parse_request
from mixlm.server.request_schemas import Body, CompletionBody, parse_body
from mixlm.server.tracing import RequestTracer


class ServerApp:
    """The parts of one server, and its routes; `asgi` is the application.

    keys: names by the hashes of keys; without any, anyone may ask. hosts: names that a Host header may have; None for
    any.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        limits: ServerLimits,
        keys: Mapping[str, str] | None = None,
        hosts: Collection[str] | None = None,
        tracer: RequestTracer | None = None,
    ) -> None:
        self.registry = registry
        self.limits = limits
        self.metrics = ServerMetrics()
        self.tracer = tracer
        self.model_thread = ModelThread(limits)
        self.preparer = RequestPreparer(limits)
        self._stored = ResponseStore(limits.max_stored_bytes)
        gauge = self.metrics.add_gauge
        gauge("mixlm_running", "Running generations.", lambda: self.model_thread.num_running)
        gauge("mixlm_waiting", "Generations in the queue.", lambda: self.model_thread.num_waiting)
        gauge("mixlm_prefix_cache_bytes", "Memory of KV caches kept for later prompts.", self._prefix_cache_bytes)
        routes = self._routes()
        router = Router(routes, redirect_slashes=False, lifespan=self._lifespan)
        paths = {route.path for route in routes}
        self.asgi: ASGIApp = RequestMiddleware(router, paths, keys or {}, self.metrics, hosts, tracer)

    def _prefix_cache_bytes(self) -> int:
        engines = (member.engine for model in self.registry for member in model.ensemble.members)
        return sum({key: size for engine in engines for key, size in engine.prefix_cache_parts.items()}.values())

    def _routes(self) -> list[Route]:
        static = {
            path: Response(file.read_bytes(), media_type=media_type, headers={"cache-control": "no-cache"})
            for path, (file, media_type) in PAGE_FILES.items()
        }
        static["/openapi.json"] = _json(openapi_document(self.limits))
        return [
            Route("/v1/models", self._get_models),
            Route("/v1/models/{name:path}", self._get_model),
            Route("/v1/chat/completions", partial(self._post_completion, ChatBody), methods=["POST"]),
            Route("/v1/completions", partial(self._post_completion, CompletionBody), methods=["POST"]),
            Route("/v1/responses", self._post_response, methods=["POST"]),
            Route("/v1/responses/{id}", self._stored_response, methods=["GET", "DELETE"]),
            Route("/v1/messages", self._post_message, methods=["POST"]),
            Route("/health", self._get_health),
            Route("/ready", self._get_ready),
            Route("/metrics", self._get_metrics),
            *(Route(path, response, methods=["GET"]) for path, response in static.items()),
        ]

    @asynccontextmanager
    async def _lifespan(self, _router: Any) -> AsyncIterator[None]:
        self.model_thread.start()
        yield
        self.model_thread.cancel_all("shutdown")
        await self.model_thread.stop()
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)

    async def _get_models(self, _request: Request) -> Response:
        return _json({"object": "list", "data": [model.to_dict() for model in self.registry]})

    async def _get_model(self, request: Request) -> Response:
        return _json(self.registry.get(request.path_params["name"]).to_dict())

    async def _post_completion(self, schema: type[ChatBody | CompletionBody], request: Request) -> ASGIApp:
        body, _ = await self._body(request, schema)
        return await self._complete(request, body)

    async def _post_response(self, request: Request) -> ASGIApp:
        client = request.scope["mixlm.record"].client
        body, size = await self._body(request, ResponsesBody)
        check_length(len(body.instructions or ""), "instructions", self.limits)
        earlier: list[dict[str, Any]] = []
        if body.previous_response_id is not None:
            earlier = self._stored.get(body.previous_response_id, client, "previous_response_id").messages
            size = self.limits.max_body_bytes  # not known, and may be that of a long conversation
        chat = await self.preparer.convert(size, lambda: parse_body(ChatBody, body.chat_fields(earlier)), client)
        store = None if body.store is False else partial(self._stored.add, client)
        return await self._complete(request, chat, partial(ResponsesFormat, body, earlier, store))

    async def _post_message(self, request: Request) -> ASGIApp:
        client = request.scope["mixlm.record"].client
        body, size = await self._body(request, MessagesBody)
        check_length(len(body.system_text or ""), "system", self.limits)
        chat = await self.preparer.convert(size, lambda: parse_body(ChatBody, body.chat_fields()), client)
        return await self._complete(request, chat, partial(MessagesFormat, body))

    async def _stored_response(self, request: Request) -> Response:
        response_id, client = request.path_params["id"], request.scope["mixlm.record"].client
        if request.method == "DELETE":
            self._stored.remove(response_id, client)
            return _json({"id": response_id, "object": "response", "deleted": True})
        if request.query_params.get("stream", "false") != "false":
            raise unsupported_field("stream", "a stored response is returned whole")
        return _json(self._stored.get(response_id, client).response)

    async def _body(self, request: Request, schema: type[Body]) -> tuple[Body, int]:
        """Return the validated body of a request, and its size in bytes."""
        data = await read_body(request, self.limits)
        client = request.scope["mixlm.record"].client
        return await self.preparer.convert(len(data), partial(parse_body, schema, data), client), len(data)

    async def _complete(
        self,
        request: Request,
        body: ChatBody | CompletionBody,
        response_format: Callable[[ParsedRequest, str], CompletionsFormat] = CompletionsFormat,
    ) -> ASGIApp:
        record = request.scope["mixlm.record"]
        if body.guided_json is not None:
            record.field_names = {"response_format": "guided_json"}
        model = self.registry.get(body.model)
        await self.preparer.build_unit(model, body.mixlm.unit if body.mixlm is not None else None, record.client)
        parsed = parse_request(body, model, self.limits)
        responses = response_format(parsed, record.request_id)
        return CompletionHandler(parsed, responses, self.model_thread, self.preparer, self.metrics, self.limits, record)

    async def _get_health(self, _request: Request) -> Response:
        problem = self._model_problem()
        return _json({"status": problem or "ok"}, 503 if problem else 200)

    async def _get_ready(self, _request: Request) -> Response:
        problem = "stopping" if self.model_thread.draining else self._model_problem()
        return _json({"status": problem or "ready"}, 503 if problem else 200)

    def _model_problem(self) -> str | None:
        """Return what is wrong with the model thread, or None."""
        if not self.model_thread.is_alive:
            return "the models have stopped"
        seconds = self.model_thread.step_seconds
        return f"a step of the models has taken {seconds:.0f} s" if seconds > self.limits.stall_timeout else None

    async def _get_metrics(self, _request: Request) -> Response:
        return Response(self.metrics.render(), headers={"content-type": CONTENT_TYPE})


def _json(value: Any, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")
