"""The API as an OpenAPI 3.1 document, generated from the schemas of requests and responses."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from mixlm.server import response_schemas as responses
from mixlm.server.chat_schemas import ChatBody
from mixlm.server.limits import ServerLimits
from mixlm.server.protocols.messages_body import MessagesBody
from mixlm.server.protocols.responses_body import ResponsesBody
from mixlm.server.request_schemas import CompletionBody
from mixlm.version import __version__

_REFERENCE = "#/components/schemas/{model}"
_SCHEMAS: tuple[type, ...] = (
    *(ChatBody, CompletionBody, ResponsesBody, MessagesBody),
    *(responses.ChatCompletion, responses.ChatChunk, responses.TextCompletion),
    *(responses.Response, responses.Deleted, responses.MessageResponse, responses.MessagesError),
    *(responses.ModelList, responses.Model, responses.Health, responses.Error),
)
_EVENTS = {"ChatCompletion": "ChatChunk", "TextCompletion": "TextCompletion"}
_COMMON_ERRORS = {"401": "The API key is missing or unknown.", "403": "The Host header is not this server's."}
_STORED_ERRORS = {**_COMMON_ERRORS, "404": "There is no such response."}
_COMPLETION_ERRORS = {
    "400": "A field is unknown, out of range or unsupported; the error names it.",
    **_COMMON_ERRORS,
    "404": "There is no such model.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "The queue is full; Retry-After says when to retry.",
    "500": "An unexpected error.",
    "503": "The server is stopping, or out of memory.",
    "504": "The request took too long.",
}


def openapi_document(limits: ServerLimits) -> dict[str, Any]:
    """Return the document as a JSON object."""
    adapters: list[Any] = [(schema, "validation", TypeAdapter(schema)) for schema in _SCHEMAS]
    schemas = TypeAdapter.json_schemas(adapters, ref_template=_REFERENCE)[1]["$defs"]
    paths = {
        "/v1/models": {"get": _get("List the models.", "ModelList", _COMMON_ERRORS)},
        "/v1/models/{name}": {
            **_in_path("name"),
            "get": _get("Describe a model.", "Model", {**_COMMON_ERRORS, "404": "There is no such model."}),
        },
        "/v1/chat/completions": {"post": _post("Answer a conversation.", "ChatBody", "ChatCompletion")},
        "/v1/completions": {"post": _post("Continue a text.", "CompletionBody", "TextCompletion")},
        "/v1/responses": {"post": _post("Answer a conversation, in OpenAI's newer form.", "ResponsesBody", "Response")},
        "/v1/responses/{id}": {
            **_in_path("id"),
            "get": _get("Get a stored response.", "Response", _STORED_ERRORS),
            "delete": _get("Forget a response.", "Deleted", _STORED_ERRORS),
        },
        "/v1/messages": {
            "post": _post("Answer, in Anthropic's form.", "MessagesBody", "MessageResponse", "MessagesError")
        },
        "/health": {"get": _get("Whether the server is alive.", "Health", {"503": "It is not."}, error="Health")},
        "/ready": {"get": _get("Whether it accepts requests.", "Health", {"503": "It does not."}, error="Health")},
    }
    limits_text = f"Bodies have at most {limits.max_body_bytes} bytes, prompts {limits.max_prompt_chars} characters."
    return {
        "openapi": "3.1.0",
        "info": {"title": "mixlm", "version": __version__, "description": limits_text},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _in_path(name: str) -> dict[str, Any]:
    return {"parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]}


def _get(summary: str, schema: str, errors: dict[str, str], *, error: str = "Error") -> dict[str, Any]:
    responses = {status: _response(description, error) for status, description in errors.items()}
    return {"summary": summary, "responses": {"200": _response("Success.", schema), **responses}}


def _post(summary: str, body: str, schema: str, error: str = "Error") -> dict[str, Any]:
    operation = _get(summary, schema, _COMPLETION_ERRORS, error=error)
    success = operation["responses"]["200"]
    success["description"] = "The completions; with stream, as server-sent events."
    events: dict[str, Any] = {"type": "string"}
    if schema in _EVENTS:
        events |= {"description": "Each event's data is of contentSchema; the last one's is [DONE]."}
        events |= {"contentMediaType": "text/event-stream", "contentSchema": _reference(_EVENTS[schema])}
    success["content"]["text/event-stream"] = {"schema": events}
    operation["requestBody"] = {"required": True, "content": _content(body)}
    return operation


def _response(description: str, schema: str) -> dict[str, Any]:
    return {"description": description, "content": _content(schema)}


def _content(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": _reference(schema)}}


def _reference(schema: str) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=schema)}
