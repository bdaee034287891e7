"""The bodies of requests: their fields and allowed values. Anything else is refused by name.

The fields under `mixlm` are built from the table of options; those of OpenAI's API are written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from mixlm.config import UnitName
from mixlm.core.options import OPTIONS, GenerationOptions
from mixlm.server.api_errors import unsupported_field, validation_error
from mixlm.types import Sampling

# A lower temperature overflows float32; 0 selects the most likely token.
_COLDEST = 1e-3

_ONE_TEXT = "an ensemble generates text, and nothing else"
# Fields of the API that have no meaning here: the values that request nothing, and why others are refused.
_NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), _ONE_TEXT),
    "best_of": ((1,), "completions are not ranked; request n and choose"),
    "function_call": (("none",), _ONE_TEXT),
    "functions": (([],), _ONE_TEXT),
    "modalities": ((["text"],), _ONE_TEXT),
    "moderation": ((), "nothing is moderated"),
    "parallel_tool_calls": ((True, False), _ONE_TEXT),
    "prediction": ((), "use mixlm.draft for speculative decoding"),
    "reasoning_effort": (("none",), "the members take no reasoning effort"),
    "suffix": (("",), "members continue a text; they do not fill gaps"),
    "tool_choice": (("none", "auto"), _ONE_TEXT),
    "tools": (([],), _ONE_TEXT),
    "verbosity": (("medium",), "the members take no verbosity"),
    "web_search_options": ((), _ONE_TEXT),
}
# Fields that clients send and that cannot change the text: any value is taken, and has no effect.
IGNORED_FIELDS = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
IGNORED_MESSAGE_FIELDS = ("annotations", "cache_control", "name", "reasoning", "reasoning_content")

Body = TypeVar("Body", bound="CommonFields")
Short = Annotated[str, StringConstraints(max_length=512)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[dict[Annotated[str, StringConstraints(min_length=1, max_length=512)], Bias], Field(max_length=1024)]
Weight = Annotated[float, Field(ge=0, le=1e6)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    ignored: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _normalize(cls, fields: Any) -> Any:
        """Remove known fields that are null or ignored; make integers of numbers such as 8.0 where they are meant."""
        if not isinstance(fields, dict):
            return fields
        known = {info.alias or name: info for name, info in cls.model_fields.items()}
        return {
            name: int(value)
            if type(value) is float and value.is_integer() and name in known and _is_integer(known[name].annotation)
            else value
            for name, value in fields.items()
            if name not in cls.ignored and not (value is None and name in known)
        }


def _is_integer(annotation: Any) -> bool:
    """Whether a field's numbers are integers."""
    types = {annotation, *get_args(annotation)}
    return int in types and float not in types


def _option(name: str, **limits: Any) -> Any:
    """Return the field of an entry of the table of options. limits: of the API, in place of the table's bounds."""
    bounds = limits or OPTIONS[name].bounds
    return Field(default=None, description=_sentence(OPTIONS[name].help), **bounds)


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text[0].upper()}{text[1:]}."


class _Extras(_Body):
    """What mixlm adds to the API, under `mixlm`. What is omitted is as in the served ensemble."""

    unit: UnitName | None = Field(default=None, description="The unit, in place of the ensemble's.")
    weights: Annotated[list[Weight], Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="One per member, of any positive scale, in place of the ensemble's weights or router."
    )

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


EXTRA_OPTIONS = tuple(name for name, spec in OPTIONS.items() if spec.http == "mixlm")
_EXTRA_TYPES: Mapping[str, Any] = {"draft": Short, "logit_bias": Biases}
_EXTRA_LIMITS: Mapping[str, Mapping[str, Any]] = {
    "top_k": {"ge": 0, "le": 2**31},
    "repetition_penalty": {"ge": 0.01, "le": 100},
    "block": {"ge": 1, "le": 64},
}
if TYPE_CHECKING:
    Extras = _Extras
else:
    _hints = {**get_type_hints(Sampling), **get_type_hints(GenerationOptions)}
    Extras = create_model(
        "Extras",
        __base__=_Extras,
        __doc__=_Extras.__doc__,
        **{
            name: (_EXTRA_TYPES.get(name, _hints[name]) | None, _option(name, **_EXTRA_LIMITS.get(name, {})))
            for name in EXTRA_OPTIONS
        },
    )


class StreamOptions(_Body):
    """Options of a streamed response."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: bool | None = Field(default=None, description="Has no effect: the usage comes at the end.")


class PlainText(_Body):
    """A completion of any text."""

    type: Literal["text"]


class JsonObject(_Body):
    """A completion that is a JSON object."""

    type: Literal["json_object"]


class Schema(_Body):
    """A JSON schema. name, description and strict have no effect: completions always match it."""

    name: Short
    of: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    description: Annotated[str, StringConstraints(max_length=10_000)] | None = None


class JsonSchema(_Body):
    """A completion that is JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: Schema


