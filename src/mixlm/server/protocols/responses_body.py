"""The body of a request to /v1/responses, and the chat completion that it asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from mixlm.generation.prompt import IGNORED_MESSAGE_FIELDS
from mixlm.server.api_errors import unsupported_field
from mixlm.server.chat_schemas import MAX_TOOLS, FunctionBody, NamedFunction, ToolName, joined_text
from mixlm.server.request_schemas import (
    IGNORED_FIELDS,
    Extras,
    FewFields,
    JsonObject,
    PlainText,
    Schema,
    Short,
    StreamOptions,
    StrictBody,
    Word,
    with_content,
)

_ONE_TEXT = "an ensemble generates text and calls of functions, and nothing else"
_LOGPROBS = "message.output_text.logprobs"


class _Item(StrictBody):
    """An item of the input. What the API itself put into it is ignored."""

    ignored: ClassVar[tuple[str, ...]] = ("id", "status", "phase", "annotations", "namespace", "created_by")


class InputPart(_Item):
    """A part of a message."""

    ignored = ("annotations", "logprobs", "cache_control")

    type: Literal["input_text", "output_text", "text", "summary_text"]
    text: str


class MessageItem(_Item):
    """A message."""

    ignored = (*_Item.ignored, *IGNORED_MESSAGE_FIELDS)

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputPart], Field(max_length=1000, fail_fast=True)]

    _empty_content = model_validator(mode="before")(with_content)


class CallItem(_Item):
    """A call of a function."""

    type: Literal["function_call"]
    call_id: Short
    name: ToolName
    arguments: str


class CallOutputItem(_Item):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: Short
    output: str | Annotated[list[InputPart], Field(max_length=1000, fail_fast=True)]


class ReasoningItem(_Item):
    """Earlier reasoning; it has no effect."""

    ignored = (*_Item.ignored, "summary", "content", "encrypted_content")

    type: Literal["reasoning"]


def _item_type(item: Any) -> str | None:
    """Return the type of an item; one without is a message."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return kind or "message" if isinstance(kind, str | None) else None


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(
        _item_type,
        custom_error_type="item",
        custom_error_message="type must be one of message, function_call, function_call_output, reasoning",
    ),
]


class FunctionTool(FunctionBody):
    """A function that can be called."""

    type: Literal["function"]


class NamedFunctionTool(NamedFunction):
    """The one function to call."""

    type: Literal["function"]


class AllowedFunctionTools(StrictBody):
    """The functions that may be called; prompts have no others."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunctionTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


_ToolChoice = Annotated[NamedFunctionTool | AllowedFunctionTools, Field(discriminator="type")]


class SchemaFormat(Schema):
    """Text that is JSON of a schema."""

    type: Literal["json_schema"]


class TextSettings(StrictBody):
    """What the text is."""

    format: Annotated[PlainText | JsonObject | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Word | None = None


class ReasoningSettings(StrictBody):
    """For the members' chat templates; effort is refused if none takes it."""

    ignored = ("summary", "generate_summary")

    effort: Word | None = None


class ResponsesBody(StrictBody):
    """A request to /v1/responses."""

    neutral = {  # noqa: RUF012 - a class variable of StrictBody
        "background": ((False,), "responses are generated while the request waits"),
        "conversation": ((), "use previous_response_id"),
        "context_management": (([],), "the context is not shortened"),
        "max_tool_calls": ((), "it is for built-in tools, and there are none"),
        "modalities": ((["text"],), _ONE_TEXT),
        "moderation": ((), "nothing is moderated"),
        "prompt": ((), "prompts are not stored here"),
        "truncation": (("disabled",), "an input that is too long is refused"),
    }
    ignored = (*(name for name in IGNORED_FIELDS if name not in ("metadata", "store")), "prompt_cache_options")

    model: Short | None = Field(default=None, description="The name of a served ensemble.")
    input: str | Annotated[list[InputItem], Field(max_length=10_000, fail_fast=True)] = Field(default_factory=list)
    instructions: str | None = Field(default=None, description="A system message in front of the conversation.")
    previous_response_id: Short | None = Field(default=None, description="The response that this conversation goes on.")
    max_output_tokens: int | None = Field(default=None, ge=1, le=2**31)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    include: Annotated[list[Short], Field(max_length=32)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = Field(default=None, description="Whether the response can be continued; true by default.")
    metadata: Annotated[dict[str, str], Field(max_length=64), FewFields] | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | _ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64, description="The same seed gives the same text.")
    mixlm: Extras | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_builtin_tools(cls, fields: Any) -> Any:
        """Name the tools that only OpenAI's servers have."""
        tools = fields.get("tools") if isinstance(fields, dict) else None
        for i, tool in enumerate(tools if isinstance(tools, list) else ()):
            if isinstance(tool, dict) and isinstance(tool.get("type"), str) and tool["type"] != "function":
                raise unsupported_field(f"tools.{i}", f"{tool['type'][:40]} is a built-in tool, and there are none")
        return fields

    @model_validator(mode="after")
    def _check_include(self) -> ResponsesBody:
        for name in self.include or ():
            if name not in (_LOGPROBS, "reasoning.encrypted_content"):
                raise unsupported_field("include", f"there is no {name[:60]}")
        return self

    def messages(self) -> list[dict[str, Any]]:
        """Return the input as messages of a chat completion, without the instructions."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        messages: list[dict[str, Any]] = []
        for item in self.input:
            match item:
                case MessageItem():
                    messages.append({"role": item.role, "content": joined_text(item.content)})
                case CallItem():
                    if not messages or messages[-1]["role"] != "assistant":
                        messages.append({"role": "assistant", "content": None})
                    messages[-1].setdefault("tool_calls", []).append(call_dict(item.call_id, item.name, item.arguments))
                case CallOutputItem():
                    messages.append({"role": "tool", "tool_call_id": item.call_id, "content": joined_text(item.output)})
        return messages

    def chat_fields(self, earlier: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the body of a chat completion. earlier: messages of the conversation that goes on."""
        system = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, *earlier, *self.messages()],
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": True if self.top_logprobs or _LOGPROBS in (self.include or ()) else None,
            "top_logprobs": self.top_logprobs,
            "reasoning_effort": self.reasoning and self.reasoning.effort,
            "verbosity": self.text and self.text.verbosity,
            **{
                name: getattr(self, name)
                for name in ("temperature", "top_p", "stream", "parallel_tool_calls", "seed", "mixlm")
            },
        }
        if self.tools:
            fields["tools"] = [{"type": "function", "function": tool} for tool in self.tools]
        match self.tool_choice:
            case NamedFunctionTool() as tool:
                fields["tool_choice"] = {"type": "function", "function": tool}
            case AllowedFunctionTools() as allowed:
                tools = [{"type": "function", "function": tool} for tool in allowed.tools]
                fields["tool_choice"] = {"type": allowed.type, "allowed_tools": {"mode": allowed.mode, "tools": tools}}
            case word:
                fields["tool_choice"] = word
        match self.text and self.text.format:
            case SchemaFormat() as schema:
                fields["response_format"] = {"type": "json_schema", "json_schema": schema}
            case JsonObject() as json_object:
                fields["response_format"] = json_object
        return fields


def call_dict(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """Return a call as a message of a chat completion has it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
