"""Ensemble files, read and written: frozen models, of which an unknown key is an error, and errors in words.

method = "mixture"              # or conventional, greedy, single, speculative, auto, layered
unit = "auto"                   # or token, piece, word, byte
[sampling]                      # for every member
top_k = 10
[combination]                   # how distributions are combined, in place of the average
rule = "geometric"
strength = 2.0
[[members]]
model = "smollm2-135m"          # a name, a folder, a GGUF file or a hub id
weight = 0.6
[members.sampling]              # for this member; overrides the above
temperature = 0.5
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from mixlm.choices import (
    RULES,
    RULES_WITH_ROLES,
    ContrastiveForm,
    DeferBy,
    DType,
    Graphs,
    Method,
    OnFailure,
    Quantization,
    RouterKind,
    Rule,
    UnitName,
)
from mixlm.errors import ConfigError, did_you_mean
from mixlm.types import Sampling

_BARE = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?|true|false")  # a number or a boolean, as TOML writes it without quotes
# Per-call options that users often write into a file.
_OF_GENERATIONS = ("max_tokens", "min_tokens", "stop", "seed", "draft", "block")
_NO_MODEL = "an ensemble file is text in TOML; a model is named with -m"
_UTF8 = "save it as UTF-8"
_TOML = 'a value follows an equals sign, texts stand in "quotes", and each member stands below a line [[members]]'


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _SamplingConfig(_Strict):
    """The options of `Sampling` that a file sets; the others keep their defaults."""

    def options(self) -> dict[str, Any]:
        """Return the options that are set."""
        return self.model_dump(exclude_none=True)


if TYPE_CHECKING:
    SamplingConfig = _SamplingConfig
else:
    _OPTIONAL = {
        name: (Annotated[kind | None, Field(strict=True)], None) for name, kind in get_type_hints(Sampling).items()
    }
    SamplingConfig = create_model("SamplingConfig", __base__=_SamplingConfig, **_OPTIONAL)


class MemberConfig(_Strict):
    """One member.

    A member behind servers has `url` in place of `model`: the URL of a server, or of several replicas of it. Members
    that differ only in template, system message or adapter share one copy of the weights. The keys not listed here are
    those of `EngineSpec`.

    Attributes:
        model: A name, a folder, a GGUF file or a hub id.
        engine: What runs the model: a name that `mixlm.engines.registry` knows; "auto" is chosen by
            `mixlm.loading.choose_engine`.
        template: A Jinja chat template.
        template_file: A file with one.
        system: A system message in front of every conversation of this member.
        adapter: A LoRA adapter: a folder or a hub id.
        role: What it is in the rule: expert or amateur of contrastive; base, tuned or untuned of proxy; conditional or
            unconditional of guidance. Without roles, members have them in this order.
        trust_remote_code: Whether Python code in the model's folder may run.
    """

    model: str
    name: str | None = None
    weight: float | None = Field(default=None, ge=0, allow_inf_nan=False, strict=True)
    dtype: DType = "auto"
    device: str = "auto"
    engine: str = "auto"
    graphs: Graphs = "auto"
    prefix_cache: int = Field(default=1024, ge=0, strict=True)
    candidates: int = Field(default=64, ge=1, strict=True)
    context: int | None = Field(default=None, ge=16, strict=True)
    slots: int | None = Field(default=None, ge=1, strict=True)
    tokenizer: str | None = None
    key_env: str | None = None
    timeout: float = Field(default=120.0, gt=0, strict=True)
    trust_remote_code: bool = Field(default=False, strict=True)
    device_map: str | dict[str, str | int] | None = None
    max_memory: dict[str, str] | None = None
    quantization: Quantization | None = None
    revision: str | None = None
    attn: str | None = None
    template: str | None = None
    template_file: str | None = None
    system: str | None = None
    adapter: str | None = None
    role: str | None = None
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="before")
    @classmethod
    def _join_urls(cls, keys: Any) -> Any:
        """Turn `url` into a `model`: the URLs with commas between them."""
        if not isinstance(keys, dict) or "url" not in keys:
            return keys
        urls = [keys["url"]] if isinstance(keys["url"], str) else keys["url"]
        if "model" in keys:
            raise ValueError("a member has a model or a url, not both")
        if not isinstance(urls, list) or not urls or not all(_is_url(url) for url in urls):
            raise ValueError("url is a server's URL or a list of them: http://host:port or https://host:port")
        return {key: value for key, value in keys.items() if key != "url"} | {"model": ",".join(urls)}


class RouterConfig(_Strict):
    """The router: "fixed" weights, "prompt" (by how well each member predicts the prompt), or "learned" (`file`)."""

    kind: RouterKind = "fixed"
    file: str | None = None
    sharpness: float | None = Field(default=None, strict=True)

    @model_validator(mode="after")
    def _check_kind(self) -> RouterConfig:
        if self.sharpness is not None and self.kind != "prompt":
            raise ValueError(f"sharpness applies only to the router of kind 'prompt', and kind is {self.kind!r}")
        if (self.kind == "learned") != (self.file is not None):
            raise ValueError("a learned router has a file, and no other kind has one")
        return self


class CombinationConfig(_Strict):
    """How the members' distributions are combined: a rule and its parameters.

    accept: the file of a trained gate of rule defer, in place of its threshold (`mixlm fit --rule defer --router`).
    """

    rule: Rule
    strength: float | None = Field(default=None, strict=True)
    alpha: float | None = Field(default=None, strict=True)
    form: ContrastiveForm | None = None
    by: DeferBy | None = None
    accept: str | None = None

    @model_validator(mode="after")
    def _check_accept(self) -> CombinationConfig:
        if self.accept is not None and self.rule != "defer":
            raise ValueError(f"accept is a gate of rule defer, and the rule is {self.rule!r}")
        if self.accept is not None and (self.strength is not None or self.by is not None):
            raise ValueError("accept is a trained gate, and strength and by are a threshold: give one of them")
        return self

    def options(self) -> dict[str, Any]:
        """Return the rule and the parameters that are set, without a trained gate."""
        return self.model_dump(exclude_none=True, exclude={"accept"})


class EnsembleConfig(_Strict):
    """An ensemble. `rule` is another way to write a `combination` without parameters.

    With a rule that is not the average, the method is "layered" unless one is given.
    """

    members: tuple[MemberConfig, ...] = Field(min_length=1)
    method: Method = "mixture"
    rule: Rule | None = None
    combination: CombinationConfig | None = None
    unit: UnitName = "auto"
    system: str | None = None
    on_failure: OnFailure = "error"
    sampling: SamplingConfig = SamplingConfig()
    router: RouterConfig = RouterConfig()

    @model_validator(mode="before")
    @classmethod
    def _set_method(cls, keys: Any) -> Any:
        """Turn `rule` into a `combination`, and choose the method where none is given."""
        if not isinstance(keys, dict):
            return keys
        keys = dict(keys)
        if keys.get("rule") is not None:
            if keys.get("combination") is not None:
                raise ValueError("rule and [combination] are both given")
            if keys["rule"] in RULES:  # what is no rule is refused by the name that it was given
                keys["combination"] = {"rule": keys.pop("rule")}
        combination = keys.get("combination")
        rule = combination.get("rule") if isinstance(combination, dict) else getattr(combination, "rule", None)
        if rule not in (None, "average"):
            keys.setdefault("method", "layered")
            if keys["method"] == "single":
                raise ValueError(f"method is 'single', which samples one member, and the rule is {rule!r}")
        return keys

    def rule_options(self) -> dict[str, Any]:
        """Return the rule and its parameters, as options of a generation."""
        return {} if self.combination is None else self.combination.options()

    def weights(self) -> list[float] | None:
        """Return the members' weights, None if no member has one.

        Raises:
            ConfigError: Some members have a weight and some have none.
        """
        weights = [member.weight for member in self.members if member.weight is not None]
        if weights and len(weights) != len(self.members):
            raise ConfigError(
                f"{len(weights)} of {len(self.members)} members have a weight", "give every member a weight, or none"
            )
        return weights or None


def read_config(path: str | Path) -> EnsembleConfig:
    """Read an ensemble file. Raises ConfigError that names the file, the key and the allowed values."""
    import tomllib

    path = Path(path)
    try:
        text = _read(path, str(path), _NO_MODEL, _UTF8 if path.suffix.lower() == ".toml" else _NO_MODEL)
    except ConfigError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        names = [file.name for file in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise ConfigError(f"there is no ensemble file {path}", did_you_mean(path.name, names) or _NO_MODEL) from None
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", _TOML) from error
    config = parse_config(raw, str(path))
    _check_roles(config, str(path))
    folder = path.resolve().parent
    update: dict[str, Any] = {"members": tuple(_resolve_files(member, folder, path) for member in config.members)}
    for member, resolved in zip(config.members, update["members"], strict=True):
        place = "template" if member.template_file is None else f"template_file {member.template_file}"
        _check_template(resolved.template, f"{path}: {place} of member {member.name or member.model}")
    if config.router.file is not None:
        update["router"] = config.router.model_copy(update={"file": str(folder / config.router.file)})
    if config.combination is not None and config.combination.accept is not None:
        accept = str(folder / config.combination.accept)
        update["combination"] = config.combination.model_copy(update={"accept": accept})
    return config.model_copy(update=update)


def write_config(config: EnsembleConfig, path: str | Path) -> None:
    """Write an ensemble file that `read_config` reads back; default values are omitted."""
    import tomli_w

    form = config.model_dump(exclude_none=True, exclude_defaults=True)
    Path(path).write_text(tomli_w.dumps(form, multiline_strings=True), encoding="utf-8")


def parse_config(raw: dict[str, Any], source: str | None) -> EnsembleConfig:
    """Validate a parsed ensemble file, or keywords in that form. Raises ConfigError where it is not valid.

    source: the file's name, for messages; None for keywords, which messages name without their tables.
    """
    _check_tables(raw, source)
    try:
        config = EnsembleConfig.model_validate(raw)
    except ValidationError as error:
        raise _config_error(error, source) from error
    config.weights()
    for sampling in (config.sampling, *(member.sampling for member in config.members)):
        Sampling(**sampling.options())
    return config


def _is_url(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("http://", "https://")) and "," not in value


def _config_error(error: ValidationError, source: str | None) -> ConfigError:
    """Return the first of pydantic's errors as one sentence and a hint."""
    first = error.errors()[0]
    if first["type"] == "missing":  # perhaps it has another name
        others = (other for other in error.errors() if other["loc"][:-1] == first["loc"][:-1])
        first = next((other for other in others if other["type"] == "extra_forbidden"), first)
    # The names of a union's branches, such as dict[str,…], come after its field.
    parts = [str(part) for i, part in enumerate(first["loc"]) if not (i and _is_branch(str(part)))]
    if source is None:
        parts = [part for part in parts if part not in ("members", "sampling", "combination") and not part.isdecimal()]
    source, place = "" if source is None else f"{source}: ", ".".join(parts)
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{source}unknown key {place!r}", _key_hint(first["loc"]))
    if first["type"] == "missing":
        lists = "an ensemble file lists its [[members]], each with a model"
        named = f"name one, such as rule = {RULES[1]!r}"
        return ConfigError(f"{source}{place} is missing", named if place == "combination.rule" else lists)
    message = first["msg"].removeprefix("Value error, ")
    message = "it must be a table" if first["type"] == "model_type" else message[:1].lower() + message[1:]
    shown = "" if isinstance(first["input"], dict | list) else f" is {first['input']!r}"
    table = ".".join(part for part in parts if not part.isdecimal())
    hint = _value_hint(first["type"], first["input"], message, table)
    return ConfigError(f"{source}{place}{shown}: {message}" if place else f"{source}{message}", hint)