class CommonFields(_Body):
    """The fields that both endpoints have."""

    neutral: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = _NEUTRAL
    ignored = IGNORED_FIELDS

    model: Short | None = Field(
        default=None, description="The name of a served ensemble; may be omitted if there is only one."
    )
    logit_bias: Biases | None = Field(
        default=None,
        description="By a token's text; keys of digits are token ids, for members that share a vocabulary.",
    )
    n: int | None = Field(default=None, ge=1, le=128, description="Completions of each prompt.")
    max_tokens: int | None = Field(default=None, ge=1, le=2**31)
    temperature: float | None = Field(default=None, ge=0, le=100, description="0 selects the method greedy.")
    top_p: float | None = _option("top_p")
    presence_penalty: float | None = _option("presence_penalty")
    frequency_penalty: float | None = _option("frequency_penalty")
    response_format: Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64, description="The same seed gives the same text.")
    stop: Short | Annotated[list[Short], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(default=None, description="Whether to go on after end-of-text, up to max_tokens.")
    mixlm: Extras | None = None

    @property
    def completion_schema(self) -> Mapping[str, Any] | None:
        """The JSON schema that the completion must match, if there is one."""
        if isinstance(self.response_format, JsonSchema):
            return self.response_format.json_schema.of
        return {"type": "object"} if isinstance(self.response_format, JsonObject) else None

    @model_validator(mode="before")
    @classmethod
    def _remove_neutral(cls, fields: Any) -> Any:
        """Remove fields that request nothing, and refuse those that request what is not supported."""
        if not isinstance(fields, dict):
            return fields
        for name in fields.keys() & cls.neutral.keys():
            allowed, why = cls.neutral[name]
            # Equal values of another type, as 1 and True are, mean something else.
            if fields[name] is not None and (type(fields[name]), fields[name]) not in [
                (type(value), value) for value in allowed
            ]:
                raise unsupported_field(name, why)
        return {name: value for name, value in fields.items() if name not in cls.neutral}

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < _COLDEST:
            raise ValueError(f"it must be 0, or {_COLDEST} or more")
        return value


class TextPart(_Body):
    """A part of a message."""

    ignored = ("annotations", "cache_control")

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One turn of a conversation. `developer` is another name for `system`; an assistant's content may be null."""

    ignored = IGNORED_MESSAGE_FIELDS

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1000)]

    @model_validator(mode="before")
    @classmethod
    def _remove_empty(cls, fields: Any) -> Any:
        """Remove what libraries leave empty when they send back a message."""
        if not isinstance(fields, dict):
            return fields
        empty = ("refusal", "audio", "function_call", "tool_calls")
        fields = {key: value for key, value in fields.items() if not (key in empty and value in (None, []))}
        if fields.get("role") == "assistant" and fields.get("content") is None:
            fields["content"] = ""
        return fields

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(CommonFields):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31, description="Another name for max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="How many; goes with logprobs.")

    @model_validator(mode="after")
    def _needs_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise unsupported_field("top_logprobs", "it goes with logprobs: true")
        return self


class CompletionBody(CommonFields):
    """A request to /v1/completions: a text, or several, to be continued as they stand."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=2048)]
    logprobs: int | None = Field(
        default=None, ge=0, le=20, description="How many of the most likely; 0 gives those of the sampled tokens alone."
    )
    echo: bool | None = Field(default=None, description="With logprobs, the prompt's log-probabilities too.")
    max_tokens: int | None = Field(default=None, ge=0, le=2**31, description="0 goes with echo and logprobs.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_ids(cls, fields: Any) -> Any:
        """Refuse what the API allows and an ensemble does not support."""
        if not isinstance(fields, dict):
            return fields
        prompt = fields.get("prompt")
        if isinstance(prompt, list) and any(isinstance(item, int | list) for item in prompt):
            raise unsupported_field(
                "prompt", "token ids are those of one vocabulary, and members have their own; send text"
            )
        return fields

    @model_validator(mode="after")
    def _check_scoring(self) -> CompletionBody:
        scores = bool(self.echo) and self.logprobs is not None
        if scores and self.stream:
            raise unsupported_field("stream", "a prompt's log-probabilities (echo with logprobs) come in one piece")
        if self.max_tokens == 0 and not scores:
            raise unsupported_field("max_tokens", "0 is for the prompt's log-probabilities alone: echo with logprobs")
        return self


def parse_body(schema: type[Body], data: bytes) -> Body:
    """Validate a JSON body. Raises ApiError, which names the field at fault."""
    try:
        return schema.model_validate_json(data)
    except ValidationError as error:
        raise validation_error(error, schema, (*schema.neutral, *schema.ignored)) from None
