"""The body of a request to /v1/chat/completions: messages, tools, and what goes to chat templates."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from mixlm.generation.prompt import IGNORED_MESSAGE_FIELDS
from mixlm.server.api_errors import unsupported_field
from mixlm.server.request_schemas import NEUTRAL_FIELDS, CommonFields, Neutral, Short, StrictBody, Word, with_content
from mixlm.types import Message, Tool, ToolCall

MAX_TOOLS = 128
ToolName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]
_Description = Annotated[str, StringConstraints(max_length=20_000)]


class TextPart(StrictBody):
    """A part of a message."""

    ignored = ("annotations", "cache_control")

    type: Literal["text"]
    text: str


def joined_text(content: str | list[Any]) -> str:
    """Return a content, which may have parts, as one text."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class CalledFunction(StrictBody):
    """A call: the name of a function, and its arguments as JSON."""

    name: ToolName
    arguments: str


class CallPart(StrictBody):
    """A call in a message of the assistant."""

    id: Short
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(StrictBody):
    """One turn of a conversation. `developer` is another name for `system`; an assistant's content may be null."""

    ignored = IGNORED_MESSAGE_FIELDS

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1000, fail_fast=True)]
    tool_calls: Annotated[list[CallPart], Field(max_length=1000, fail_fast=True)] | None = None
    tool_call_id: Short | None = None

    @model_validator(mode="before")
    @classmethod
    def _remove_empty(cls, fields: Any) -> Any:
        """Remove what libraries leave empty when they send back a message."""
        if not isinstance(fields, dict):
            return fields
        empty = ("refusal", "audio", "function_call", "tool_calls")
        return with_content({key: value for key, value in fields.items() if not (key in empty and value in (None, []))})

    @model_validator(mode="after")
    def _check_role(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are the assistant's")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise ValueError("tool_call_id goes with the role tool, and says which call has this result")
        return self

    def message(self) -> Message:
        """Return it as the ensemble takes it."""
        calls = tuple(ToolCall(call.function.name, call.function.arguments, call.id) for call in self.tool_calls or ())
        role = "system" if self.role == "developer" else self.role
        return Message(role, joined_text(self.content), calls, self.tool_call_id or "")


class FunctionBody(StrictBody):
    """A function that can be called. strict has no effect: arguments always match the schema."""

    name: ToolName
    description: _Description | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(StrictBody):
    """A tool: a function."""

    ignored = ("cache_control",)

    type: Literal["function"]
    function: FunctionBody

    def tool(self) -> Tool:
        """Return it as the ensemble takes it."""
        return Tool(self.function.name, self.function.description or "", self.function.parameters or {})


class NamedFunction(StrictBody):
    """The name of a function."""

    name: ToolName


class NamedTool(StrictBody):
    """The one function to call."""

    type: Literal["function"]
    function: NamedFunction


class AllowedFunctions(StrictBody):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedTools(StrictBody):
    """The functions that may be called; prompts have no others."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions


ToolChoice = Annotated[NamedTool | AllowedTools, Field(discriminator="type")]


class ChatBody(CommonFields):
    """A request to /v1/chat/completions."""

    neutral: ClassVar[Neutral] = {
        **NEUTRAL_FIELDS,
        "functions": (([],), "it is the older form of tools; use that"),
        "function_call": (("none",), "it is the older form of tool_choice; use that"),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31, description="Another name for max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="How many; goes with logprobs.")
    tools: Annotated[list[ToolBody], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="Whether several calls are possible.")
    reasoning_effort: Word | None = Field(
        default=None, description="For the members' chat templates; refused if none takes it."
    )
    verbosity: Word | None = Field(
        default=None, description="For the members' chat templates; refused if none takes it."
    )
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] | None = Field(
        default=None, description="Further variables of chat templates; each member gets those that its own takes."
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="Whether the prompt ends where a response begins."
    )
    continue_final_message: bool | None = Field(default=None, description="Whether the last message is continued.")

    @model_validator(mode="after")
    def _check_together(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise unsupported_field("top_logprobs", "it goes with logprobs: true")
        if self.continue_final_message and self.add_generation_prompt:
            raise unsupported_field("continue_final_message", "add_generation_prompt is true; leave one out")
        return self

    @property
    def choice(self) -> tuple[str, list[str] | None]:
        """What `tool_choice` asks for, a word or the name of a function, and the functions that it lists, if any."""
        match self.tool_choice:
            case NamedTool() as named:
                return named.function.name, None
            case AllowedTools(allowed_tools=allowed):
                return allowed.mode, [tool.function.name for tool in allowed.tools]
            case word:
                return word or "auto", None