def _value_hint(kind: str, value: Any, message: str, table: str) -> str | None:
    """Return what to do about a value that is not allowed, None where the message says it all.

    kind: of the error, as pydantic names it. message: what is allowed. table: the head of that whose value it is.
    """
    if isinstance(value, str) and re.search("number|integer|boolean", message) and _BARE.fullmatch(value):
        return "write it without quotes"
    if kind == "string_type" and isinstance(value, int | float):
        return "write it in quotes"
    if kind == "model_type":
        return f"write [{table}], and its keys below"
    if message.startswith("a learned router has a file"):
        return "see mixlm fit --router"
    if kind == "literal_error":
        return did_you_mean(str(value), re.findall("'([^']+)'", message))
    return None


def _is_branch(part: str) -> bool:
    return part in ("str", "int") or part.startswith("dict[")


def _check_tables(raw: dict[str, Any], source: str | None) -> None:
    """Raise ConfigError for a table where a list of tables belongs, or the reverse."""
    members = raw.get("members", [])
    if isinstance(members, dict):
        raise ConfigError(f"{source}: [members] is one table, and members are a list of them", "write [[members]]")
    if not isinstance(members, list | tuple) or not all(isinstance(member, dict) for member in members):
        shape = "a list of names, and must be one" if isinstance(members, list) else f"{members!r}, and must be a list"
        raise ConfigError(
            f"{source}: members is {shape} of tables", 'write [[members]] for each, and below it: model = "NAME"'
        )
    owners = [("", raw), *((f"members.{i}.", member) for i, member in enumerate(members))]
    for prefix, table in owners:
        for key in ("sampling", "router", "combination"):
            if isinstance(table.get(key), list):
                place = f"{prefix.split('.')[0]}.{key}" if prefix else key
                raise ConfigError(f"{source}: {prefix}{key} is a list of tables, and must be one", f"write [{place}]")


