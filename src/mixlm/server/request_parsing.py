"""From the body of a request to what the ensemble is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mixlm.config import Method, methods_of
from mixlm.ensemble import Ensemble, Prompt
from mixlm.errors import ConfigError
from mixlm.server.api_errors import ApiError, refused
from mixlm.server.fields import ChatBody, Common, CompletionBody, Extras
from mixlm.server.jobs import Task
from mixlm.server.limits import Limits
from mixlm.server.model_registry import Registry, Served
from mixlm.types import Message

_SAMPLING = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
_EXTRAS = ("top_k", "min_p", "repetition_penalty", "draft", "block", "mix_then_truncate", "logprobs_of")


@dataclass(frozen=True)
class Asked:
    """A request, checked. tasks: `n` for each prompt, in order. echo: what stands in front of each reply's text.

    logprobs: whether tokens are told with theirs, and with `alternatives` more.
    """

    kind: Literal["chat", "text"]
    served: Served
    ensemble: Ensemble
    tasks: Sequence[Task]
    n: int
    stream: bool
    include_usage: bool
    logprobs: bool
    echo: Sequence[str]

    @property
    def alternatives(self) -> int:
        """How many of the likeliest symbols are told at each place."""
        return self.tasks[0].settings.alternatives


def chat(body: ChatBody, registry: Registry, limits: Limits) -> Asked:
    """Return what a conversation asks for. Raises ApiError or MixlmError."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise ApiError(400, "max_tokens and max_completion_tokens differ", param="max_tokens", code="invalid_value")
    messages = [Message("system" if one.role == "developer" else one.role, one.text) for one in body.messages]
    _check_length(sum(len(one.content) for one in messages), "messages", limits)
    options: dict[str, Any] = {}
    if body.max_completion_tokens is not None:
        options["max_tokens"] = body.max_completion_tokens
    if any(one.role == "system" for one in messages):
        options["system"] = None  # in place of the ensemble's own
    options["alternatives"] = body.top_logprobs or 0
    return _asked(body, registry, [messages], options, logprobs=bool(body.logprobs))


def completion(body: CompletionBody, registry: Registry, limits: Limits) -> Asked:
    """Return what a text to continue asks for. Raises ApiError or MixlmError."""
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    for one in prompts:
        _check_length(len(one), "prompt", limits)
    options = {"raw": True, "system": None, "alternatives": body.logprobs or 0}
    echo = prompts if body.echo else ()
    options["score_prompt"] = bool(body.echo) and body.logprobs is not None
    return _asked(body, registry, prompts, options, logprobs=body.logprobs is not None, echo=echo)


def _asked(
    body: Common,
    registry: Registry,
    prompts: Sequence[Prompt],
    options: Mapping[str, Any],
    *,
    logprobs: bool,
    echo: Sequence[str] = (),
) -> Asked:
    served = registry.find(body.model)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options go with stream", param="stream_options", code="invalid_value")
    extras = body.mixlm or Extras()
    ensemble = served.in_unit(extras.unit)
    if extras.weights is not None:
        try:
            ensemble = ensemble.with_weights(extras.weights)
        except ConfigError as error:
            raise ApiError(400, str(error), param="mixlm.weights", code="invalid_value") from None
    settings = ensemble.settings(**_options(body, extras, ensemble, options))
    _check_method(body, extras, settings.method, ensemble.unit.name)
    n = body.n or 1
    tasks = [Task(prompt, settings.with_turn(i * n + j)) for i, prompt in enumerate(prompts) for j in range(n)]
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    kind: Literal["chat", "text"] = "chat" if isinstance(body, ChatBody) else "text"
    return Asked(kind, served, ensemble, tasks, n, bool(body.stream), include_usage, logprobs, echo)


def _options(body: Common, extras: Extras, ensemble: Ensemble, options: Mapping[str, Any]) -> Any:
    """Return a request's options over the ensemble's defaults, as `Ensemble.settings` takes them."""
    given = dict(options)
    for source, names in ((body, _SAMPLING), (extras, _EXTRAS)):
        given |= {name: value for name in names if (value := getattr(source, name)) is not None}
    if body.max_tokens is not None:
        given["max_tokens"] = body.max_tokens
    if body.stop is not None:
        given["stop"] = body.stop
    if body.seed is not None:
        given["seed"] = body.seed % 2**64  # the API allows negative ones
    if body.logit_bias or extras.logit_bias:
        # The API's keys are token ids, as digits; a text of digits has its place under mixlm.
        ids = {
            int(key) if key.isascii() and key.isdecimal() else key: value
            for key, value in (body.logit_bias or {}).items()
        }
        given["logit_bias"] = {**ids, **(extras.logit_bias or {})}
    if body.response_format is not None:
        given["json_schema"] = body.schema_of_reply
    method = extras.method
    served = ensemble.defaults.method
    if method is None and given.get("temperature") == 0 and served not in ("greedy", "single"):
        # To every client of the API, temperature 0 is how one asks for the most likely text.
        method = "greedy"
    if method is not None:
        given["method"] = method
        if method not in ("speculative", "greedy"):
            given.setdefault("draft", None)
        if method != "conventional":
            given.setdefault("mix_then_truncate", False)
    return given


def _check_method(body: Common, extras: Extras, method: Method, unit: str) -> None:
    """Raise ApiError for a method that the unit has no law for; it names the field that asked for one of the two."""
    allowed = methods_of(unit)
    if method in allowed:
        return
    by_temperature = extras.method is None and body.temperature == 0
    param = "temperature" if by_temperature else "mixlm.unit" if extras.method is None else "mixlm.method"
    asked = "temperature 0 asks for greedy, which" if by_temperature else f"the method {method}"
    raise refused(param, f"{asked} does not go with the unit {unit}; {', '.join(allowed)} do")


def _check_length(characters: int, field: str, limits: Limits) -> None:
    if characters > limits.prompt:
        raise ApiError(
            400, f"{field} has {characters} characters, and {limits.prompt} may", param=field, code="prompt_too_long"
        )
