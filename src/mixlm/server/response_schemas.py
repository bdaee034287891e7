"""The JSON bodies of responses, as types from which the OpenAPI document is generated."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from mixlm.server.chat_schemas import CalledFunction
from mixlm.types import MemberUsage

OpenAIFinishReason = Literal["stop", "length", "tool_calls"]


class ErrorDetail(TypedDict):
    """The details of an error. param: the field at fault. code: for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    """The body of every error response."""

    error: ErrorDetail


class EnsembleUsage(TypedDict):
    """The work of a request. members: by name. drafted and accepted: numbers of draft tokens; checked: as drafted."""

    members: dict[str, MemberUsage]
    drafted: int
    checked: int
    accepted: int


class CompletionUsage(TypedDict):
    """Numbers of tokens. Those of a prompt are counted by the member that has the most.

    prompt_tokens_details: cached_tokens, of prompts, that were found in a prefix cache.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    mixlm: EnsembleUsage


class ChoiceExtras(TypedDict):
    """mixlm's part of a choice.

    members: which member sampled each token. forwards: in a stream, each member's forward passes since the previous
    chunk. seed: reproduces this completion; in a stream, in the last chunk.
    """

    members: list[str]
    forwards: NotRequired[dict[str, int]]
    seed: NotRequired[int]


class LikelyToken(TypedDict):
    """One of the most likely tokens at a position. End-of-text has no bytes."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(LikelyToken):
    """A sampled token, with its natural log-probability under the distribution it was sampled from."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(TypedDict):
    """Log-probabilities of a chat completion."""

    content: list[TokenLogprob]
    refusal: None


class TextLogprobs(TypedDict):
    """Log-probabilities of a text completion.

    text_offset: the number of characters before each token. top_logprobs: the most likely tokens at each position, and
    the sampled one. A prompt's first token has none if a member has no token that begins a text.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class MessageCall(TypedDict):
    """A call in a message."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class FunctionDelta(TypedDict):
    """A part of a call's arguments. name: in the first part."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """What a chunk adds to a call. index: of the call in its message. id, type: in the first part."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class AssistantMessage(TypedDict):
    """A chat completion as a message. content: null in front of calls alone."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[MessageCall]]


class _Choice(TypedDict):
    index: int
    mixlm: ChoiceExtras


class ChatChoice(_Choice):
    """One chat completion."""

    message: AssistantMessage
    finish_reason: OpenAIFinishReason
    logprobs: ChatLogprobs | None


class TextChoice(_Choice):
    """One text completion, or what an event adds to it."""

    text: str
    finish_reason: OpenAIFinishReason | None
    logprobs: TextLogprobs | None


class Delta(TypedDict):
    """What a chunk adds to a message."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChunkChoice(_Choice):
    """What a chunk adds to one chat completion."""

    delta: Delta
    finish_reason: OpenAIFinishReason | None
    logprobs: ChatLogprobs | None


class _Completion(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(_Completion):
    """The response of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: CompletionUsage


class ChatChunk(_Completion):
    """One event of a streamed /v1/chat/completions."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: NotRequired[CompletionUsage | None]


class TextCompletion(_Completion):
    """The response of /v1/completions, and each event of a streamed one."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: NotRequired[CompletionUsage | None]


class ModelMember(TypedDict):
    """A member of a served ensemble."""

    name: str
    weight: float
    context_length: int


class RuleParameter(TypedDict):
    """A parameter of a combination rule. choices: its values; a number has none."""

    default: float | str
    choices: list[str]


class ModelDetail(TypedDict):
    """The members and the defaults of an ensemble.

    methods: those of its unit. units, rules: those that a request may select, with the methods of each.
    rule_parameters: of the rules that have some. routed: whether a router gives the weights; those of a request replace
    it.
    """

    members: list[ModelMember]
    unit: str
    method: str
    methods: list[str]
    units: dict[str, list[str]]
    rule: str
    rules: dict[str, list[str]]
    rule_parameters: dict[str, dict[str, RuleParameter]]
    routed: bool
    temperature: float
    top_k: int
    max_tokens: int


class Model(TypedDict):
    """A served ensemble."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    mixlm: ModelDetail


class ModelList(TypedDict):
    """The response of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Health(TypedDict):
    """The response of /health and /ready."""

    status: str


class Response(TypedDict):
    """The response of /v1/responses; items and settings as OpenAI's API has them."""

    id: str
    object: Literal["response"]
    created_at: float
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


class Deleted(TypedDict):
    """The response of DELETE /v1/responses/ID."""

    id: str
    object: Literal["response"]
    deleted: bool


class MessageResponse(TypedDict):
    """The response of /v1/messages; blocks of text and of calls."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: dict[str, Any]


class MessagesError(TypedDict):
    """The body of an error response of /v1/messages. error: its type, message and param."""

    type: Literal["error"]
    error: dict[str, str | None]
