"""The application: which path leads where."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from mixlm.server.api_errors import ApiError
from mixlm.server.api_keys import Keys
from mixlm.server.completion_handler import Exchange
from mixlm.server.fields import B, ChatBody, CompletionBody, read
from mixlm.server.limits import Limits
from mixlm.server.metrics import TEXT, Metrics
from mixlm.server.middleware import Guard
from mixlm.server.model_registry import Registry
from mixlm.server.model_thread import Worker
from mixlm.server.openapi import description
from mixlm.server.request_parsing import Asked, chat, completion
from mixlm.server.responses import as_json
from mixlm.server.tracing import Traces

_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


class Server:
    """Everything that one server holds. `app` is its ASGI application."""

    def __init__(
        self,
        registry: Registry,
        limits: Limits,
        keys: Keys | None = None,
        hosts: Collection[str] | None = None,
        traces: Traces | None = None,
    ) -> None:
        self.registry = registry
        self.limits = limits
        self.metrics = Metrics()
        self.traces = traces
        self.worker = Worker(limits)
        self.metrics.watch("mixlm_writing", "Replies that are being written.", lambda: self.worker.writing)
        self.metrics.watch("mixlm_waiting", "Replies that wait for their turn.", lambda: self.worker.waiting)
        self._description = as_json(description(limits))
        self._router = Router(self._routes(), lifespan=self._life)
        self._paths = frozenset(one.path for one in self._router.routes if isinstance(one, Route))
        self.app: ASGIApp = Guard(self._route, keys or Keys(), self.metrics, hosts, traces)

    def _routes(self) -> list[Route]:
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._openapi),
        ]
        folder = files("mixlm.server") / "page"
        for path, (name, kind) in _PAGE.items():
            routes.append(Route(path, _file((folder / name).read_bytes(), kind)))
        return routes

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request to its route. Raises what goes wrong, HTTPException for a path or a method there is not."""
        scope["mixlm.paths"] = self._paths
        scope["app"] = self  # with it the router raises, in place of responses of its own
        await self._router(scope, receive, send)

    @asynccontextmanager
    async def _life(self, _app: Any) -> AsyncIterator[None]:
        self.worker.start()
        yield
        self.worker.close_all("shutdown")
        await self.worker.stop()
        if self.traces is not None:
            await asyncio.to_thread(self.traces.close)

    async def _models(self, _request: Request) -> Response:
        return _json({"object": "list", "data": [one.as_dict() for one in self.registry]})

    async def _model(self, request: Request) -> Response:
        return _json(self.registry.find(request.path_params["name"]).as_dict())

    async def _chat(self, request: Request) -> ASGIApp:
        body = await self._prepared(read(ChatBody, await self._body(request)))
        return self._exchange(request, chat(body, self.registry, self.limits))

    async def _completion(self, request: Request) -> ASGIApp:
        body = await self._prepared(read(CompletionBody, await self._body(request)))
        return self._exchange(request, completion(body, self.registry, self.limits))

    async def _prepared(self, body: B) -> B:
        """Make the unit and read the schema that a request asks for; other requests do not wait for it."""
        unit = body.mixlm.unit if body.mixlm is not None else None
        served = self.registry.find(body.model)
        if not served.has_unit(unit):
            await asyncio.to_thread(served.in_unit, unit)
        if body.schema_of_reply is not None:
            await asyncio.to_thread(served.ensemble.grammars.of, body.schema_of_reply)
        return body

    def _exchange(self, request: Request, asked: Asked) -> ASGIApp:
        return Exchange(asked, self.worker, self.metrics, self.limits, request.scope["mixlm.note"])

    async def _health(self, _request: Request) -> Response:
        alive = self.worker.alive
        return _json({"status": "ok" if alive else "the models have stopped"}, 200 if alive else 503)

    async def _ready(self, _request: Request) -> Response:
        ready = self.worker.alive and not self.worker.draining
        return _json({"status": "ready" if ready else "stopping"}, 200 if ready else 503)

    async def _metrics(self, _request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": TEXT})

    async def _openapi(self, _request: Request) -> Response:
        return Response(self._description, media_type="application/json")

    async def _body(self, request: Request) -> bytes:
        """Read a body of JSON. Raises ApiError for another type, for too much, and for one that does not come."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Also what keeps pages of other origins out: a browser sends JSON across origins only where it is allowed.
            raise ApiError(415, "the body must be JSON: send Content-Type: application/json", code="unsupported_type")
        most = self.limits.body
        too_large = ApiError(413, f"the body has more than {most} bytes", code="body_too_large")
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > most:
            raise too_large
        data = bytearray()
        try:
            async with asyncio.timeout(self.limits.read):
                async for part in request.stream():
                    data += part
                    if len(data) > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self.limits.read:g} s", code="body_too_slow") from None
        except ClientDisconnect:
            raise ApiError(400, "the client went away", code="gone") from None
        return bytes(data)


def _json(value: Any, status: int = 200) -> Response:
    return Response(as_json(value), status, media_type="application/json")


def _file(data: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def serve(_request: Request) -> Response:
        return Response(data, media_type=kind, headers={"cache-control": "no-cache"})

    return serve
