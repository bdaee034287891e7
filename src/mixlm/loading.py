"""From names or an ensemble file to a loaded ensemble.

Members that name the same model share one copy of its weights, also where their chat templates or adapters differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mixlm.config import (
    DType,
    EngineName,
    EnsembleConfig,
    Graphs,
    MemberConfig,
    Method,
    RouterConfig,
    Rule,
    UnitName,
    parse_config,
    read_config,
)
from mixlm.core.mixing import normalized_weights
from mixlm.core.options import GenerationOptions, Options
from mixlm.engines import Engine, EngineSpec, runs_as_gguf
from mixlm.engines import load as load_engine
from mixlm.ensemble import Ensemble, MemberSpec
from mixlm.errors import ConfigError, UsageError
from mixlm.routing import FixedRouter, LearnedRouter, PromptRouter, Router
from mixlm.types import Floats

Progress = Callable[[str], None]
# End-of-text tokens that `ignore_end` masks among a member's top k; no model has more.
_MAX_END_TOKENS = 16


def load(  # noqa: PLR0913 - one option each
    *models: str | Path,
    weights: Sequence[float] | None = None,
    method: Method | None = None,
    unit: UnitName | None = None,
    rule: Rule | None = None,
    dtype: DType | None = None,
    device: str | None = None,
    engine: EngineName | None = None,
    graphs: Graphs | None = None,
    **sampling: Any,
) -> Ensemble:
    """Load an ensemble.

    Args:
        models: Names, folders, GGUF files or hub ids; or one ensemble file (`*.toml`).
        weights: One a model; equal when left out.
        engine: "llamacpp" is about twice as fast for models in GGUF form, and reports its most likely tokens only;
            other engines can compute every option.
        graphs: Whether short forwards run in fixed shapes, as CUDA graphs where there is CUDA; "auto" only there.
        sampling: Options of `Sampling` for every member.

    Options that are given replace those of the ensemble file.

    Raises:
        MixlmError: See `mixlm.errors`; each has a hint.

    >>> import mixlm
    >>> mixlm.load("toy:1", "toy:2", weights=[2, 1]).names
    ('toy-1', 'toy-2')
    """
    names = [str(model) for model in models]
    if not names:
        raise ConfigError("no model was named", "name one or more, for example mixlm.load('smollm2-135m')")
    if len(names) == 1 and names[0].endswith(".toml"):
        raw = read_config(names[0]).model_dump(exclude_none=True)
    else:
        raw = {"members": [{"model": name} for name in names]}
    raw |= {name: value for name, value in (("method", method), ("unit", unit), ("rule", rule)) if value is not None}
    raw["sampling"] = {**raw.get("sampling", {}), **sampling}
    for member in raw["members"]:
        member.pop("template_file", None)  # read by then
        overrides = (("dtype", dtype), ("device", device), ("engine", engine), ("graphs", graphs))
        member |= {name: value for name, value in overrides if value is not None}
    return load_config(parse_config(raw, "load"), weights=weights)


def load_config(
    config: EnsembleConfig,
    *,
    weights: Sequence[float] | None = None,
    progress: Progress | None = None,
    engines: dict[EngineSpec, Engine] | None = None,
    options: Options | None = None,
) -> Ensemble:
    """Load the ensemble that a configuration describes.

    Args:
        weights: Replace those of the configuration.
        progress: Called with each model's name before it is loaded.
        engines: Loaded engines to share where models are the same; engines that are loaded here join them.
        options: The generation options, if they are all that the ensemble is for. Members whose engine is "auto" then
            run in llama.cpp, where there is a GGUF file and llama.cpp can compute these options.
    """
    weights = weights if weights is not None else config.weights()
    engines = {} if engines is None else engines
    members: list[MemberSpec] = []
    for member in config.members:
        engine = member.engine
        if (
            engine == "auto"
            and options is not None
            and _fits_llamacpp(member, config, options)
            and runs_as_gguf(member.model)
        ):
            engine = "llamacpp"
        spec_fields = member.model_dump(include={field.name for field in fields(EngineSpec)})
        spec = EngineSpec(**{**spec_fields, "name": member.name or "", "engine": engine})
        key = replace(spec, name="")
        if key not in engines:
            engines[key] = _load_or_share(spec, engines, progress)
        name = _unique_name(member.name or engines[key].name, [other.name for other in members])
        members.append(MemberSpec(engines[key], name, {**config.sampling.options(), **member.sampling.options()}))
    defaults = GenerationOptions(
        method=config.method, system=config.system, rule=config.rule, on_failure=config.on_failure
    )
    router = _router(config.router, normalized_weights(weights, len(members)), [member.name for member in members])
    return Ensemble(members, weights, unit=config.unit, router=router, defaults=defaults)


def _fits_llamacpp(member: MemberConfig, config: EnsembleConfig, options: Options) -> bool:
    """Whether a member may run in llama.cpp: no option excludes it, and none needs the whole distribution."""
    if (
        member.adapter is not None
        or member.dtype != "auto"
        or member.graphs == "on"
        or member.device not in ("auto", "cpu")
        or config.router.kind == "prompt"
    ):
        return False
    try:
        settings = GenerationOptions(method=config.method).with_options(options)
        sampling = settings.member_sampling({**config.sampling.options(), **member.sampling.options()})
    except UsageError:
        return False  # raised again, where the generation begins
    if settings.method in ("speculative", "auto"):
        return False  # llama.cpp returns one position a request, so verifying several costs as much as generating them
    if sampling.has_penalties or settings.logit_bias or settings.json_schema is not None:
        return False
    return 1 <= sampling.top_k <= member.candidates - settings.ignore_end * _MAX_END_TOKENS


def _load_or_share(spec: EngineSpec, engines: Mapping[EngineSpec, Engine], progress: Progress | None) -> Engine:
    """Return an engine on weights that another engine has loaded, or load it."""
    for other, engine in engines.items():
        if other.weights_key == spec.weights_key and (shared := engine.with_spec(spec)) is not None:
            return shared
    if progress is not None:
        progress(spec.name or spec.model)
    return load_engine(spec)


def _router(config: RouterConfig, weights: Floats, names: Sequence[str]) -> Router:
    if config.kind == "prompt":
        return PromptRouter(weights) if config.sharpness is None else PromptRouter(weights, config.sharpness)
    if config.kind == "learned" and config.file is not None:
        learned = LearnedRouter.load(config.file)
        if sorted(learned.names) != sorted(names):
            raise ConfigError(
                f"the router in {config.file} was trained for {', '.join(learned.names)}",
                f"this ensemble's members are {', '.join(names)}",
            )
        # The order of members may differ from that in training: each keeps its own row.
        return LearnedRouter(learned.matrix[[learned.names.index(name) for name in names]], names)
    return FixedRouter(weights)


def _unique_name(name: str, names: Sequence[str]) -> str:
    """Return the name, numbered where another member has it."""
    numbered = (f"{name}-{number}" for number in range(2, len(names) + 3))
    return name if name not in names else next(candidate for candidate in numbered if candidate not in names)
