"""The options that several commands share: those of the ensemble, and those of a generation (the table of options)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_origin, get_type_hints

from typer import Option

from mixlm.choices import DTYPES, GRAPHS, METHODS, QUANTIZATIONS, UNITS
from mixlm.core.options import OPTIONS, RULE_OPTIONS, SAMPLING_OPTIONS, GenerationOptions, Options
from mixlm.core.rule_options import AVERAGE_METHODS, build_rule, check_rule, is_average
from mixlm.errors import ConfigError, ModelNotFoundError, UsageError
from mixlm.option_spec import OptionSpec
from mixlm.types import Sampling

if TYPE_CHECKING:
    from mixlm.config import EnsembleConfig, MemberConfig

_DEFAULTS = {field.name: field.default for field in (*fields(Sampling), *fields(GenerationOptions))}


def flag(form: str, text: str, panel: str | None = None, *, shown: bool = True, hidden: bool = False) -> Any:
    """Return an option of a command.

    form: its names, and what help calls its value, such as "-m --model MODEL". text: what it does. panel: heading under
    which help lists it. shown: whether help shows a default that is a value. hidden: whether help leaves it out.
    """
    names = [word for word in form.split() if word.startswith("-")]
    metavar = " ".join(form.split()[len(names) :]) or None
    return Option(*names, metavar=metavar, help=text, rich_help_panel=panel, show_default=shown, hidden=hidden)


_ensemble = functools.partial(flag, panel="Ensemble")


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The shared options of a command line. None is "not set": a file's value or a default applies.

    Attributes:
        generation: The options of a generation that are set, by name; see `GenerationOptions` and `Sampling`.
    """

    model: Annotated[
        list[str] | None,
        _ensemble(
            "-m --model MODEL",
            "A member: a name, a folder, a .gguf file, a hub id or a server's URL. Repeatable. Default: the demo pair.",
        ),
    ] = None
    ensemble: Annotated[
        Path | None, _ensemble("-e --ensemble FILE", "A TOML file that describes the ensemble, in place of -m.")
    ] = None
    weights: Annotated[
        str | None, _ensemble("-w --weights W,W", "One weight per member, such as 0.7,0.3. Default: equal.")
    ] = None
    unit: Annotated[str | None, _ensemble("--unit NAME", f"{', '.join(UNITS)}. Default: auto.")] = None
    dtype: Annotated[str | None, _ensemble("--dtype NAME", f"{', '.join(DTYPES)}: data type of the weights.")] = None
    device: Annotated[str | None, _ensemble("--device NAME", "cpu, cuda, cuda:1 and so on. Default: auto.")] = None
    engine: Annotated[
        str | None,
        _ensemble(
            "--engine NAME",
            "What runs the members: auto, hf, llamacpp, vllm, remote, or an engine of an installed package.",
        ),
    ] = None
    graphs: Annotated[
        str | None, _ensemble("--graphs NAME", f"{', '.join(GRAPHS)}: short forwards as CUDA graphs. Default: auto.")
    ] = None
    prefix_cache: Annotated[
        int | None,
        _ensemble(
            "--prefix-cache MIB",
            "Memory for texts that others may begin with (hf), so that they run once. Default: 1024; 0: none.",
        ),
    ] = None
    device_map: Annotated[
        str | None,
        _ensemble(
            "--device-map MAP",
            "Spread models (hf) over devices: auto, balanced, sequential, or MODULE=DEVICE,… (cpu, cuda:1, disk).",
        ),
    ] = None
    max_memory: Annotated[
        str | None, _ensemble("--max-memory DEV=SIZE,…", "What --device-map auto may use: cuda:0=20GiB,cpu=60GiB.")
    ] = None
    quantization: Annotated[
        str | None, _ensemble("--quantization NAME", f"{', '.join(QUANTIZATIONS)}: how weights are stored (hf).")
    ] = None
    revision: Annotated[str | None, _ensemble("--revision NAME", "Branch, tag or commit of hub ids (hf).")] = None
    attn: Annotated[
        str | None, _ensemble("--attn NAME", "Transformers' attention where mixlm's does not fit: sdpa, eager.")
    ] = None
    trust_remote_code: Annotated[
        bool, _ensemble("--trust-remote-code", "Run Python code in the folders of models.")
    ] = False
    debug: Annotated[bool, flag("--debug", "Show the traceback of an error.")] = False
    generation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str | None:
        """The method, if it is set."""
        return self.generation.get("method")

    @property
    def seed(self) -> int | None:
        """The seed, if it is set."""
        return self.generation.get("seed")

    @property
    def system(self) -> str | None:
        """The system message, if it is set; an empty one removes a file's."""
        return self.generation.get("system")

    def options(self) -> Options:
        """Return the options that are set, but for those of the ensemble. `GenerationOptions` checks them."""
        options = {name: value for name, value in self.generation.items() if name not in _OF_ENSEMBLE}
        if "system" in options:
            options["system"] = options["system"] or None
        return cast(Options, options)

    def config(self, *, dtype: str = "auto") -> EnsembleConfig:
        """Return the configuration of the ensemble, before anything is loaded.

        dtype: for members for which neither an option nor the file sets one.

        Raises:
            ConfigError: A value or the file is not valid.
            UsageError: Options exclude each other.
            ModelNotFoundError: No model is named, and the demo pair is not installed.
        """
        from mixlm.config import EnsembleConfig, MemberConfig, read_config

        allowed = {"method": METHODS, "unit": UNITS, "dtype": DTYPES, "graphs": GRAPHS, "quantization": QUANTIZATIONS}
        for name, choices in allowed.items():
            if (value := getattr(self, name)) is not None:
                OptionSpec(choices=choices).check(f"--{name}", value)
        changes: dict[str, Any] = {"method": self.method, "unit": self.unit}
        changes = {name: value for name, value in changes.items() if value is not None}
        rule = _given_rule(self.generation)
        if self.prefix_cache is not None and self.prefix_cache < 0:
            raise ConfigError(f"--prefix-cache is {self.prefix_cache}; it must be 0 or more MiB")
        if self.engine is not None:
            from mixlm.engines import check_engine

            check_engine(self.engine, "--engine")
        if self.model and self.ensemble is not None:
            raise UsageError("--model and --ensemble are both given", "name the members here or in the file, not both")
        if self.ensemble is not None:
            config = read_config(self.ensemble)
        else:
            names = self.model or demo()
            if files := [name for name in names if name.lower().endswith(".toml")]:
                raise UsageError(f"-m {files[0]} names an ensemble file, not a model", f"use: -e {files[0]}")
            config = EnsembleConfig(members=tuple(MemberConfig(model=name) for name in names))
        if (self.method or config.method) == "single" and rule.get("rule", "average") != "average":
            method = "--method single" if self.method else f"method = 'single' in {self.ensemble}"
            raise UsageError(
                f"--rule {rule['rule']} and {method} are both given, and single samples one member without a rule",
                "omit one",
            )
        if rule:
            changes |= _with_rule(config, rule, self.method)
        changes["members"] = tuple(self._with_machine(member, dtype) for member in config.members)
        return config.model_copy(update=changes)

    def _with_machine(self, member: MemberConfig, dtype: str) -> MemberConfig:
        """Return a member with what the options say of the machine."""
        names = ("dtype", "device", "engine", "graphs", "prefix_cache", "quantization", "revision", "attn")
        values: dict[str, Any] = {name: getattr(self, name) for name in (*names, "trust_remote_code")}
        values["device_map"] = _pairs("--device-map", self.device_map)
        values["max_memory"] = _pairs("--max-memory", self.max_memory)
        changes = {name: value for name, value in values.items() if value is not None and value is not False}
        if member.dtype == "auto":
            changes.setdefault("dtype", dtype)
        return member.model_copy(update=changes)

    def numbers(self) -> list[float] | None:
        """Return the weights as numbers, None if they are not set. Raises ConfigError for what is not a number."""
        return None if self.weights is None else parse_numbers("--weights", self.weights, "-w 0.7,0.3")


