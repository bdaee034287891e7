"""Error responses: a status, and the JSON body that OpenAI's clients expect."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from starlette.exceptions import HTTPException

from mixlm.core.options import OPTIONS
from mixlm.errors import MemoryLimitError, MixlmError, PromptTooLongError, TokenizerError, UsageError, did_you_mean
from mixlm.generation.dispatch import UnexpectedEngineError

_log = logging.getLogger("mixlm.server")
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
# The field of the API that sets an option, by the word with which messages about the option begin.
_FIELDS = {
    **{name: name if spec.http == "openai" else f"mixlm.{name}" for name, spec in OPTIONS.items() if spec.http},
    **{
        name: name
        for name in ("add_generation_prompt", "chat_template_kwargs", "continue_final_message", "tool_choice", "tools")
    },
    "logit_bias": "logit_bias",
    "json_schema": "response_format",
    "score_prompt": "echo",
    "weights": "mixlm.weights",
}
# What pydantic calls the branches of unions in the location of an error, beside those that are models.
_BRANCHES = {"str", "int", "float", "bool", "constrained", "list"}

# In a hint: other engines, models and servers, and what trains and scores.
_OPERATORS = re.compile(
    r"--(engine|dtype|device|graphs|prefix-cache|logprobs-mode)\b|vLLM|SGLang|llama\.cpp|mixlm (fit|score)"
    r"|^(set candidates|let its server|name a model|leave dtype)"
)

# What is a level deeper in chat completions than in the other APIs.
_FLAT = (
    (r"^(tools\.\d+|tool_choice)\.function\.", r"\1."),
    (r"^text\.format\.json_schema\.", "text.format."),
)


@dataclass(eq=False)
class ApiError(Exception):
    """An error response.

    Attributes:
        status: The HTTP status.
        message: What went wrong, for people.
        param: The field at fault, as a dotted path.
        code: What went wrong, for programs.
        headers: Additional headers of the response.
    """

    status: int
    message: str
    _: KW_ONLY
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def rename(self, names: Mapping[str, str]) -> None:
        """Call fields as another API calls them. names: by the names here; none for this API."""
        if self.param is None or not names:
            return
        name, dot, rest = self.param.partition(".")
        if self.code == "unknown_field":  # as the client wrote it
            if not dot and name in names:
                self.message = f"there is no field {name}: did you mean {names[name]!r}?"
            return
        param = names.get(name, name) + dot + rest
        for nested, flat in _FLAT:
            param = re.sub(nested, flat, param)
        for old, new in ((self.param, param), (name, names.get(name, name))):
            if re.match(rf"{re.escape(old)}\b", self.message):
                self.message = new + self.message[len(old) :]
                break
        self.param = param

    @property
    def type(self) -> str:
        """The type of the error, as OpenAI's API names it."""
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


def unsupported_field(field: str, why: str) -> ApiError:
    """Return the error for a field that cannot be honoured."""
    return ApiError(400, f"{field} cannot be honoured: {why}", param=field, code="unsupported_field")


def to_api_error(error: BaseException, request_id: str = "") -> ApiError:
    """Return the response for an error. Unexpected errors do not reveal their cause: it is logged with the request."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):  # an unknown path or method
        detail = str(error.detail).lower()
        return ApiError(error.status_code, detail, code=detail.replace(" ", "_"), headers=error.headers or {})
    if isinstance(error, UsageError | TokenizerError):
        return _client_error(error)
    if isinstance(error, MemoryLimitError):
        return ApiError(503, "the server ran out of memory for this request", code="out_of_memory")
    if isinstance(error, MixlmError) and not isinstance(unexpected := _cause(error), UnexpectedEngineError):
        return ApiError(500, error.message, code="failed")
    cause = unexpected if isinstance(error, MixlmError) else error
    _log.error("a request failed", exc_info=cause, extra={"fields": {"request": request_id}})
    return ApiError(500, "an unexpected error occurred; see the server's log", code="unexpected")


def _cause(error: BaseException) -> BaseException:
    """Return the first of mixlm's errors in a chain."""
    while isinstance(error.__cause__, MixlmError):
        error = error.__cause__
    return error


def _client_error(error: UsageError | TokenizerError) -> ApiError:
    """Return the response for a request that the ensemble refuses."""
    if isinstance(error, PromptTooLongError):
        return ApiError(400, error.message, code="context_length_exceeded")
    if isinstance(error, TokenizerError):
        # The models are loaded by now, so the text is at fault: a member has no tokens for it.
        return ApiError(400, error.message, code="no_tokens")
    option = error.message.partition(" ")[0]
    hint = _for_clients(error.hint or "")
    text = f"{error.message} ({hint})" if hint else error.message
    return ApiError(400, _in_api_terms(text), param=_FIELDS.get(option), code="invalid_value")


