"""The bodies of requests: their fields and allowed values. Anything else is refused by name.

The fields under `mixlm` are built from the table of options; those of OpenAI's API are written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    create_model,
    field_validator,
    model_validator,
)

from mixlm.choices import Rule, UnitName
from mixlm.core.options import OPTIONS, GenerationOptions
from mixlm.server.api_errors import unsupported_field, validation_error
from mixlm.types import Sampling

# A lower temperature overflows float32; 0 selects the most likely token.
_COLDEST = 1e-3
# Each wrong field is an error of its own; so many are reported at once, and no more.
_MOST_FIELDS = 1024


def _refuse_many(fields: Any) -> Any:
    """Refuse an object with too many fields, before each is looked at."""
    if isinstance(fields, dict) and len(fields) > _MOST_FIELDS:
        raise ValueError(f"it has more than {_MOST_FIELDS} fields")
    return fields


Neutral = Mapping[str, tuple[tuple[Any, ...], str]]
_ONE_TEXT = "an ensemble generates text, and nothing else"
# Fields of the API that have no meaning here: the values that request nothing, and why others are refused.
NEUTRAL_FIELDS: Neutral = {
    "audio": ((), _ONE_TEXT),
    "best_of": ((1,), "completions are not ranked; request n and choose"),
    "modalities": ((["text"],), _ONE_TEXT),
    "moderation": ((), "nothing is moderated"),
    "prediction": ((), "use mixlm.draft for speculative decoding"),
    "suffix": (("",), "members continue a text; they do not fill gaps"),
    "web_search_options": ((), _ONE_TEXT),
}
# Fields of conversations, in a request without one.
_NO_CHAT = "a raw text has no chat template; use /v1/chat/completions"
_NEUTRAL_WITHOUT_CHAT: Neutral = {
    "tools": (([],), _NO_CHAT),
    "tool_choice": (("none", "auto"), _NO_CHAT),
    "parallel_tool_calls": ((True, False), _NO_CHAT),
    "functions": (([],), _NO_CHAT),
    "function_call": (("none",), _NO_CHAT),
    "reasoning_effort": (("none",), _NO_CHAT),
    "verbosity": (("medium",), _NO_CHAT),
    "chat_template_kwargs": (({},), _NO_CHAT),
    "continue_final_message": ((False,), _NO_CHAT),
    "add_generation_prompt": ((True, False), _NO_CHAT),
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

Body = TypeVar("Body", bound="StrictBody")
Short = Annotated[str, StringConstraints(max_length=512)]
Word = Annotated[str, StringConstraints(max_length=64)]
Bias = Annotated[float, Field(ge=-100, le=100)]
FewFields = BeforeValidator(_refuse_many)
_BiasKey = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Biases = Annotated[dict[_BiasKey, Bias], Field(max_length=1024), FewFields]
Weight = Annotated[float, Field(ge=0, le=1e6)]


class StrictBody(BaseModel):
    """A body or a part of one: unknown fields are refused.

    Attributes:
        ignored: Fields that are taken and have no effect.
        neutral: Fields that have no meaning here: the values that request nothing, and why others are refused.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    ignored: ClassVar[tuple[str, ...]] = ()
    neutral: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _normalize(cls, fields: Any) -> Any:
        """Remove fields that request nothing, and refuse those that request what is not supported.

        Numbers such as 8.0 become integers where these are meant.
        """
        if not isinstance(fields, dict):
            return fields
        _refuse_many(fields)
        for name, value in fields.items():
            # Equal values of another type, as 1 and True are, mean something else.
            allowed, why = cls.neutral.get(name, ((), ""))
            if (
                why
                and value is not None
                and (type(value), value) not in [(type(default), default) for default in allowed]
            ):
                raise unsupported_field(name, why)
        known = _known_fields(cls)
        return {
            name: int(value) if type(value) is float and value.is_integer() and known.get(name) else value
            for name, value in fields.items()
            if name not in cls.ignored and name not in cls.neutral and not (value is None and name in known)
        }


def with_content(fields: Any) -> Any:
    """Return the fields of a message of the assistant with a text where its content is null; others as they are."""
    if isinstance(fields, dict) and fields.get("role") == "assistant" and fields.get("content") in (None, []):
        return {**fields, "content": ""}
    return fields


@cache
def _known_fields(model: type[BaseModel]) -> Mapping[str, bool]:
    """Return the names of a body's fields, with whether their numbers are integers."""
    fields = {info.alias or name: info.annotation for name, info in model.model_fields.items()}
    types = {name: {annotation, *get_args(annotation)} for name, annotation in fields.items()}
    return {name: int in kinds and float not in kinds for name, kinds in types.items()}


