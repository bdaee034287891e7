"""The body of a request to /v1/messages, Anthropic's form, and the chat completion that it asks for."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from mixlm.server.chat_schemas import MAX_TOOLS, ToolName, joined_text
from mixlm.server.protocols.responses_body import call_dict
from mixlm.server.request_schemas import Extras, Short, StrictBody, with_content


class _ContentBlock(StrictBody):
    """A block of a message."""

    ignored: ClassVar[tuple[str, ...]] = ("cache_control", "citations", "caller")


class TextBlock(_ContentBlock):
    """Text."""

    type: Literal["text"]
    text: str


class ToolUseBlock(_ContentBlock):
    """A call of a function."""

    type: Literal["tool_use"]
    id: Short
    name: ToolName
    input: dict[str, Any]


class ToolResultBlock(_ContentBlock):
    """The result of a call."""

    ignored = (*_ContentBlock.ignored, "is_error")

    type: Literal["tool_result"]
    tool_use_id: Short
    content: str | Annotated[list[TextBlock], Field(max_length=1000, fail_fast=True)] = ""


class ThinkingBlock(_ContentBlock):
    """Earlier thinking; it has no effect."""

    ignored = (*_ContentBlock.ignored, "thinking", "signature", "data")

    type: Literal["thinking", "redacted_thinking"]


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock, Field(discriminator="type")]


class TurnBody(StrictBody):
    """A turn of the conversation."""

    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], Field(max_length=1000, fail_fast=True)]

    _empty_content = model_validator(mode="before")(with_content)

    @model_validator(mode="after")
    def _check_blocks(self) -> TurnBody:
        foreign = ToolResultBlock if self.role == "assistant" else ToolUseBlock
        if wrong := next((block for block in self.content if isinstance(block, foreign)), None):
            raise ValueError(f"a turn of the {self.role} has no {wrong.type}")
        return self


class CustomTool(StrictBody):
    """A function that can be called."""

    ignored = ("cache_control", "eager_input_streaming", "strict", "input_examples")

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]


class ChoiceOfTools(StrictBody):
    """Whether functions are called, and which."""

    type: Literal["auto", "any", "none", "tool"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check_name(self) -> ChoiceOfTools:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("name goes with the type tool, and with no other")
        return self


class MessagesBody(StrictBody):
    """A request to /v1/messages."""

    neutral = {  # noqa: RUF012 - a class variable of StrictBody
        "thinking": (({"type": "disabled"},), "the members do not think apart from their text"),
        "container": ((), "there are none"),
        "context_management": ((), "the context is not shortened"),
        "mcp_servers": (([],), "they are not called from here"),
    }
    ignored = ("metadata", "service_tier", "cache_control", "inference_geo")

    model: Short | None = Field(default=None, description="The name of a served ensemble.")
    messages: Annotated[list[TurnBody], Field(min_length=1, max_length=10_000, fail_fast=True)]
    max_tokens: int = Field(ge=1, le=2**31)
    system: str | Annotated[list[TextBlock], Field(max_length=1000, fail_fast=True)] | None = None
    stop_sequences: Annotated[list[Short], Field(max_length=16)] | None = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=2**31)
    top_p: float | None = Field(default=None, gt=0, le=1)
    tools: Annotated[list[CustomTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ChoiceOfTools | None = None
    mixlm: Extras | None = None

    @property
    def system_text(self) -> str | None:
        """The system message."""
        return None if self.system is None else joined_text(self.system)

    def chat_fields(self) -> dict[str, Any]:
        """Return the body of a chat completion."""
        messages: list[dict[str, Any]] = []
        if self.system_text is not None:
            messages.append({"role": "system", "content": self.system_text})
        for turn in self.messages:
            messages += _messages(turn)
        fields: dict[str, Any] = {
            "messages": messages,
            "stop": self.stop_sequences,
            **{
                name: getattr(self, name)
                for name in ("model", "max_tokens", "stream", "temperature", "top_k", "top_p", "mixlm")
            },
        }
        last = self.messages[-1]
        if last.role == "assistant" and all(isinstance(block, str | TextBlock) for block in last.content):
            fields["continue_final_message"] = True
        if self.tools:
            functions = [
                {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
                for tool in self.tools
            ]
            fields["tools"] = [{"type": "function", "function": function} for function in functions]
        if (choice := self.tool_choice) is not None:
            words = {"auto": "auto", "any": "required", "none": "none"}
            fields["tool_choice"] = words.get(choice.type) or {"type": "function", "function": {"name": choice.name}}
            fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        return fields


def _messages(turn: TurnBody) -> list[dict[str, Any]]:
    """Return a turn as messages of a chat completion: results of calls are messages of their own, in front."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    results = [
        {"role": "tool", "tool_call_id": block.tool_use_id, "content": joined_text(block.content)}
        for block in turn.content
        if isinstance(block, ToolResultBlock)
    ]
    texts = [block.text for block in turn.content if isinstance(block, TextBlock)]
    calls = [
        call_dict(block.id, block.name, json.dumps(block.input, ensure_ascii=False))
        for block in turn.content
        if isinstance(block, ToolUseBlock)
    ]
    message: dict[str, Any] = {"role": turn.role, "content": "".join(texts), **({"tool_calls": calls} if calls else {})}
    return [*results, message] if texts or calls or not results else [*results]
