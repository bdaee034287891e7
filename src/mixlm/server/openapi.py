"""The API in the form of OpenAPI 3.1, made from the types that the code itself uses."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from mixlm.server import response_schemas as shapes
from mixlm.server.fields import ChatBody, CompletionBody
from mixlm.server.limits import Limits
from mixlm.version import __version__

_REFERENCE = "#/components/schemas/{model}"
_ALWAYS = {"401": "No API key, or one that is not known.", "403": "A host name that is not this server's."}
_ASKING = {
    "400": "A field that is unknown, out of range, or that cannot be honoured; it is named.",
    **_ALWAYS,
    "404": "No such model.",
    "408": "The body did not come in time.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "The queue is full; Retry-After says when to come again.",
    "500": "Something failed that should not.",
    "503": "The server is about to stop, or has no memory left.",
    "504": "The reply took too long.",
}


def description(limits: Limits) -> dict[str, Any]:
    """Return the description as a JSON object."""
    responses = [shapes.ChatCompletion, shapes.TextCompletion, shapes.ModelList, shapes.Model, shapes.Error]
    responses += [shapes.ChatChunk, shapes.Health]
    schemas = _requests()
    names = {}
    for one in responses:
        schema = TypeAdapter(one).json_schema(ref_template=_REFERENCE)
        schemas |= schema.pop("$defs", {})
        names[one.__name__] = schemas[one.__name__] = schema
    paths = {
        "/v1/models": {"get": _get("The served ensembles.", "ModelList", _ALWAYS)},
        "/v1/models/{name}": {
            "get": {
                "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}],
                **_get("One served ensemble.", "Model", {**_ALWAYS, "404": "No such model."}),
            }
        },
        "/v1/chat/completions": {"post": _post("Reply to a conversation.", "ChatBody", "ChatCompletion")},
        "/v1/completions": {"post": _post("Continue a text.", "CompletionBody", "TextCompletion")},
        "/health": {"get": _get("Whether the process works.", "Health", {"503": "It does not."})},
        "/ready": {"get": _get("Whether requests are taken.", "Health", {"503": "They are not."})},
    }
    about = f"Bodies have at most {limits.body} bytes, and prompts {limits.prompt} characters."
    return {
        "openapi": "3.1.0",
        "info": {"title": "mixlm", "version": __version__, "description": about},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _requests() -> dict[str, Any]:
    _, found = models_json_schema(
        [(ChatBody, "validation"), (CompletionBody, "validation")],
        ref_template=_REFERENCE,
        schema_generator=GenerateJsonSchema,
    )
    schemas: dict[str, Any] = found["$defs"]
    return schemas


def _get(summary: str, name: str, others: dict[str, str]) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": _response("Found.", name), **_errors(others)}}


def _post(summary: str, body: str, name: str) -> dict[str, Any]:
    ok = _response("The reply; with stream, as server-sent events.", name)
    ok["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _reference(body)}}},
        "responses": {"200": ok, **_errors(_ASKING)},
    }


def _errors(statuses: dict[str, str]) -> dict[str, Any]:
    return {
        status: _response(text, "Health" if text in ("It does not.", "They are not.") else "Error")
        for status, text in statuses.items()
    }


def _response(text: str, name: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _reference(name)}}}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=name)}