def _option(name: str, **limits: Any) -> Any:
    """Return the field of an entry of the table of options. limits: of the API, in place of the table's bounds."""
    text = OPTIONS[name].help
    description = text if text.endswith(".") else f"{text[0].upper()}{text[1:]}."
    return Field(default=None, description=description, **(limits or OPTIONS[name].bounds))


class _Extras(StrictBody):
    """What mixlm adds to the API, under `mixlm`. What is omitted is as in the served ensemble."""

    unit: UnitName | None = Field(default=None, description="The unit, in place of the ensemble's.")
    weights: Annotated[list[Weight], Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="One per member, of any positive scale, in place of the ensemble's weights or router."
    )

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


# Fields that stand at the top level too, as in vLLM.
SHARED_OPTIONS = ("top_k", "min_p", "repetition_penalty")
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
    # A request can give a rule's name only.
    _hints = {**get_type_hints(Sampling), **get_type_hints(GenerationOptions, localns={"AnyRule": Rule})}
    Extras = create_model(
        "Extras",
        __base__=_Extras,
        __doc__=_Extras.__doc__,
        **{
            name: (_EXTRA_TYPES.get(name, _hints[name]) | None, _option(name, **_EXTRA_LIMITS.get(name, {})))
            for name in EXTRA_OPTIONS
        },
    )


class StreamOptions(StrictBody):
    """Options of a streamed response."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: bool | None = Field(default=None, description="Has no effect: the usage comes at the end.")


class PlainText(StrictBody):
    """A completion of any text."""

    type: Literal["text"]


class JsonObject(StrictBody):
    """A completion that is a JSON object."""

    type: Literal["json_object"]


class Schema(StrictBody):
    """A JSON schema. name, description and strict have no effect: completions always match it."""

    name: Short
    of: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    description: str | None = None


class JsonSchema(StrictBody):
    """A completion that is JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: Schema


class CommonFields(StrictBody):
    """The fields of every endpoint that generates text."""

    neutral = NEUTRAL_FIELDS
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
    min_tokens: int | None = _option("min_tokens", ge=0, le=2**31)
    top_k: int | None = Field(default=None, ge=-1, le=2**31, description="As in vLLM; -1 and 0 keep all tokens.")
    min_p: float | None = _option("min_p")
    repetition_penalty: float | None = _option("repetition_penalty", **_EXTRA_LIMITS["repetition_penalty"])
    guided_json: dict[str, Any] | Json[dict[str, Any]] | None = Field(
        default=None, description="A JSON schema, or its text; another name for response_format."
    )
    mixlm: Extras | None = None

    @property
    def completion_schema(self) -> Mapping[str, Any] | None:
        """The JSON schema that the completion must match, if there is one."""
        if self.guided_json is not None:
            return self.guided_json
        if isinstance(self.response_format, JsonSchema):
            return self.response_format.json_schema.of
        return {"type": "object"} if isinstance(self.response_format, JsonObject) else None

    @model_validator(mode="after")
    def _check_twice(self) -> CommonFields:
        """Refuse what is given twice with different values."""
        if self.guided_json is not None and not isinstance(self.response_format, PlainText | None):
            raise unsupported_field("guided_json", "response_format is given too; leave one out")
        for name in SHARED_OPTIONS:
            value, extra = getattr(self, name), getattr(self.mixlm, name, None)
            if value is not None and extra is not None and value != extra:
                raise unsupported_field(name, f"mixlm.{name} has another value; leave one out")
        return self

    @field_validator("guided_json", mode="wrap")
    @classmethod
    def _read_schema(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError("it must be a JSON schema, or its text") from None

    @field_validator("top_k")
    @classmethod
    def _read_top_k(cls, value: int | None) -> int | None:
        return 0 if value == -1 else value  # vLLM's spelling

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < _COLDEST:
            raise ValueError(f"it must be 0, or {_COLDEST} or more")
        return value


class CompletionBody(CommonFields):
    """A request to /v1/completions: a text, or several, to be continued as they stand."""

    neutral = {**NEUTRAL_FIELDS, **_NEUTRAL_WITHOUT_CHAT}

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=2048, fail_fast=True)]
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


def parse_body(schema: type[Body], data: bytes | Mapping[str, Any]) -> Body:
    """Validate a body, as JSON or as its fields. Raises ApiError, which names the field at fault."""
    try:
        return schema.model_validate_json(data) if isinstance(data, bytes) else schema.model_validate(data)
    except ValidationError as error:
        raise validation_error(error, schema, (*schema.neutral, *schema.ignored)) from None
