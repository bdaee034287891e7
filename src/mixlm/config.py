"""The ensemble file: TOML to one frozen tree. Unknown keys are refused, with the nearest known one as a hint.

method = "mixture"              # or conventional, greedy, single, speculative, auto
unit = "auto"                   # or token, piece, word, byte
[sampling]                      # for every member
top_k = 10
[[members]]
model = "smollm2-135m"          # a name, a folder, a GGUF file, a hub id
weight = 0.6
[members.sampling]              # for this member, over the above
temperature = 0.5
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mixlm.errors import ConfigError, did_you_mean
from mixlm.types import Sampling

Method = Literal["mixture", "conventional", "greedy", "single", "speculative", "auto"]
UnitName = Literal["auto", "token", "piece", "word", "byte"]
EngineName = Literal["auto", "hf", "llamacpp", "vllm", "remote"]
OnFailure = Literal["error", "drop"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Graphs = Literal["auto", "on", "off"]
Rule = Literal["gac", "unite"]
LogprobsOf = Literal["member", "ensemble"]
RouterKind = Literal["fixed", "prompt", "learned"]
METHODS: tuple[Method, ...] = ("mixture", "conventional", "greedy", "single", "speculative", "auto")
UNITS: tuple[UnitName, ...] = ("auto", "token", "piece", "word", "byte")
RULES: tuple[Rule, ...] = ("gac", "unite")
ENGINES: tuple[EngineName, ...] = ("auto", "hf", "llamacpp", "vllm", "remote")
LOGPROBS_OF: tuple[LogprobsOf, ...] = ("member", "ensemble")
ON_FAILURE: tuple[OnFailure, ...] = ("error", "drop")
GRAPHS: tuple[Graphs, ...] = ("auto", "on", "off")
DTYPES: tuple[DType, ...] = ("auto", "float32", "bfloat16", "float16")


def supported_methods(unit: str) -> tuple[Method, ...]:
    """Return the methods that a unit's law can be drawn by: the others need members' laws of symbols in full."""
    return ("mixture", "single", "auto") if unit in ("word", "byte") else METHODS


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SamplingConfig(_Strict):
    """Sampling options that are given; the others keep their defaults. See `Sampling`."""

    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def given(self) -> dict[str, Any]:
        """Return the options that are given."""
        return self.model_dump(exclude_none=True)


class MemberConfig(_Strict):
    """One member. `template` is a Jinja chat template, `template_file` a file that holds one.

    `url` stands in place of `model` for a member behind servers: their URLs; they are replicas, and all have the model.
    `system` stands in front of every conversation of this member, `adapter` is a LoRA adapter: a folder or a hub id.
    Members that differ in these alone share one copy of the weights.
    engine: what runs the model; "auto" takes llama.cpp for a GGUF file where that is enough. The keys below it: see
    `EngineSpec`.
    """

    model: str
    name: str | None = None
    weight: float | None = None
    dtype: DType = "auto"
    device: str = "auto"
    engine: EngineName = "auto"
    graphs: Graphs = "auto"
    candidates: int = Field(default=64, ge=1)
    context: int | None = Field(default=None, ge=16)
    slots: int = Field(default=4, ge=1)
    tokenizer: str | None = None
    key_env: str | None = None
    timeout: float = Field(default=120.0, gt=0)
    template: str | None = None
    template_file: str | None = None
    system: str | None = None
    adapter: str | None = None
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="before")
    @classmethod
    def _urls(cls, given: Any) -> Any:
        """Take `url` for `model`: what names several servers is their URLs with commas between them."""
        if not isinstance(given, dict) or "url" not in given:
            return given
        urls = [given["url"]] if isinstance(given["url"], str) else given["url"]
        if "model" in given:
            raise ValueError("a member has a model or a url, not both")
        if not isinstance(urls, list) or not urls or not all(_is_url(one) for one in urls):
            raise ValueError("url is a server's URL or a list of them: http://host:port or https://host:port")
        return {key: value for key, value in given.items() if key != "url"} | {"model": ",".join(urls)}


class RouterConfig(_Strict):
    """Weights by state: "fixed", "prompt" (by how well each member predicts it), or "learned" (from `file`)."""

    kind: RouterKind = "fixed"
    file: str | None = None
    sharpness: float | None = None


class EnsembleConfig(_Strict):
    """A whole ensemble. `rule` is a published way to average in place of the library's own; `conventional` only."""

    members: tuple[MemberConfig, ...] = Field(min_length=1)
    method: Method = "mixture"
    rule: Rule | None = None
    unit: UnitName = "auto"
    system: str | None = None
    on_failure: OnFailure = "error"
    sampling: SamplingConfig = SamplingConfig()
    router: RouterConfig = RouterConfig()

    def weights(self) -> list[float] | None:
        """Return the members' weights, None when none is given.

        Raises ConfigError when some members have one and some have not.
        """
        given = [one.weight for one in self.members if one.weight is not None]
        if given and len(given) != len(self.members):
            raise ConfigError(
                f"{len(given)} of {len(self.members)} members have a weight", "give every member a weight, or none"
            )
        return given or None


