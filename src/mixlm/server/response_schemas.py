"""The bodies of responses, as types: what the code builds, and what the description of the API is made from."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

FinishReason = Literal["stop", "length"]


class ErrorDetail(TypedDict):
    """What went wrong. param: the field at fault. code: a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    """Any response that is an error."""

    error: ErrorDetail


class MemberWork(TypedDict):
    """What one member did: tokens written, forward passes, tokens run through them, seconds in them.

    dropped: symbols that were written without it, since it did not answer.
    """

    prompt_tokens: int
    tokens: int
    forwards: int
    forward_tokens: int
    forward_seconds: float
    dropped: int


class Work(TypedDict):
    """Figures of a whole request. members: by name. checked and accepted: guesses of what comes next."""

    members: dict[str, MemberWork]
    checked: int
    accepted: int


class Usage(TypedDict):
    """Tokens. Those of a prompt are counted by the member that has the most."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    mixlm: Work


class Wrote(TypedDict):
    """Who wrote each token. seed: what gives this reply again; at its end.

    forwards: in a stream, how often each member ran since the chunk before, of those that did.
    """

    members: list[str]
    forwards: NotRequired[dict[str, int]]
    seed: NotRequired[int]


class TopLogprob(TypedDict):
    """A token that could have come, or that came, among the likeliest; end-of-text has no bytes."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TypedDict):
    """A token: its text, its natural log-probability under the law it was drawn from, its bytes."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Log-probabilities of a chat reply."""

    content: list[TokenLogprob]
    refusal: None


class TextLogprobs(TypedDict):
    """Log-probabilities of a continuation. text_offset: characters before each token.

    top_logprobs: the likeliest tokens at each place, and the one that is there. Of a prompt's first token there is
    nothing to say where a member has no token that begins a text.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class ChatMessage(TypedDict):
    """A reply as a message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One reply."""

    index: int
    message: ChatMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None
    mixlm: Wrote


class TextChoice(TypedDict):
    """One continuation."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: TextLogprobs | None
    mixlm: Wrote


class Delta(TypedDict):
    """What a chunk adds to a message."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChunkChoice(TypedDict):
    """What a chunk adds to one reply."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None
    mixlm: Wrote


class ChatCompletion(TypedDict):
    """The response of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(TypedDict):
    """One event of a streamed /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]


class TextCompletion(TypedDict):
    """The response of /v1/completions, and each event of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]


class ModelMember(TypedDict):
    """A member of a served ensemble."""

    name: str
    weight: float
    context_length: int


class ModelDetail(TypedDict):
    """What an ensemble is made of, and what holds where a request says nothing.

    methods: those of its unit. units: those that a request may ask for, with the methods of each.
    """

    members: list[ModelMember]
    unit: str
    method: str
    methods: list[str]
    units: dict[str, list[str]]
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
