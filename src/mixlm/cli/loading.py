"""Load the ensemble that a command's options describe, and show the progress."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from mixlm.cli.display import dim
from mixlm.cli.options import Shared, option_flag
from mixlm.core.options import GenerationOptions
from mixlm.errors import ConfigError, MixlmError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mixlm.config import EnsembleConfig
    from mixlm.core.options import Options
    from mixlm.engines import Engine, EngineSpec
    from mixlm.ensemble import Ensemble


def open_ensemble(
    shared: Shared,
    options: Options,
    *,
    dtype: str = "auto",
    engines: dict[EngineSpec, Engine] | None = None,
    load_engine: Callable[[EngineSpec], Engine] | None = None,
    one_method: bool = False,
    sequences: int = 4,
) -> Ensemble:
    """Load the ensemble and show the notes of its engines.

    Args:
        shared: The shared options of the command.
        options: The generation options of the command.
        dtype: The dtype of members for which neither an option nor the ensemble file sets one.
        one_method: Whether the command uses no other method than the ensemble's.
        engines, load_engine, sequences: See `load_config`.

    Raises:
        ConfigError, UsageError: The options do not fit; raised before anything is loaded.
    """
    config = shared.config(dtype=dtype)
    if one_method and "block" in options and config.method not in ("speculative", "greedy", "auto", "layered"):
        raise UsageError(
            f"--block is given, and {config.method} does not draft", "omit it, or use --method speculative or greedy"
        )
    weights = shared.numbers()
    _check(config, weights, options)
    from mixlm.engines import load
    from mixlm.loading import load_config, shown_progress

    with shown_progress(len(config.members)) as progress:
        try:
            ensemble = load_config(
                config,
                weights=weights,
                progress=progress,
                engines=engines,
                load_engine=load_engine or load,
                sequences=sequences,
            )
        except MixlmError as error:
            error.message = _with_flags(error.message, shared)
            error.hint = error.hint and _with_flags(error.hint, shared)
            raise
    if shared.prefix_cache is not None and all(member.engine.backend != "transformers" for member in ensemble.members):
        raise UsageError("--prefix-cache is given, and no member runs in transformers", "omit it, or use --engine hf")
    if "mix_then_truncate" in shared.generation:
        dim("note: --mix-then-truncate is now --rule mean-then-truncate")
    for note in dict.fromkeys(note for member in ensemble.members for note in member.engine.notes):
        dim(f"note: {note}")
    return ensemble


def _with_flags(message: str, shared: Shared) -> str:
    """Return a message with the options of loading that are set on the command line as they are written there."""
    from mixlm.engines.base import LOADING_OPTIONS

    for name in LOADING_OPTIONS:
        if getattr(shared, name) is not None:
            message = re.sub(rf"(?<![\w'/.-]){name}(?![\w'/.-])", option_flag(name), message)
    return message


def _check(config: EnsembleConfig, weights: list[float] | None, options: Options) -> None:
    """Check options as the ensemble would, but before large models are loaded."""
    from mixlm.core.mixing import normalized_weights
    from mixlm.decoding import StrategyContext, build_strategy

    try:
        checked = normalized_weights(weights if weights is not None else config.weights(), len(config.members))
    except ConfigError as error:
        example = ",".join(["1"] * len(config.members))
        raise type(error)(error.message, error.hint or f"equal weights are -w {example}") from error
    if weights is not None and config.router.kind == "learned":
        raise UsageError("--weights is given, and the ensemble file has a learned router", "omit it")
    defaults = GenerationOptions(method=config.method, system=config.system, **config.rule_options())
    settings = defaults.with_options(options)
    sampling = [{**config.sampling.options(), **member.sampling.options()} for member in config.members]
    for member_sampling in sampling:
        settings.member_sampling(member_sampling)
    # Names of members are final once they are loaded, so the draft is checked then.
    names = [member.name or member.model for member in config.members]
    context = StrategyContext.unloaded(checked, names, sampling)
    if settings.combination is not None:
        from mixlm.generation.target import build_target

        roles = [member.role for member in config.members]
        target = build_target(settings, weights=checked, names=names, sampling=sampling, roles=roles, traits=None)
        context = replace(context, target=target)
    build_strategy(replace(settings, draft=None), context)
