"""From names or an ensemble file to a loaded ensemble.

Members that name the same model share one copy of its weights, also where their chat templates or adapters differ.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from inspect import signature
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from mixlm.binding import LoadedMember
from mixlm.choices import DType, Graphs, Method, Quantization, UnitName
from mixlm.config import EnsembleConfig, MemberConfig, RouterConfig, parse_config, read_config
from mixlm.core.mixing import normalized_weights
from mixlm.core.options import OPTIONS, SAMPLING_OPTIONS, GenerationOptions
from mixlm.core.rule_options import AVERAGE_METHODS, RULE_PARAMETERS, AnyRule, is_average, rule_name
from mixlm.engines import Engine, EngineSpec, check_engine, runs_as_gguf
from mixlm.engines import load as load_engine
from mixlm.engines.base import LOADING_OPTIONS
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError, did_you_mean
from mixlm.routing.base import FixedRouter, Router, RouterFunction, as_router, observed_by
from mixlm.types import Floats

OnStage = Callable[[str], None]
LoadedPair = tuple[Any, Any]  # a model and a tokenizer of transformers
_USE_HF = "use --engine hf (engine='hf'), and keep it for all that is to be compared"


def load(  # noqa: PLR0913 - one option each
    *models: str | Path | LoadedPair,
    weights: Sequence[float] | None = None,
    method: Method | None = None,
    unit: UnitName | None = None,
    rule: AnyRule | None = None,
    dtype: DType | None = None,
    device: str | None = None,
    engine: str | None = None,
    graphs: Graphs | None = None,
    prefix_cache: int | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
    max_memory: Mapping[str | int, str] | None = None,
    quantization: Quantization | None = None,
    revision: str | None = None,
    attn: str | None = None,
    trust_remote_code: bool | None = None,
    router: Router | RouterFunction | None = None,
    **sampling: Any,
) -> Ensemble:
    """Load an ensemble.

    Args:
        models: Names, folders, GGUF files or hub ids; or one ensemble file (`*.toml`). Also pairs of a model and its
            tokenizer that transformers has loaded, PEFT and quantised models too: the member uses their tensors, as
            they are, and leaves both as they are; options of loading are of the other models.
        weights: One a model; equal when left out.
        engine: What runs the models: "hf", "llamacpp", "vllm", "remote", or an engine of an installed package; "auto"
            is `choose_engine`'s choice.
        graphs: Whether short forwards run in fixed shapes, as CUDA graphs where there is CUDA; "auto" only there.
        prefix_cache: MiB of KV caches that a model of transformers keeps, so that texts with the same beginning read it
            once; 0 for none, 1024 by default.
        device_map: Where the layers of each model go, through accelerate: "auto", "balanced", "balanced_low_0",
            "sequential", or a device for each module ("cpu", "cuda:1" or 1, "disk"). For engine "hf", as what follows.
        max_memory: Of each device, for a `device_map` that is a name, such as {"cuda:0": "20GiB", "cpu": "60GiB"};
            0 is "cuda:0".
        quantization: How weights are stored that are not quantised in their files: a name in `choices.QUANTIZATIONS`.
        revision: Branch, tag or commit of hub ids.
        attn: Transformers' attention implementation, such as "sdpa", where mixlm has none of its own.
        trust_remote_code: Whether Python code in the folders of models may run; it does not by default.
        router: Weights that depend on the prompt or the text, in place of `weights`: a router of `mixlm.routing`, or a
            function of the prompt and the last 4096 bytes of the text so far, both bytes, that returns one weight per
            member.
        rule: How the members' distributions are combined, in place of the average: a rule's name, a `Combination`, or a
            function of probabilities and weights. Its parameters (`strength` and so on) may follow.
        sampling: Options of `Sampling` for every member, and parameters of the rule.

    Where standard error is a terminal, or in a notebook, the progress is shown there.

    Options that are given replace those of the ensemble file.

    Raises:
        MixlmError: See `mixlm.errors`; each has a hint.

    >>> import mixlm
    >>> mixlm.load("toy:1", "toy:2", weights=[2, 1]).names
    ('toy:1', 'toy:2')
    """
    pairs: dict[str, LoadedPair] = {}
    names = [_model_name(model, pairs) for model in models]
    if not names:
        raise ConfigError("no model was named", "name one or more, for example mixlm.load('smollm2-135m')")
    if len(names) == 1 and names[0].lower().endswith(".toml"):
        raw = read_config(names[0]).model_dump(exclude_none=True)
    elif files := [name for name in names if name.lower().endswith(".toml")]:
        raise ConfigError(
            f"{files[0]} is an ensemble file, and is loaded alone", "write all members into it, or name no file"
        )
    else:
        raw = {"members": [{"model": name} for name in names]}

    def load_member(spec: EngineSpec) -> Engine:
        return _engine_of(spec, pairs[spec.model]) if spec.model in pairs else load_engine(spec)

    raw |= {name: value for name, value in (("method", method), ("unit", unit)) if value is not None}
    parameters = {name: value for name in RULE_PARAMETERS if (value := sampling.pop(name, None)) is not None}
    if method is None and not is_average(rule) and raw.get("method") in AVERAGE_METHODS:
        del raw["method"]
    own_rule = None if rule is None or isinstance(rule, str) else rule
    if parameters and (own_rule is not None or (rule is None and "combination" not in raw)):
        reason = "without a rule, and the average has none" if own_rule is None else "beside a rule that is no name"
        raise ConfigError(f"{next(iter(parameters))} is given {reason}", "name a rule too, such as rule='geometric'")
    if own_rule is not None:
        raw.pop("combination", None)
        raw.setdefault("method", "layered")
    elif rule is not None:
        raw["combination"] = {"rule": rule, **parameters}
    elif parameters:
        raw["combination"] = {**raw["combination"], **parameters}
    raw["sampling"] = {**raw.get("sampling", {}), **_sampling_keywords(sampling)}
    if isinstance(max_memory, Mapping):
        max_memory = {f"cuda:{name}" if isinstance(name, int) else name: size for name, size in max_memory.items()}
    of_files: dict[str, Any] = {
        **{"dtype": dtype, "device": device, "engine": engine, "trust_remote_code": trust_remote_code},
        **{"device_map": device_map, "max_memory": max_memory, "quantization": quantization},
        **{"revision": revision, "attn": attn},
    }
    _check_loading_options(of_files, [name for name in names if name not in pairs])
    for member in raw["members"]:
        member.pop("template_file", None)  # read by then
        overrides: dict[str, Any] = {"graphs": graphs, "prefix_cache": prefix_cache}
        overrides |= {"engine": "hf"} if member["model"] in pairs else of_files
        member |= {name: value for name, value in overrides.items() if value is not None}
    config = parse_config(raw, None)
    with shown_progress(len(config.members)) as progress:
        return load_config(
            config, weights=weights, router=router, progress=progress, load_engine=load_member, rule=own_rule
        )


def _check_loading_options(options: Mapping[str, Any], files: Sequence[str]) -> None:
    """Raise ConfigError for options of loading where all models are loaded already. files: the other models."""
    unset = (None, "auto", False)
    given = [name for name, value in options.items() if value not in unset and (name, value) != ("engine", "hf")]
    if given and not files:
        raise ConfigError(
            f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} given, and all models are loaded already",
            "leave it out: they stay as they are; from_pretrained has such options",
        )


def _sampling_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return keywords of `load` that are options of `Sampling`. Raises ConfigError for others."""
    for name in keywords:
        if name not in SAMPLING_OPTIONS:
            raise ConfigError(f"unknown option {name!r}", _keyword_hint(name))
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in keywords.items()}


