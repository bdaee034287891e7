"""The ASGI application: the routes, and what they share."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from mixlm.server.api_errors import ApiError
from mixlm.server.api_keys import ApiKeys
from mixlm.server.completion_handler import CompletionHandler
from mixlm.server.limits import ServerLimits
from mixlm.server.metrics import CONTENT_TYPE, ServerMetrics
from mixlm.server.middleware import RequestMiddleware
from mixlm.server.model_registry import ModelRegistry
from mixlm.server.model_thread import ModelThread
from mixlm.server.openapi import openapi_document
from mixlm.server.page_files import PAGE_FILES
from mixlm.server.preparation import RequestPreparer
from mixlm.server.request_parsing import ParsedRequest, parse_chat, parse_completion
from mixlm.server.request_schemas import ChatBody, CommonFields, CompletionBody, parse_body
from mixlm.server.responses import to_json
from mixlm.server.tracing import RequestTracer


class ServerApp:
    """The parts of one server, and its routes.

    Args:
        registry: The served models.
        limits: Of requests and of the queue.
        keys: The accepted API keys; none by default, then anyone may ask.
        hosts: Names that a Host header may have; None for any.
        tracer: Where requests are traced.

    Attributes:
        asgi: The ASGI application.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        limits: ServerLimits,
        keys: ApiKeys | None = None,
        hosts: Collection[str] | None = None,
        tracer: RequestTracer | None = None,
    ) -> None:
        self.registry = registry
        self.limits = limits
        self.metrics = ServerMetrics()
        self.tracer = tracer
        self.model_thread = ModelThread(limits)
        self.preparer = RequestPreparer(limits)
        self.metrics.add_gauge("mixlm_writing", "Running generations.", lambda: self.model_thread.num_running)
        self.metrics.add_gauge("mixlm_waiting", "Generations in the queue.", lambda: self.model_thread.num_waiting)
        routes = self._routes()
        self._router = Router(routes, lifespan=self._lifespan)
        self.asgi: ASGIApp = RequestMiddleware(
            self._dispatch, {route.path for route in routes}, keys or ApiKeys(), self.metrics, hosts, tracer
        )

    @property
    def has_busy_threads(self) -> bool:
        """Whether threads still run after the server has stopped."""
        return self.model_thread.is_alive or self.preparer.is_busy

    def _routes(self) -> list[Route]:
        document = to_json(openapi_document(self.limits))
        return [
            Route("/v1/models", self._get_models),
            Route("/v1/models/{name:path}", self._get_model),
            Route("/v1/chat/completions", self._post_chat_completion, methods=["POST"]),
            Route("/v1/completions", self._post_completion, methods=["POST"]),
            Route("/health", self._get_health),
            Route("/ready", self._get_ready),
            Route("/metrics", self._get_metrics),
            Route("/openapi.json", _static(document, "application/json")),
            *(
                Route(path, _static(file.read_bytes(), media_type, {"cache-control": "no-cache"}))
                for path, (file, media_type) in PAGE_FILES.items()
            ),
        ]

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the route of a request. Raises its errors, HTTPException for an unknown path or method."""
        scope["app"] = self  # else the router answers unknown paths itself
        await self._router(scope, receive, send)

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

    async def _post_chat_completion(self, request: Request) -> ASGIApp:
        body = parse_body(ChatBody, await self._read_body(request))
        await self._build_unit(request, body)
        return self._handler(request, parse_chat(body, self.registry, self.limits))

    async def _post_completion(self, request: Request) -> ASGIApp:
        body = parse_body(CompletionBody, await self._read_body(request))
        await self._build_unit(request, body)
        return self._handler(request, parse_completion(body, self.registry, self.limits))

    async def _build_unit(self, request: Request, body: CommonFields) -> None:
        unit = body.mixlm.unit if body.mixlm is not None else None
        await self.preparer.build_unit(self.registry.get(body.model), unit, request.scope["mixlm.record"].client)

    def _handler(self, request: Request, parsed: ParsedRequest) -> ASGIApp:
        record = request.scope["mixlm.record"]
        return CompletionHandler(parsed, self.model_thread, self.preparer, self.metrics, self.limits, record)

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

    async def _read_body(self, request: Request) -> bytes:
        """Return the body. Raises ApiError if it is not JSON by its type, too large, or too slow."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            # This also keeps out pages of other origins: browsers send them JSON only with permission.
            raise ApiError(415, "the body must be JSON: send Content-Type: application/json", code="unsupported_type")
        maximum, seconds = self.limits.max_body_bytes, self.limits.body_timeout
        too_large = ApiError(413, f"the body has more than {maximum} bytes", code="body_too_large")
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > maximum:
            raise too_large
        data = bytearray()
        try:
            async with asyncio.timeout(seconds):
                async for part in request.stream():
                    data += part
                    if len(data) > maximum:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {seconds:g} s", code="body_too_slow") from None
        except ClientDisconnect:
            raise ApiError(400, "the client disconnected", code="gone") from None
        return _decoded(bytes(data), request.headers.get("content-encoding", ""), maximum)


def _json(value: Any, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")


def _decoded(data: bytes, encoding: str, maximum: int) -> bytes:
    """Return a body without its content encoding. Raises ApiError for one that is unknown, spoiled or too large."""
    if encoding.strip().lower() in ("", "identity"):
        return data
    if encoding.strip().lower() != "gzip":
        message = f"the content encoding {encoding[:40]!r} is unknown: send gzip, or none"
        raise ApiError(415, message, code="unsupported_encoding")
    decoder = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        decoded = decoder.decompress(data, maximum + 1)
    except zlib.error:
        raise ApiError(400, "the body is not gzip, as its content encoding says", code="invalid_encoding") from None
    if len(decoded) > maximum:
        raise ApiError(413, f"the body has more than {maximum} bytes", code="body_too_large")
    if not decoder.eof:
        raise ApiError(400, "the body is not complete gzip", code="invalid_encoding")
    return decoded


def _static(
    data: bytes, media_type: str, headers: dict[str, str] | None = None
) -> Callable[[Request], Awaitable[Response]]:
    async def get_static(_request: Request) -> Response:
        return Response(data, media_type=media_type, headers=headers)

    return get_static