def parse_numbers(option: str, text: str, example: str) -> list[float]:
    """Return numbers with commas between them. Raises ConfigError for what is not a number."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        allowed = f"{option} is {text!r}; it must be numbers with commas between them"
        raise ConfigError(allowed, f"such as: {example}") from None


def check_counts(**counts: int | None) -> None:
    """Raise ConfigError for an option, by its name, that is less than 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"--{name} is {count}; it must be 1 or more")


def _pairs(option: str, text: str | None) -> str | dict[str, str] | None:
    """Return `KEY=VALUE,KEY=VALUE` as a dictionary; --device-map may also be a name. Raises ConfigError."""
    if text is None or (option == "--device-map" and "=" not in text):
        return text
    pairs = [pair.rpartition("=") for pair in text.split(",")]
    if not all(equals and value for _, equals, value in pairs):
        example = "model.embed_tokens=cpu,=cuda:0" if option == "--device-map" else "cuda:0=20GiB,cpu=60GiB"
        raise ConfigError(f"{option} is {text!r}; it must be KEY=VALUE,KEY=VALUE", f"such as: {option} {example}")
    return {key: value for key, _, value in pairs}


def _given_rule(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rule and its parameters, where they are set. Raises UsageError for two rules."""
    rule = {name: generation[name] for name in RULE_OPTIONS if name in generation}
    name = "mean-then-truncate"
    if rule.pop("mix_then_truncate", False) and rule.setdefault("rule", name) != name:
        raise UsageError(f"--rule {rule['rule']} and --mix-then-truncate are both given", "omit one")
    return rule


def _with_rule(config: EnsembleConfig, options: Mapping[str, Any], method: str | None) -> dict[str, Any]:
    """Return the changes of a configuration that a rule and its parameters make, and the method where none is given.

    Raises:
        ConfigError: There is no such rule, or no rule for the parameters.
    """
    from mixlm.config import CombinationConfig

    base = {} if "rule" in options else config.rule_options()
    values = {**base, **options}
    if "rule" not in values:
        name = next(iter(options))
        raise ConfigError(f"--{name} is given without a rule, and the average has none", "name one with --rule")
    if "rule" not in options and config.combination is not None and config.combination.accept is not None:
        name = next(iter(options))
        raise ConfigError(
            f"--{name} is given, and rule {values['rule']} of the ensemble file has a trained gate (accept)",
            f"omit it, or name the rule too, without the gate: --rule {values['rule']}",
        )
    check_rule(values["rule"])
    build_rule(values["rule"], {name: value for name, value in values.items() if name != "rule"})
    changes: dict[str, Any] = {"combination": CombinationConfig(**values)}
    if method is None and config.method in AVERAGE_METHODS and not is_average(values["rule"]):
        changes["method"] = "layered"
    return changes


def demo() -> Sequence[str]:
    """Return the names of the demo pair. Raises ModelNotFoundError, with what to do, if it is not installed."""
    from mixlm.models.cache import find
    from mixlm.models.catalog import GROUPS

    names = GROUPS["demo"]
    if missing := [name for name in names if find(name) is None]:
        raise ModelNotFoundError(
            f"no model is given, and the demo pair is not installed: {' and '.join(missing)} missing",
            "run: mixlm models get demo",
        )
    return names


def with_shared(*, unused: Sequence[str] = (), reason: str = "") -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command the shared options, which it takes as one parameter `shared`, in addition to its own.

    unused: generation options without an effect on this command, for a reason: help leaves them out, and they are
    refused.
    """

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        own = get_type_hints(command, include_extras=True)
        parameters = [
            parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=own[parameter.name])
            for parameter in signature(command).parameters.values()
            if parameter.name != "shared"
        ]
        hints = get_type_hints(Shared, include_extras=True)
        ensemble = [
            Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
            for field in fields(Shared)
            if field.name != "generation"
        ]
        shared_parameters = [*ensemble[:3], *_generation_parameters(unused), *ensemble[3:]]  # the order of --help

        @functools.wraps(command)
        def wrapped(**values: Any) -> int:
            shared = Shared(
                **{parameter.name: values.pop(parameter.name) for parameter in ensemble},
                generation={name: value for name in _SHARED_OPTIONS if _is_set(value := values.pop(name))},
            )
            verb = {"evaluate": "eval"}.get(command.__name__, command.__name__)
            refuse_options(shared, verb, unused, reason)
            return command(shared=shared, **values)

        wrapped.__signature__ = Signature([*parameters, *shared_parameters])  # type: ignore[attr-defined]
        return wrapped

    return decorate