def _keyword_hint(name: str) -> str | None:
    """Return what to do about a keyword that `load` does not have."""
    if name in ("model", "models"):
        return "models are named first: mixlm.load('MODEL', 'MODEL')"
    if name in OPTIONS:
        return f"it is an option of each generation: ensemble.generate(…, {name}=…)"
    if name in MemberConfig.model_fields:
        return "it is a key of a member: write it into an ensemble file, and load that"
    return did_you_mean(name, [*signature(load).parameters, *SAMPLING_OPTIONS, *RULE_PARAMETERS])


def _model_name(model: Any, pairs: dict[str, LoadedPair]) -> str:
    """Return what stands for a model in a configuration; a loaded pair is noted in `pairs`. Raises ConfigError."""
    if isinstance(model, str | Path):
        return str(model)
    if isinstance(model, tuple) and len(model) == 2 and not any(isinstance(part, str | Path) for part in model):
        for name, pair in pairs.items():
            if all(part is other for part, other in zip(pair, model, strict=True)):
                return name
        path = getattr(getattr(model[0], "config", None), "name_or_path", "") or type(model[0]).__name__
        name = f"{Path(path).name} (loaded pair {len(pairs) + 1})"
        pairs[name] = model
        return name
    if isinstance(model, list | tuple | set) and all(isinstance(name, str | Path) for name in model):
        call = ", ".join(repr(str(name)) for name in model)
        raise ConfigError(f"the model is {model!r}, and models are named one by one", f"mixlm.load({call})")
    shown = repr(model)  # of a loaded model, it has a line for each layer
    if len(shown) > 80:
        shown = f"a {type(model).__name__}"
    raise ConfigError(
        f"the model is {shown}; it must be a name or a path", "or a pair of loaded objects: (model, tokenizer)"
    )


