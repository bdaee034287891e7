"""From names or an ensemble file to a loaded ensemble.

Members that name the same model share one copy of its weights, also where their prompts or adapters differ.
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
# Ends of text that a reply without end takes out of a member's likeliest tokens; no model has more.
_ENDS = 16


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
    """Load an ensemble of models: names, folders, GGUF files or hub ids; or of one ensemble file (`*.toml`).

    weights: one a model; equal when left out. engine: "llamacpp" is about twice as fast for models in GGUF form, and
    tells their likeliest tokens only; what is loaded without it can be asked anything. graphs: short forwards in fixed
    shapes, as CUDA graphs where there is CUDA; "auto" is there only. sampling: options of `Sampling`
    for every member. What is given goes over what an ensemble file says. Raises the errors of `mixlm.errors`, each with
    a hint.
    """
    names = [str(one) for one in models]
    if not names:
        raise ConfigError("no model was named", "name one or more, for example mixlm.load('smollm2-135m')")
    if len(names) == 1 and names[0].endswith(".toml"):
        raw = read_config(names[0]).model_dump(exclude_none=True)
    else:
        raw = {"members": [{"model": one} for one in names]}
    raw |= {name: value for name, value in (("method", method), ("unit", unit), ("rule", rule)) if value is not None}
    raw["sampling"] = {**raw.get("sampling", {}), **sampling}
    for member in raw["members"]:
        member.pop("template_file", None)  # read by then
        given = (("dtype", dtype), ("device", device), ("engine", engine), ("graphs", graphs))
        member |= {name: value for name, value in given if value is not None}
    return load_config(parse_config(raw, "load"), weights=weights)


def load_config(
    config: EnsembleConfig,
    *,
    weights: Sequence[float] | None = None,
    progress: Progress | None = None,
    engines: dict[EngineSpec, Engine] | None = None,
    options: Options | None = None,
) -> Ensemble:
    """Load the ensemble that a configuration describes. progress: called with each model's name before it is loaded.

    engines: those of other ensembles, to be shared where models are the same; what is loaded here joins them. options:
    those of the replies that it will write, if that is all it is for. Members whose engine is "auto" then run in
    llama.cpp, where there is a GGUF file and what llama.cpp tells is enough for these options.
    """
    weights = weights if weights is not None else config.weights()
    engines = {} if engines is None else engines
    members: list[MemberSpec] = []
    for one in config.members:
        engine = one.engine
        if (
            engine == "auto"
            and options is not None
            and _fits_llamacpp(one, config, options)
            and runs_as_gguf(one.model)
        ):
            engine = "llamacpp"
        own = one.model_dump(include={field.name for field in fields(EngineSpec)})
        spec = EngineSpec(**{**own, "name": one.name or "", "engine": engine})
        key = replace(spec, name="")
        if key not in engines:
            engines[key] = _engine(spec, engines, progress)
        name = _distinct(one.name or engines[key].name, [member.name for member in members])
        members.append(MemberSpec(engines[key], name, {**config.sampling.given(), **one.sampling.given()}))
    defaults = GenerationOptions(
        method=config.method, system=config.system, rule=config.rule, on_failure=config.on_failure
    )
    router = _router(config.router, normalized_weights(weights, len(members)), [one.name for one in members])
    return Ensemble(members, weights, unit=config.unit, router=router, defaults=defaults)


def _fits_llamacpp(member: MemberConfig, config: EnsembleConfig, options: Options) -> bool:
    """Whether a member may run in llama.cpp: nothing is said against it, and replies need no whole distribution."""
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
        sampling = settings.member_sampling({**config.sampling.given(), **member.sampling.given()})
    except UsageError:
        return False  # said again, where the reply is set up
    if settings.method in ("speculative", "auto"):
        return False  # llama.cpp gives one position a request, so checking several costs as much as writing them
    if sampling.has_penalties or settings.logit_bias or settings.json_schema is not None:
        return False
    return 1 <= sampling.top_k <= member.candidates - settings.ignore_end * _ENDS


def _engine(spec: EngineSpec, engines: Mapping[EngineSpec, Engine], progress: Progress | None) -> Engine:
    """Return an engine on weights that another one has loaded with_spec, or load it."""
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
        # Members may stand in another order than in training: each keeps its own row.
        return LearnedRouter(learned.matrix[[learned.names.index(name) for name in names]], names)
    return FixedRouter(weights)


def _distinct(name: str, taken: Sequence[str]) -> str:
    """Return the name, numbered when another member has it."""
    if name not in taken:
        return name
    return next(one for i in range(2, len(taken) + 3) if (one := f"{name}-{i}") not in taken)