def _key_hint(place: tuple[int | str, ...]) -> str:
    """Return what to do about an unknown key: where it belongs, or what was probably meant."""
    name, model = str(place[-1]), _model_at(place)
    is_top, singular = model is EnsembleConfig, name.removesuffix("s")
    belongs = (
        (
            model is not SamplingConfig and name in SamplingConfig.model_fields,
            f"it is a sampling option: write it below [{'members.' if model is MemberConfig else ''}sampling]",
        ),
        (
            not is_top and name in EnsembleConfig.model_fields,
            "it is a key of the ensemble: write it above the first [table] of the file",
        ),
        (
            is_top and name in CombinationConfig.model_fields,
            "it is a parameter of a rule: write it below [combination]",
        ),
        (is_top and singular in ("member", "model"), 'write [[members]] for each, and below it: model = "NAME"'),
        (
            is_top and singular in MemberConfig.model_fields,
            f"{singular} is a key of each member: write it below [[members]]",
        ),
        (
            name in _OF_GENERATIONS,
            f"it is an option of each generation: --{name.replace('_', '-')}, or {name}=… in Python",
        ),
        (model is MemberConfig and name in ("path", "id", "file"), "did you mean 'model'?"),
    )
    known = list(model.model_fields)
    hint = next((hint for applies, hint in belongs if applies), None) or did_you_mean(name, known)
    return hint or f"known keys: {', '.join(known)}"


