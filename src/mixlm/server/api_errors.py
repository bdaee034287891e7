"""What a client is told when something is refused or fails: a status, and the body that its libraries expect."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from mixlm.errors import MemoryLimitError, MixlmError, PromptTooLongError, TokenizerError, UsageError, did_you_mean

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    504: "timeout_error",
}


# Options of a reply, and the fields that set them.
_FIELDS = {
    **{one: one for one in ("max_tokens", "seed", "temperature", "top_p", "presence_penalty", "frequency_penalty")},
    **{
        one: f"mixlm.{one}"
        for one in ("method", "top_k", "min_p", "repetition_penalty", "draft", "block", "logprobs_of")
    },
    "logit_bias": "logit_bias",
    "json_schema": "response_format",
    "score_prompt": "echo",
    "mix-then-truncate": "mixlm.mix_then_truncate",
}


class ApiError(Exception):
    """A response that is an error.

    param: the field at fault, as a path with dots. code: a word for programs. headers: sent along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """The class of error, in the words of the API."""
        return _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def refused(field: str, why: str) -> ApiError:
    """Return the refusal of a field that cannot be honoured."""
    return ApiError(400, f"{field} cannot be honoured: {why}", param=field, code="unsupported_field")


def of_error(error: BaseException) -> ApiError:
    """Return what a client is told about an error. Errors that are not mixlm's own say nothing of where they arose."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UsageError | TokenizerError):
        return _at_fault(error)
    if isinstance(error, MemoryLimitError):
        return ApiError(503, "the server ran out of memory over this reply", code="out_of_memory")
    if isinstance(error, MixlmError):
        return ApiError(500, error.message, code="failed")
    return ApiError(500, "something unexpected went wrong; the server's log has it", code="unexpected")


def _at_fault(error: UsageError | TokenizerError) -> ApiError:
    """Return what a client is told about a request that the ensemble refuses."""
    if isinstance(error, PromptTooLongError):
        return ApiError(400, error.message, code="context_length_exceeded")
    if isinstance(error, TokenizerError):
        # The models are loaded by now: it is the text that a member has no tokens for.
        return ApiError(400, error.message, code="no_tokens")
    # Messages about an option begin with its name.
    word = error.message.partition(" ")[0]
    return ApiError(400, _for_clients(str(error)), param=_FIELDS.get(word), code="invalid_value")


def of_validation(error: ValidationError, known: Mapping[str, Any]) -> ApiError:
    """Return what a client is told about a body that does not fit: the first complaint, with the field it is about.

    known: the fields there are, at the top.
    """
    errors = error.errors(include_url=False)
    if errors[0]["type"] == "json_invalid":
        why = errors[0]["msg"].removeprefix("Invalid JSON: ")
        return ApiError(400, f"the body is not JSON: {why}", code="invalid_json")
    # A value that may have several forms has complaints from each; the one that got furthest meant that form.
    first = max(errors, key=lambda one: len(one["loc"]) if one["loc"][:1] == errors[0]["loc"][:1] else 0)
    place = _place(first["loc"])
    if first["type"] == "extra_forbidden":
        close = did_you_mean(str(first["loc"][-1]), known)
        return ApiError(
            400, f"there is no field {place}" + (f": {close}" if close else ""), param=place, code="unknown_field"
        )
    messages = dict.fromkeys(_lower(one["msg"]) for one in errors if _place(one["loc"]) == place)
    return ApiError(400, f"{place or 'the body'}: {', or '.join(messages)}", param=place or None, code="invalid_value")


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:].removeprefix("alue error, ")


def _place(parts: tuple[int | str, ...]) -> str:
    """Return where in a body something is. The names that pydantic gives to the branches of a union are left out."""
    kept = [str(one) for one in parts if isinstance(one, int) or re.fullmatch(r"[a-z][a-z0-9_]*|[A-Z]\w*", one)]
    branches = {"str", "int", "float", "bool", "TextPart", "constrained", "list", "json_object"}
    named = [one for one in kept if one not in branches]
    # The branch of a schema is called as the field in it.
    return ".".join(one for at, one in enumerate(named) if named[at - 1 : at] != [one])[:200]


def _for_clients(text: str) -> str:
    """Return a message with the options of the command line as the fields that they are in a request.

    What only whoever runs the server can choose is left out.
    """
    text = re.sub(r",? or --engine hf \(engine='hf'\)", "", text)
    text = re.sub(r"--(method|unit) (\w+)", r'mixlm.\1 "\2"', text)
    return re.sub(r"^json_schema\b", "response_format", text)
