"""From a validated request body to the generations that the ensemble runs for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mixlm.core.options import OPTIONS, GenerationOptions
from mixlm.decoding import check_unit_method
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation.prompt import Prompt, unknown_template_variables
from mixlm.server.api_errors import ApiError, to_api_error, unsupported_field
from mixlm.server.chat_schemas import ChatBody
from mixlm.server.json_encoding import to_json
from mixlm.server.limits import ServerLimits
from mixlm.server.model_registry import ServedModel
from mixlm.server.request_schemas import EXTRA_OPTIONS, CommonFields, CompletionBody, Extras
from mixlm.tokenization.tool_calls import tool_dict

# Fields that are options of `Ensemble.generate` under the same name; method and logit_bias are treated below.
_OPTIONS = tuple(name for name in CommonFields.model_fields if name in OPTIONS and name != "logit_bias")
_EXTRA_OPTIONS = tuple(name for name in EXTRA_OPTIONS if name not in ("method", "logit_bias"))


@dataclass(frozen=True)
class ParsedRequest:
    """A checked request: `n` completions of each prompt, numbered prompt by prompt.

    Attributes:
        ensemble: The model's ensemble, in the unit and with the weights of the request.
        settings: The options of every completion.
        include_usage: Whether a stream ends with the usage.
        logprobs: Whether tokens are returned with their log-probabilities.
        echo: Whether the prompts are repeated in front of the completions.
    """

    kind: Literal["chat", "text"]
    model: ServedModel
    ensemble: Ensemble
    prompts: Sequence[Prompt]
    settings: GenerationOptions
    n: int
    stream: bool
    include_usage: bool
    logprobs: bool
    echo: bool

    @property
    def num_completions(self) -> int:
        """How many completions it asks for."""
        return len(self.prompts) * self.n

    @property
    def tool_names(self) -> list[str]:
        """The functions that a completion may call."""
        return [tool.name for tool in self.settings.callable_tools]


def parse_request(body: ChatBody | CompletionBody, model: ServedModel, limits: ServerLimits) -> ParsedRequest:
    """Return the request of a body. Raises ApiError or MixlmError."""
    is_chat = isinstance(body, ChatBody)
    prompts, options = _chat(body, model, limits) if isinstance(body, ChatBody) else _text(body, limits)
    count = len(prompts) * (body.n or 1)
    if count > limits.capacity:
        message = f"the request needs {count} completions; one request may need {limits.capacity}"
        param = "prompt" if len(prompts) > limits.capacity else "n"
        raise ApiError(400, message, param=param, code="too_many_completions")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options go with stream", param="stream_options", code="invalid_value")
    extras = body.mixlm or Extras()
    ensemble = model.with_unit(extras.unit)
    if extras.weights is not None:
        try:
            ensemble = ensemble.with_weights(extras.weights)
        except ConfigError as error:
            raise ApiError(400, to_api_error(error).message, param="mixlm.weights", code="invalid_value") from None
    settings = ensemble.settings(**_options(body, extras, ensemble, options))
    _check_unit(body, extras, settings, ensemble.unit.name)
    return ParsedRequest(
        kind="chat" if is_chat else "text",
        model=model,
        ensemble=ensemble,
        prompts=prompts,
        settings=settings,
        n=body.n or 1,
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
        logprobs=bool(body.logprobs) if is_chat else body.logprobs is not None,
        echo=isinstance(body, CompletionBody) and bool(body.echo),
    )


def _chat(body: ChatBody, model: ServedModel, limits: ServerLimits) -> tuple[Sequence[Prompt], dict[str, Any]]:
    """Return the conversation, and the options that only conversations have."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise ApiError(400, "max_tokens and max_completion_tokens differ", param="max_tokens", code="invalid_value")
    messages = [message.message() for message in body.messages]
    calls = [call.arguments for message in messages for call in message.tool_calls]
    check_length(sum(map(len, [*(message.content for message in messages), *calls])), "messages", limits)
    options: dict[str, Any] = {
        "top_logprobs": body.top_logprobs or 0,
        **_tool_options(body, limits),
        "chat_template_kwargs": _template_variables(body, model.ensemble),
        "continue_final_message": bool(body.continue_final_message),
        "add_generation_prompt": body.add_generation_prompt is not False,
    }
    if body.max_completion_tokens is not None:
        options["max_tokens"] = body.max_completion_tokens
    if any(message.role == "system" for message in messages):
        options["system"] = None  # the request's system message replaces the ensemble's
    return [messages], options


