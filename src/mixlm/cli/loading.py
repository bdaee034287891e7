"""From the options of a command to a loaded ensemble, with what a user sees meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from mixlm.cli.display import dim, terminal, visible
from mixlm.cli.options import Shared
from mixlm.core.options import GenerationOptions
from mixlm.errors import ConfigError

if TYPE_CHECKING:
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
    whole: bool = True,
) -> Ensemble:
    """Load the ensemble that is asked for, and show what its engines note.

    dtype: for members of which neither option nor file says anything. engines: see `load_config`. whole: whether more
    will be asked of the members than a reply with these options needs. What does not fit is said before anything loads.
    """
    config = shared.config(dtype=dtype)
    weights = shared.numbers()
    _check(config, weights, options)
    from mixlm.loading import load_config

    with _spinner(config) as progress:
        replies = None if whole else options
        ensemble = load_config(config, weights=weights, progress=progress, engines=engines, options=replies)
    for note in dict.fromkeys(note for one in ensemble.members for note in one.engine.notes):
        dim(f"note: {note}")
    return ensemble


def _check(config: EnsembleConfig, weights: list[float] | None, options: Options) -> None:
    """Refuse early what the ensemble would refuse: loading large models takes long."""
    from mixlm.core.mixing import checked_weights
    from mixlm.decoding import SpeculationStats, StrategyContext, build_strategy

    try:
        checked = checked_weights(weights if weights is not None else config.weights(), len(config.members))
    except ConfigError as error:
        example = ",".join(["1"] * len(config.members))
        raise type(error)(error.message, error.hint or f"equal weights are -w {example}") from error
    settings = GenerationOptions(method=config.method, system=config.system, rule=config.rule).with_options(options)
    own = [{**config.sampling.given(), **one.sampling.given()} for one in config.members]
    for one in own:
        settings.for_member(one)
    # A draft is named as its member will be once it is loaded, so that is checked then.
    names = [one.name or one.model for one in config.members]
    build_strategy(replace(settings, draft=None), StrategyContext.unmeasured(checked, names, own), SpeculationStats())


@contextmanager
def _spinner(config: EnsembleConfig) -> Iterator[Callable[[str], None] | None]:
    """Give a function that shows which model is being loaded; None where stderr is no terminal."""
    if not terminal(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.text import Text

    # A GGUF file is converted the first time, which shows bars of its own; two displays at once would mix.
    with_bars = {one.name or one.model for one in config.members if one.model.lower().endswith(".gguf")}
    status = Console(stderr=True).status("")

    def show(name: str) -> None:
        status.stop()
        if name in with_bars:
            dim(f"loading {name}")
        else:
            status.update(Text(visible(f"loading {name}"), style="dim"))
            status.start()

    try:
        yield show
    finally:
        status.stop()