def _engine_of(spec: EngineSpec, pair: LoadedPair) -> Engine:
    """Return the engine of a loaded pair."""
    from mixlm.engines.transformers.engine import HFEngine

    name = spec.name or spec.model.rpartition(" (")[0]
    return HFEngine.from_objects(replace(spec, name=name), *pair)


def load_config(  # noqa: PLR0913 - one option each
    config: EnsembleConfig,
    *,
    weights: Sequence[float] | None = None,
    router: Router | RouterFunction | None = None,
    progress: OnStage | None = None,
    engines: dict[EngineSpec, Engine] | None = None,
    load_engine: Callable[[EngineSpec], Engine] = load_engine,
    sequences: int = 4,
    rule: AnyRule | None = None,
) -> Ensemble:
    """Load the ensemble that a configuration describes.

    Args:
        weights: Replace those of the configuration.
        router: Replaces that of the configuration.
        progress: Called with each model's name before it is loaded.
        engines: Loaded engines to share where models are the same; engines that are loaded here join them.
        load_engine: Loads an engine.
        sequences: How many sequences will run together: the default of `slots`, for each member on the same model.
        rule: Replaces the combination of the configuration.
    """
    weights = weights if weights is not None else config.weights()
    checked_weights = normalized_weights(weights, len(config.members))
    for member in config.members:
        check_engine(member.engine, f"engine of member {member.name or member.model}")
    if router is not None:
        router = as_router(router, len(config.members))
    elif config.router.kind == "prompt":
        check_full_distributions(config, "the router by prompt")
    engines = {} if engines is None else engines
    members: list[LoadedMember] = []
    for member in config.members:
        spec_fields = member.model_dump(include={field.name for field in fields(EngineSpec)})
        sharing = sum(other.model == member.model for other in config.members)
        slots = member.slots or sequences * sharing
        spec_fields |= {"name": member.name or "", "engine": choose_engine(member), "slots": slots}
        for name in ("device_map", "max_memory"):  # a spec is a key
            if isinstance(table := spec_fields[name], dict):
                spec_fields[name] = tuple(table.items())
        spec = EngineSpec(**spec_fields)
        key = replace(spec, name="")
        if key not in engines:
            engines[key] = _load_or_share(spec, engines, progress, load_engine)
        name = _unique_name(member.name or engines[key].name, [other.name for other in members])
        sampling = {**config.sampling.options(), **member.sampling.options()}
        members.append(LoadedMember(engines[key], name, sampling, member.role))
    names = [member.name for member in members]
    rule_options = _rule_options(config, names) if rule is None else {"rule": rule}
    if rule is not None and config.method == "single":
        raise ConfigError(
            f"rule is {rule_name(rule)}, and method single samples one member without a rule", "leave one out"
        )
    defaults = GenerationOptions(
        method=config.method, system=config.system, on_failure=config.on_failure, **rule_options
    )
    given = next((member for member in config.members if member.role is not None), None)
    if given is not None and config.combination is None and rule is None:
        raise ConfigError(
            f"{given.name or given.model} has the role {given.role!r}, and there is no rule",
            "leave it out, or name a rule with roles, such as contrastive",
        )
    if router is None:
        router = _router(config.router, checked_weights, names)
    if (observes := observed_by(router, len(members))) is not None:
        from mixlm.decoding import check_observing

        check_observing(config.method, names[observes.member])
    return Ensemble(members, weights, unit=config.unit, router=router, defaults=defaults)