def refuse_options(shared: Shared, command: str, names: Collection[str], reason: str) -> None:
    """Raise UsageError where one of these generation options is given, which would do nothing."""
    if given := [option_flag(name) for name in shared.generation if name in names]:
        raise UsageError(f"mixlm {command} does not use {', '.join(given)}: {reason}", "omit it")


def option_flag(name: str) -> str:
    """Return the name of an option on the command line."""
    return f"--{name.replace('_', '-')}"


def _generation_parameters(hidden: Sequence[str]) -> list[Parameter]:
    """Return a parameter for each shared option of the table; those that are hidden are not in help."""
    hints = {**get_type_hints(Sampling), **get_type_hints(GenerationOptions)}
    return [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=False if hints[name] is bool else None,
            annotation=Annotated[_parsed_type(hints[name]), generation_option(name, hidden=name in hidden)],
        )
        for name in _SHARED_OPTIONS
    ]


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value not in ((), [])


def _parsed_type(hint: Any) -> Any:
    """Return the type that an option is parsed as: names are checked later, with a hint."""
    if hint in (bool, int, float, float | None):
        return hint if hint is bool else hint | None
    return list[str] | None if get_origin(hint) is tuple else str | None


def generation_option(name: str, *, hidden: bool = False) -> Any:
    """Return the command-line option of an entry of the table of options."""
    spec, default = OPTIONS[name], _DEFAULTS[name]
    text = f"{', '.join(spec.choices)}: {spec.help}." if spec.choices else spec.help
    if spec.default_text or (_is_set(default) and default is not MISSING):
        text += f" Default: {spec.default_text or default}."
    return flag(f"{option_flag(name)} {spec.metavar or ''}", text, str(spec.panel), hidden=hidden)


# In the order of --help: penalties, which are applied first, come last.
_SHARED_OPTIONS = [
    "method",
    *sorted(SAMPLING_OPTIONS, key=lambda name: name.endswith("penalty")),
    *(name for name, spec in OPTIONS.items() if spec.panel and name != "method" and name not in SAMPLING_OPTIONS),
]
_OF_ENSEMBLE = ("method", *RULE_OPTIONS)
# Options without an effect on what members make of given texts, and why they have none.
NOT_FOR_SCORING = tuple(name for name in _SHARED_OPTIONS if name not in ("system", *RULE_OPTIONS))
SCORED_AS_THEY_ARE = "members are scored as they are"