def _tool_options(body: ChatBody, limits: ServerLimits) -> dict[str, Any]:
    """Return the options of tools. Raises ApiError for a choice without its tool."""
    tools = [tool.tool() for tool in body.tools or ()]
    check_length(sum(len(to_json(tool_dict(tool))) for tool in tools), "tools", limits)
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools: two functions have one name", param="tools", code="invalid_value")
    choice, allowed = body.choice
    if choice == "required" and not tools:
        raise unsupported_field("tool_choice", "there are no tools")
    for name in allowed or [choice]:
        if name not in (*names, *(() if allowed else ("auto", "none", "required"))):
            message = f"tool_choice: there is no tool {name!r}"
            raise ApiError(400, message, param="tool_choice", code="invalid_value")
    tools = [tool for tool in tools if allowed is None or tool.name in allowed]
    options: dict[str, Any] = {"tools": tools, "tool_choice": choice if tools else "auto"}
    return {**options, "parallel_tool_calls": body.parallel_tool_calls is not False}


def _template_variables(body: ChatBody, ensemble: Ensemble) -> dict[str, Any]:
    """Return the variables of chat templates. Raises ApiError for one that no member's template takes."""
    engines = [member.engine for member in ensemble.members]
    why = "no member's chat template takes it"
    variables = dict(body.chat_template_kwargs or {})
    for name in unknown_template_variables(variables, engines):
        raise unsupported_field(f"chat_template_kwargs.{name}"[:200], why)
    for name, nothing in (("reasoning_effort", "none"), ("verbosity", "medium")):
        value = getattr(body, name)
        if value is None or (value == nothing and unknown_template_variables([name], engines)):
            continue
        if unknown_template_variables([name], engines):
            raise unsupported_field(name, why)
        if variables.setdefault(name, value) != value:
            raise unsupported_field(name, f"chat_template_kwargs.{name} has another value; leave one out")
    return variables


def _text(body: CompletionBody, limits: ServerLimits) -> tuple[Sequence[Prompt], dict[str, Any]]:
    """Return the prompts, and the options that only texts have."""
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    for prompt in prompts:
        check_length(len(prompt), "prompt", limits)
    scores = bool(body.echo) and body.logprobs is not None
    return prompts, {"raw": True, "system": None, "top_logprobs": body.logprobs or 0, "score_prompt": scores}


def _options(body: CommonFields, extras: Extras, ensemble: Ensemble, options: dict[str, Any]) -> dict[str, Any]:
    """Add to options those of every request; `Ensemble.settings` lays them over the ensemble's defaults."""
    for source, names in ((body, _OPTIONS), (extras, _EXTRA_OPTIONS)):
        options |= {name: value for name in names if (value := getattr(source, name)) is not None}
    if "stop" in options:  # an empty text ends nothing
        options["stop"] = [text for text in ([body.stop] if isinstance(body.stop, str) else body.stop or ()) if text]
    if body.ignore_eos:
        options["ignore_end"] = True
    if body.seed is not None:
        options["seed"] = body.seed % 2**64  # the API allows negative seeds
    if body.logit_bias or extras.logit_bias:
        # Keys of digits are token ids, as in OpenAI's API; under mixlm they are text.
        by_id_or_text = {
            int(key) if key.isascii() and key.isdecimal() else key: value
            for key, value in (body.logit_bias or {}).items()
        }
        options["logit_bias"] = {**by_id_or_text, **(extras.logit_bias or {})}
    if body.response_format is not None or body.guided_json is not None:
        options["json_schema"] = body.completion_schema
    method = extras.method
    if method is None and options.get("temperature") == 0 and ensemble.defaults.method not in ("greedy", "single"):
        # Clients of the API ask for the most likely text by temperature 0.
        method = "greedy"
    if method is not None:
        options["method"] = method
        if method not in ("speculative", "greedy", "layered"):
            options.setdefault("draft", None)
    return options


def _check_unit(body: CommonFields, extras: Extras, settings: GenerationOptions, unit: str) -> None:
    """Raise ApiError for a rule or a method that the unit does not support, with the field that selected it."""
    try:
        check_unit_method(settings.method, unit, settings.rule)
    except UnsupportedError as error:
        refusal = to_api_error(error)
        refusal.code = "unsupported_field"
        if refusal.param == "mixlm.rule":
            refusal.param = "mixlm.rule" if extras.unit is None else "mixlm.unit"
        elif extras.method is None and body.temperature == 0:
            message = f"temperature 0 selects the method greedy, and {refusal.message}"
            refusal = ApiError(400, message, param="temperature", code=refusal.code)
        else:
            refusal.param = "mixlm.unit" if extras.method is None else "mixlm.method"
        raise refusal from None


def check_length(characters: int, field: str, limits: ServerLimits) -> None:
    """Raise ApiError for a field with more characters than the server takes in a prompt."""
    maximum = limits.max_prompt_chars
    if characters > maximum:
        message = f"{field} has {characters} characters; the maximum is {maximum}"
        raise ApiError(400, message, param=field, code="prompt_too_long")