def choose_engine(member: MemberConfig) -> str:
    """Return the engine of a member: the one that it names, else the one for its model.

    A GGUF file, or a model of the catalog, runs in llama.cpp where that is installed; everything else in transformers,
    but for toys and models behind servers. The choice depends on the model and the installed packages alone, so that
    every command, method and option gives the text of one engine.

    Raises:
        UnsupportedError: The member has an option that llama.cpp has not.
    """
    if member.engine != "auto" or not runs_as_gguf(member.model):
        return member.engine
    if member.graphs == "on":
        raise UnsupportedError(f"graphs is 'on', and {member.model} runs in llama.cpp", _USE_HF)
    if (option := next((name for name in LOADING_OPTIONS if getattr(member, name) is not None), None)) is not None:
        raise UnsupportedError(f"{option} is given, and {member.model} runs in llama.cpp", _USE_HF)
    return "llamacpp"


def check_full_distributions(config: EnsembleConfig, purpose: str) -> None:
    """Raise UnsupportedError where a member's engine is known to report its most likely tokens only."""
    for member in config.members:
        if choose_engine(member) == "llamacpp":
            raise UnsupportedError(
                f"{purpose} needs every token's probability, and llama.cpp reports the {member.candidates} most likely "
                f"of {member.name or member.model} only",
                _USE_HF,
            )


def _load_or_share(
    spec: EngineSpec,
    engines: Mapping[EngineSpec, Engine],
    progress: OnStage | None,
    load_engine: Callable[[EngineSpec], Engine],
) -> Engine:
    """Return an engine on weights that another engine has loaded, or load it."""
    for other, engine in engines.items():
        if other.weights_key == spec.weights_key and (shared := engine.with_spec(spec)) is not None:
            return shared
    if progress is not None:
        progress(spec.name or spec.model)
    return load_engine(spec)


def _rule_options(config: EnsembleConfig, names: Sequence[str]) -> dict[str, Any]:
    """Return the rule and its parameters; a rule with a trained gate as an object."""
    if config.combination is None or config.combination.accept is None:
        return config.rule_options()
    from mixlm.core.combinations.defer import Defer
    from mixlm.routing.deferral import DeferralGate

    gate = DeferralGate.load(config.combination.accept)
    if gate.names != tuple(names):
        raise ConfigError(
            f"the gate in {config.combination.accept} was trained for {', '.join(gate.names)}, in that order",
            f"this ensemble's members are {', '.join(names)}",
        )
    return {"rule": Defer(accept=gate)}


def _router(config: RouterConfig, weights: Floats, names: Sequence[str]) -> Router:
    if config.kind == "prompt":
        from mixlm.routing.prompt import PromptRouter

        return PromptRouter(weights) if config.sharpness is None else PromptRouter(weights, config.sharpness)
    if config.kind == "learned" and config.file is not None:
        from mixlm.routing.gate_router import load_router

        learned = load_router(config.file)
        if sorted(learned.names) != sorted(names):
            raise ConfigError(
                f"the router in {config.file} was trained for {', '.join(learned.names)}",
                f"this ensemble's members are {', '.join(names)}",
            )
        return learned.for_members(names)  # their order may differ from that in training
    return FixedRouter(weights)


@contextmanager
def shown_progress(models: int) -> Iterator[OnStage | None]:
    """Yield a function that shows what is loaded: in a bar at a terminal, in lines in a notebook, else None."""
    if "ipykernel" in sys.modules:
        yield lambda name: print(f"loading {name}", file=sys.stderr, flush=True)
        return
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from mixlm.terminal import progress_bars

    with progress_bars(single=True) as show:
        loaded = count()
        yield None if show is None else lambda name: show(f"loading {name}", next(loaded), models)


def _unique_name(name: str, names: Sequence[str]) -> str:
    """Return the name, numbered where another member has it."""
    numbered = (f"{name}-{number}" for number in range(2, len(names) + 3))
    return name if name not in names else next(candidate for candidate in numbered if candidate not in names)
