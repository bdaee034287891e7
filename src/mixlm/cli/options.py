"""The options that several commands share, and what they ask for: an ensemble, its weights, and a reply's options."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

from typer import Option

from mixlm.config import DTYPES, ENGINES, GRAPHS, METHODS, RULES, UNITS, EnsembleConfig, MemberConfig, read_config
from mixlm.core.options import GenerationOptions
from mixlm.errors import ConfigError, ModelNotFoundError, UsageError, did_you_mean
from mixlm.types import Sampling

if TYPE_CHECKING:
    from mixlm.core.options import Options

_SAMPLING = tuple(one.name for one in fields(Sampling))
_DEFAULTS = {one.name: one.default for one in (*fields(Sampling), *fields(GenerationOptions))}
_CONFIG = {name: field.default for name, field in EnsembleConfig.model_fields.items()}


def _option(panel: str, *names: str, metavar: str, text: str) -> Any:
    return Option(*names, metavar=metavar, help=text, rich_help_panel=panel, show_default=False)


_ensemble = functools.partial(_option, "Ensemble")
_reply = functools.partial(_option, "Reply")


def _sampling(name: str, metavar: str, text: str) -> Any:
    return _option(
        "Sampling", f"--{name.replace('_', '-')}", metavar=metavar, text=f"{text} Default: {_DEFAULTS[name]}."
    )


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What was given of the shared options. None stands for not given, so that a file's value or a default holds."""

    model: Annotated[
        list[str] | None,
        _ensemble(
            "-m",
            "--model",
            metavar="MODEL",
            text="A member: a name, a folder, a .gguf file or a hub id. Once for each member. Default: the demo pair.",
        ),
    ] = None
    ensemble: Annotated[
        Path | None,
        _ensemble("-e", "--ensemble", metavar="FILE", text="A TOML file that describes the ensemble, in place of -m."),
    ] = None
    weights: Annotated[
        str | None,
        _ensemble("-w", "--weights", metavar="W,W", text="One weight a member, such as 0.7,0.3. Default: equal."),
    ] = None
    method: Annotated[
        str | None,
        _ensemble("--method", metavar="NAME", text=f"{', '.join(METHODS)}. Default: {_CONFIG['method']}."),
    ] = None
    unit: Annotated[
        str | None, _ensemble("--unit", metavar="NAME", text=f"{', '.join(UNITS)}. Default: {_CONFIG['unit']}.")
    ] = None
    dtype: Annotated[
        str | None, _ensemble("--dtype", metavar="NAME", text=f"{', '.join(DTYPES)}: of every member's weights.")
    ] = None
    device: Annotated[
        str | None, _ensemble("--device", metavar="NAME", text="cpu, cuda, cuda:1 and so on. Default: auto.")
    ] = None
    engine: Annotated[
        str | None, _ensemble("--engine", metavar="NAME", text=f"{', '.join(ENGINES)}: what runs the members.")
    ] = None
    graphs: Annotated[
        str | None,
        _ensemble(
            "--graphs", metavar="NAME", text=f"{', '.join(GRAPHS)}: short forwards as CUDA graphs. Default: auto."
        ),
    ] = None
    temperature: Annotated[
        float | None, _sampling("temperature", "T", "Divides the logits; 0 is for greedy and single.")
    ] = None
    top_k: Annotated[int | None, _sampling("top_k", "K", "Keep the K most likely tokens; 0 is off.")] = None
    top_p: Annotated[float | None, _sampling("top_p", "P", "Keep the likeliest tokens of mass P; 1 is off.")] = None
    min_p: Annotated[
        float | None, _sampling("min_p", "P", "Keep tokens of at least P times the likeliest one's probability.")
    ] = None
    repetition_penalty: Annotated[
        float | None, _sampling("repetition_penalty", "X", "Against tokens of prompt and reply; 1 is off.")
    ] = None
    presence_penalty: Annotated[
        float | None, _sampling("presence_penalty", "X", "Once against each token of the reply.")
    ] = None
    frequency_penalty: Annotated[
        float | None, _sampling("frequency_penalty", "X", "Against each occurrence in the reply.")
    ] = None
    mix_then_truncate: Annotated[
        bool,
        Option(
            "--mix-then-truncate",
            help="Truncate and temper the average in place of each member; conventional only.",
            rich_help_panel="Sampling",
        ),
    ] = False
    rule: Annotated[
        str | None,
        _option(
            "Sampling",
            "--rule",
            metavar="NAME",
            text=f"{', '.join(RULES)}: a published way to average, to compare with; conventional only.",
        ),
    ] = None
    max_tokens: Annotated[
        int | None, _reply("--max-tokens", metavar="N", text=f"Write at most N. Default: {_DEFAULTS['max_tokens']}.")
    ] = None
    stop: Annotated[
        list[str] | None, _reply("--stop", metavar="TEXT", text="End the reply before TEXT. Can be repeated.")
    ] = None
    seed: Annotated[
        int | None, _reply("--seed", metavar="N", text="The same seed gives the same text. Default: a random one.")
    ] = None
    draft: Annotated[
        str | None,
        _reply(
            "--draft",
            metavar="NAME",
            text="What writes ahead in speculative and greedy: a member's name, or lookup. Default: the cheapest member"
            " in speculative, lookup where none is clearly cheaper.",
        ),
    ] = None
    block: Annotated[
        int | None, _reply("--block", metavar="N", text=f"Guesses checked at once. Default: {_DEFAULTS['block']}.")
    ] = None
    on_failure: Annotated[
        str | None,
        _reply("--on-failure", metavar="NAME", text="error or drop: what to do when a member stops answering."),
    ] = None
    system: Annotated[str | None, _reply("--system", metavar="TEXT", text="A system message in front.")] = None
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False

    def options(self) -> Options:
        """Return the options of a reply that are given. Raises nothing: `GenerationOptions` checks them."""
        given = {
            name: getattr(self, name) for name in (*_SAMPLING, "max_tokens", "seed", "draft", "block", "on_failure")
        }
        given = {name: value for name, value in given.items() if value is not None}
        if self.stop:
            given["stop"] = tuple(self.stop)
        if self.system is not None:
            # An empty text is the way to leave out a file's system message.
            given["system"] = self.system or None
        if self.mix_then_truncate:
            given["mix_then_truncate"] = True
        return cast("Options", given)

    def config(self, *, dtype: str = "auto") -> EnsembleConfig:
        """Return the ensemble that is asked for. dtype: for members of which neither option nor file says anything.

        Raises ConfigError, UsageError or ModelNotFoundError, before anything is loaded.
        """
        changes: dict[str, Any] = {}
        machine = {"dtype": DTYPES, "engine": ENGINES, "graphs": GRAPHS}
        named = (("method", METHODS), ("unit", UNITS), ("rule", RULES), *machine.items())
        for name, allowed in named:
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ConfigError(
                    f"--{name} is {value!r}; it must be one of {', '.join(allowed)}", did_you_mean(value, allowed)
                )
            if value is not None and name not in machine:
                changes[name] = value
        if self.model and self.ensemble is not None:
            raise UsageError("--model and --ensemble are both given", "name the members here or in the file, not both")
        if self.ensemble is not None:
            config = read_config(self.ensemble)
        else:
            names = self.model or demo()
            config = EnsembleConfig(members=tuple(MemberConfig(model=one) for one in names))
        changes["members"] = tuple(self._with_machine(one, dtype) for one in config.members)
        return config.model_copy(update=changes)

    def _with_machine(self, member: MemberConfig, dtype: str) -> MemberConfig:
        """Return a member with the dtype, device, engine and graphs that are asked for."""
        if self.dtype is not None:
            dtype = self.dtype
        elif member.dtype != "auto":
            dtype = member.dtype
        engine = self.engine or member.engine
        device, graphs = self.device or member.device, self.graphs or member.graphs
        return member.model_copy(update={"dtype": dtype, "device": device, "engine": engine, "graphs": graphs})

    def numbers(self) -> list[float] | None:
        """Return the weights that are given as numbers. Raises ConfigError for anything that is no number."""
        if self.weights is None:
            return None
        try:
            return [float(one) for one in self.weights.split(",")]
        except ValueError:
            raise ConfigError(
                f"--weights is {self.weights!r}; it must be numbers with commas between them", "such as: -w 0.7,0.3"
            ) from None


def demo() -> Sequence[str]:
    """Return the names of the demo pair. Raises ModelNotFoundError, with what to do, when it is not installed."""
    from mixlm.models import GROUPS, find

    names = GROUPS["demo"]
    if lacking := [one for one in names if find(one) is None]:
        raise ModelNotFoundError(
            f"no model is given, and the demo pair is not installed: {' and '.join(lacking)} is missing",
            "run: mixlm models get demo",
        )
    return names


def with_shared(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command the shared options: it takes them as one parameter, `shared`, and may have others of its own."""
    own, theirs = get_type_hints(command, include_extras=True), get_type_hints(Shared, include_extras=True)
    parameters = [
        one.replace(kind=Parameter.KEYWORD_ONLY, annotation=own[one.name])
        for one in signature(command).parameters.values()
        if one.name != "shared"
    ]
    parameters += [
        Parameter(one.name, Parameter.KEYWORD_ONLY, default=one.default, annotation=theirs[one.name])
        for one in fields(Shared)
    ]

    @functools.wraps(command)
    def wrapped(**given: Any) -> int:
        shared = Shared(**{one.name: given.pop(one.name) for one in fields(Shared)})
        return command(shared=shared, **given)

    wrapped.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return wrapped
