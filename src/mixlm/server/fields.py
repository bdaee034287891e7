"""The bodies of requests: which fields there are, and which values they take. Anything else is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from mixlm.config import LogprobsOf, Method, UnitName
from mixlm.server.api_errors import unsupported_field, validation_error

# Below this a temperature divides logits beyond what float32 holds; 0 stands for the most likely token.
_COLDEST = 1e-3

_ONE_TEXT = "an ensemble writes text, and nothing else"
# Fields of the API that have no meaning here, the values under which they ask for nothing, and why others are refused.
_NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), _ONE_TEXT),
    "best_of": ((1,), "replies are not ranked; ask for n and choose"),
    "function_call": (("none",), _ONE_TEXT),
    "functions": (([],), _ONE_TEXT),
    "metadata": (({},), "nothing is stored"),
    "modalities": ((["text"],), _ONE_TEXT),
    "moderation": ((), "nothing is moderated"),
    "parallel_tool_calls": ((True, False), _ONE_TEXT),
    "prediction": ((), "use mixlm.draft for guesses of what comes next"),
    "prompt_cache_key": ((), "prompts are not kept between requests"),
    "prompt_cache_retention": ((), "prompts are not kept between requests"),
    "reasoning_effort": (("none",), "the members are not told how to reason"),
    "service_tier": (("auto", "default"), "there is one kind of service"),
    "store": ((False,), "nothing is stored"),
    "suffix": (("",), "members continue a text, and do not fill gaps"),
    "tool_choice": (("none",), _ONE_TEXT),
    "tools": (([],), _ONE_TEXT),
    "verbosity": ((), "the members are not told how long to write"),
    "web_search_options": ((), _ONE_TEXT),
}

B = TypeVar("B", bound="Common")
Short = Annotated[str, StringConstraints(max_length=512)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[dict[Annotated[str, StringConstraints(min_length=1, max_length=512)], Bias], Field(max_length=1024)]
Weight = Annotated[float, Field(ge=0, le=1e6)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Extras(_Body):
    """What mixlm adds to the API, under `mixlm`. Left out, the served ensemble's own settings hold."""

    method: Method | None = Field(default=None, description="How the members write together.")
    unit: UnitName | None = Field(default=None, description="What the members meet in; in place of the ensemble's own.")
    weights: Annotated[list[Weight], Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="One a member, any positive scale, in place of the ensemble's weights or router."
    )
    top_k: int | None = Field(
        default=None, ge=0, le=2**31, description="Keep each member's k most likely tokens; 0 is off."
    )
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    mix_then_truncate: bool | None = Field(default=None, description="Truncate the average; conventional only.")
    logprobs_of: LogprobsOf | None = Field(
        default=None,
        description="Whose log-probabilities: the drawn member's, or the ensemble's, for a forward of every member.",
    )
    logit_bias: Biases | None = Field(default=None, description="By a token's text, digits too.")
    draft: Short | None = Field(default=None, description="What writes ahead: a member's name, or lookup.")
    block: int | None = Field(default=None, ge=1, le=64, description="Guesses checked at once.")


class StreamOptions(_Body):
    """Options of a streamed response."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class PlainText(_Body):
    """A reply of any text."""

    type: Literal["text"]


class JsonObject(_Body):
    """A reply that is an object of JSON."""

    type: Literal["json_object"]


class Schema(_Body):
    """A JSON schema. name, description and strict have no effect: replies are always held to it."""

    name: Short
    of: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    description: Annotated[str, StringConstraints(max_length=10_000)] | None = None


class JsonSchema(_Body):
    """A reply that is JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: Schema


class Common(_Body):
    """Fields that both ways to ask have."""

    neutral: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = _NEUTRAL

    model: Short | None = Field(
        default=None, description="The name of a served ensemble; may be left out where there is one."
    )
    logit_bias: Biases | None = Field(
        default=None, description="By a token's text; keys of digits are token ids, for members of one vocabulary."
    )
    n: int | None = Field(default=None, ge=1, le=128, description="Replies to each prompt.")
    max_tokens: int | None = Field(default=None, ge=1, le=2**31)
    temperature: float | None = Field(default=None, ge=0, le=100, description="0 asks for method greedy.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-100, le=100)
    frequency_penalty: float | None = Field(default=None, ge=-100, le=100)
    response_format: Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64, description="The same seed gives the same text.")
    stop: Short | Annotated[list[Short], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=512)] | None = Field(default=None, description="Has no effect.")
    mixlm: Extras | None = None

    @property
    def schema_of_reply(self) -> Mapping[str, Any] | None:
        """The JSON schema that the reply is held to, if it is."""
        if isinstance(self.response_format, JsonSchema):
            return self.response_format.json_schema.of
        return {"type": "object"} if isinstance(self.response_format, JsonObject) else None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        """Take out fields that ask for nothing, and refuse those that ask for what cannot be had."""
        if not isinstance(given, dict):
            return given
        for name in given.keys() & cls.neutral.keys():
            allowed, why = cls.neutral[name]
            # Equal values of another type, as 1 and True are, ask for something else.
            if given[name] is not None and (type(given[name]), given[name]) not in [
                (type(one), one) for one in allowed
            ]:
                raise unsupported_field(name, why)
        return {name: value for name, value in given.items() if name not in cls.neutral}

    @field_validator("temperature")
    @classmethod
    def _not_too_cold(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < _COLDEST:
            raise ValueError(f"it must be 0, or {_COLDEST} or more")
        return value


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One turn of a conversation. `developer` is another name for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1000)]

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, given: Any) -> Any:
        """Take out what libraries leave empty when they send back a reply."""
        if not isinstance(given, dict):
            return given
        empty = ("refusal", "audio", "function_call", "tool_calls", "annotations", "name")
        return {key: value for key, value in given.items() if not (key in empty and value in (None, []))}

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(one.text for one in self.content)


class ChatBody(Common):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31, description="Another name for max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="How many; goes with logprobs.")

    @model_validator(mode="after")
    def _told_together(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise unsupported_field("top_logprobs", "it goes with logprobs: true")
        return self


class CompletionBody(Common):
    """A request to /v1/completions: a text, or several, to be continued as they stand."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=2048)]
    logprobs: int | None = Field(
        default=None, ge=0, le=20, description="How many of the likeliest; 0 gives the drawn tokens' own alone."
    )
    echo: bool | None = Field(default=None, description="With logprobs, the prompt's log-probabilities too.")
    max_tokens: int | None = Field(default=None, ge=0, le=2**31, description="0 goes with echo and logprobs.")

    @model_validator(mode="before")
    @classmethod
    def _without_ids(cls, given: Any) -> Any:
        """Refuse what the API allows and an ensemble has no answer to."""
        if not isinstance(given, dict):
            return given
        prompt = given.get("prompt")
        if isinstance(prompt, list) and any(isinstance(one, int | list) for one in prompt):
            raise unsupported_field(
                "prompt", "token ids are those of one vocabulary, and members have their own; send text"
            )
        return given

    @model_validator(mode="after")
    def _scored_at_once(self) -> CompletionBody:
        scores = bool(self.echo) and self.logprobs is not None
        if scores and self.stream:
            raise unsupported_field("stream", "a prompt's log-probabilities (echo with logprobs) come in one piece")
        if self.max_tokens == 0 and not scores:
            raise unsupported_field("max_tokens", "0 is for the prompt's log-probabilities alone: echo with logprobs")
        return self


def read(kind: type[B], data: bytes) -> B:
    """Read a body. Raises ApiError that names the field at fault."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise validation_error(error, {**kind.model_fields, **kind.neutral}) from None