def validation_error(error: ValidationError, schema: type[BaseModel], others: Iterable[str]) -> ApiError:
    """Return the response for an invalid body: its first fault, with the field. others: fields beside the schema's."""
    errors = error.errors(include_url=False)
    if errors[0]["type"] == "json_invalid":
        why = errors[0]["msg"].removeprefix("Invalid JSON: ")
        return ApiError(400, f"the body is not JSON: {why}", code="invalid_json")
    # A union reports an error from each of its branches; the deepest one is the branch that was meant.
    first = max(errors, key=lambda detail: len(detail["loc"]) if detail["loc"][:1] == errors[0]["loc"][:1] else 0)
    if first["type"] == "missing":  # a field with a typing error explains it
        siblings = [detail for detail in errors if detail["loc"][:-1] == first["loc"][:-1]]
        first = next((detail for detail in siblings if detail["type"] == "extra_forbidden"), first)
    if first["type"] == "extra_forbidden":
        path, models = _resolved(first["loc"][:-1], schema)
        name = str(first["loc"][-1])  # the client's, which may be anything
        param = ".".join([*path, name])[:200]
        suggestion = _similar_field(name, schema, models, others)
        message = f"there is no field {param or repr(name)}" + (f": {suggestion}" if suggestion else "")
        return ApiError(400, message, param=param, code="unknown_field")
    path, _ = _resolved(first["loc"], schema)
    param = ".".join(path)[:200]
    messages = dict.fromkeys(
        _in_lower_case(detail["msg"]) for detail in errors if _resolved(detail["loc"], schema)[0] == path
    )
    return ApiError(400, f"{param or 'the body'}: {', or '.join(messages)}", param=param or None, code="invalid_value")


def _resolved(location: Iterable[int | str], schema: type[BaseModel]) -> tuple[list[str], list[type[BaseModel]]]:
    """Return the path of a field, without pydantic's names of the branches of unions, and the models it may have."""
    path: list[str] = []
    models = [schema]
    for part in location:
        branch = [model for model in models if part == model.__name__ or (len(models) > 1 and part in _tags(model))]
        fields = [info for model in models for name, info in _fields(model).items() if name == part]
        if branch:
            models = branch
        elif isinstance(part, int) or (re.fullmatch(r"[a-z][a-z0-9_]*|[A-Z]\w*", part) and part not in _BRANCHES):
            path.append(str(part))
        if fields and not branch:
            models = [model for info in fields for model in _models_in(info.annotation)]
    return path, models


def _similar_field(
    name: str, schema: type[BaseModel], models: Sequence[type[BaseModel]], others: Iterable[str]
) -> str | None:
    """Return a hint: the field of this name at the top or one level down, else the fields of its level like it."""
    elsewhere = [name] if name in _fields(schema) else []
    for model in models:
        for parent, info in _fields(model).items():
            children = _models_in(info.annotation, in_lists=False)
            elsewhere += [f"{parent}.{name}" for child in children if name in _fields(child)]
    if elsewhere:
        return f"did you mean {elsewhere[0]!r}?"
    known = [field_name for model in models for field_name in _fields(model)]
    return did_you_mean(name, [*known, *(others if models == [schema] else ())])


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {info.alias or name: info for name, info in model.model_fields.items()}


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    """Return the values by which a union knows this branch."""
    kind = model.model_fields.get("type")
    return () if kind is None else get_args(kind.annotation)


def _models_in(annotation: Any, *, in_lists: bool = True) -> list[type[BaseModel]]:
    """Return the models in a type, such as a union or, unless left out, a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is list and not in_lists:
        return []
    return [model for argument in get_args(annotation) for model in _models_in(argument, in_lists=in_lists)]


def _in_lower_case(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:] if message[1:2].islower() else message


def _for_clients(hint: str) -> str:
    """Return a hint without the alternatives that only the operator of the server has; empty where none is left."""
    first, *others = hint.split(", or ")
    kept = [part for part in (first, *others) if not _OPERATORS.search(part)]
    if kept and first not in kept and first.startswith("use ") and not kept[0].startswith("use "):
        kept[0] = f"use {kept[0]}"
    return ", or ".join(kept)


def _in_api_terms(text: str) -> str:
    """Return a message with the fields of the API in place of options of the command line."""
    text = re.sub(r"--(method|unit|rule|draft) ([\w-]+)", r'mixlm.\1 "\2"', text)
    text = re.sub(r"--top-k (\d+)", r"mixlm.top_k \1", text)
    text = re.sub(r"\bignore_end\b", "ignore_eos", text)
    text = re.sub(r"^score_prompt gives\b", "echo with logprobs gives", text)
    return re.sub(r"^json_schema\b", "response_format", text)