def _model_at(place: tuple[int | str, ...]) -> type[BaseModel]:
    tables = (("sampling", SamplingConfig), ("router", RouterConfig), ("combination", CombinationConfig))
    for name, model in tables:
        if name in place[:-1]:
            return model
    return MemberConfig if len(place) > 1 and place[0] == "members" else EnsembleConfig


def _check_roles(config: EnsembleConfig, source: str) -> None:
    """Raise ConfigError for a role in a file whose rule has none."""
    rule = None if config.combination is None else config.combination.rule
    for i, member in enumerate(config.members):
        if member.role is not None and rule is not None and rule not in RULES_WITH_ROLES:
            raise ConfigError(
                f"{source}: members.{i}.role is {member.role!r}, and rule {rule} has no roles", "leave it out"
            )


def _resolve_files(member: MemberConfig, folder: Path, source: Path) -> MemberConfig:
    """Read a member's template file, and resolve paths relative to the ensemble file."""
    changes: dict[str, Any] = {}
    if member.template_file is not None:
        name = member.name or member.model
        if member.template is not None:
            raise ConfigError(f"{source}: member {name} has a template and a template_file", "give one of them")
        place = f"{source}: template_file {member.template_file} of member {name}"
        hint = f"its path begins at the folder {folder}"
        changes["template"] = _read(folder / member.template_file, place, hint, _UTF8)
    for key, value in (("model", member.model), ("adapter", member.adapter), ("tokenizer", member.tokenizer)):
        if value and (folder / value).exists():
            changes[key] = str(folder / value)
    return member.model_copy(update=changes)


def _read(path: Path, place: str, hint: str, form_hint: str) -> str:
    """Return the text of a file. Raises ConfigError, which calls it `place`, where it is not readable or no UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte-order mark is no text
    except OSError as error:
        raise ConfigError(f"{place} cannot be read: {error.strerror or error}", hint) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{place}, line {line}: it is not UTF-8 ({error.reason})", form_hint) from error


def _check_template(template: str | None, place: str) -> None:
    """Raise ConfigError for a chat template that is not valid Jinja."""
    if template is None:
        return
    try:
        from jinja2 import Environment, TemplateSyntaxError
    except ImportError:  # then no engine that uses templates is installed
        return
    try:
        # transformers adds a tag of its own, which marks what an assistant says.
        # Compiled and not only parsed: that finds unknown filters too.
        Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False).compile(
            re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
        )
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"{place}, line {error.lineno}: {error.message}", "it must be a valid Jinja template"
        ) from error