def read_config(path: str | Path) -> EnsembleConfig:
    """Read an ensemble file. Raises ConfigError that names the file, the key and what is allowed."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = [one.name for one in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise ConfigError(f"there is no ensemble file {path}", did_you_mean(path.name, beside)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    config = parse_config(raw, str(path))
    folder = path.resolve().parent
    update: dict[str, Any] = {"members": tuple(_with_files(one, folder) for one in config.members)}
    if config.router.file is not None:
        update["router"] = config.router.model_copy(update={"file": str(folder / config.router.file)})
    return config.model_copy(update=update)


def write_config(config: EnsembleConfig, path: str | Path) -> None:
    """Write an ensemble file that `read_config` reads back; what has its default value is left out."""
    import tomli_w

    form = config.model_dump(exclude_none=True, exclude_defaults=True)
    Path(path).write_text(tomli_w.dumps(form, multiline_strings=True), encoding="utf-8")


def parse_config(raw: dict[str, Any], source: str) -> EnsembleConfig:
    """Check a parsed ensemble file. Raises ConfigError; `source` names the file in its message."""
    try:
        config = EnsembleConfig.model_validate(raw)
    except ValidationError as error:
        raise _explained(error, source) from error
    config.weights()
    if (config.router.kind == "learned") != (config.router.file is not None):
        raise ConfigError(f"{source}: a learned router has a file, and no other has one", "see mixlm fit --router")
    for options in (config.sampling, *(one.sampling for one in config.members)):
        Sampling(**options.given())
    return config


def _with_files(member: MemberConfig, folder: Path) -> MemberConfig:
    """Read a member's template file, and take paths relative to the ensemble file."""
    changes: dict[str, Any] = {}
    if member.template_file is not None:
        if member.template is not None:
            raise ConfigError(f"member {member.model} has a template and a template_file", "give one of them")
        try:
            changes["template"] = (folder / member.template_file).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"template_file of member {member.model} cannot be read: {error}") from error
    own = (("model", member.model), ("adapter", member.adapter), ("tokenizer", member.tokenizer))
    for key, value in own:
        if value is not None and (folder / value).exists():
            changes[key] = str(folder / value)
    return member.model_copy(update=changes)


def _is_url(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("http://", "https://")) and "," not in value


def _explained(error: ValidationError, source: str) -> ConfigError:
    """Turn the first of pydantic's complaints into one sentence and a hint."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        model = _model_at(first["loc"])
        known = list(model.model_fields)
        hint = did_you_mean(str(first["loc"][-1]), known) or f"known keys: {', '.join(known)}"
        return ConfigError(f"{source}: unknown key {place!r}", hint)
    if first["type"] == "missing":
        return ConfigError(f"{source}: {place} is missing", "an ensemble file lists its [[members]], each with a model")
    message = first["msg"][0].lower() + first["msg"][1:]
    shown = "" if isinstance(first["input"], dict | list) else f" is {first['input']!r}"
    return ConfigError(f"{source}: {place}{shown}: {message}")


def _model_at(place: tuple[int | str, ...]) -> type[BaseModel]:
    if "sampling" in place[:-1]:
        return SamplingConfig
    if "router" in place[:-1]:
        return RouterConfig
    return MemberConfig if len(place) > 1 and place[0] == "members" else EnsembleConfig
