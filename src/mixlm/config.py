"""The form of an ensemble file: frozen models, of which an unknown key is an error.

method = "mixture"              # or conventional, greedy, single, speculative, auto
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

from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from mixlm.choices import (
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
from mixlm.errors import ConfigError
from mixlm.types import Sampling


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
        engine: What runs the model: a name that `mixlm.engines.registry` knows; "auto" is llama.cpp for a GGUF file
            where that is enough.
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
    weight: float | None = Field(default=None, strict=True)
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
    def _check_sharpness(self) -> RouterConfig:
        if self.sharpness is not None and self.kind != "prompt":
            raise ValueError(f"sharpness is of the router by prompt, and kind is {self.kind!r}")
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


def _is_url(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("http://", "https://")) and "," not in value
