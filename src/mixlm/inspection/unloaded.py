"""Engines without weights, for what is known of a GGUF file or a model's folder before memory is taken."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace

from mixlm.engines import Engine, EngineSpec
from mixlm.engines import load as load_engine
from mixlm.engines.base import Session, TextInterface
from mixlm.engines.registry import check_packages, engine_name
from mixlm.engines.tokenizer_setup import TokenizerSetup
from mixlm.errors import UnsupportedError
from mixlm.models.gguf import find_gguf, tokenizer_folder
from mixlm.models.header import read_header


def load_described(spec: EngineSpec) -> Engine:
    """Return an engine without weights for a GGUF file, and for a model of transformers; load any other model.

    Raises:
        ConfigError: Options of loading do not fit the model or the machine.
        ModelLoadError: The file is broken.
        TokenizerError: Its tokens cannot be mapped to bytes.
        MixlmError: A package is missing.
    """
    gguf = None if spec.adapter is not None or ":" in spec.model else find_gguf(spec.model)
    if gguf is None and engine_name(spec) == "hf":
        check_packages("hf", spec.model)
        return _described_folder(spec)
    if gguf is None or spec.engine not in ("auto", "hf", "llamacpp"):
        return load_engine(spec)
    header = read_header(gguf.path)
    named = replace(spec, name=spec.name or gguf.name)
    text = TokenizerSetup.load(str(tokenizer_folder(gguf)), named.name).text_interface(
        named, header.tokens, header.ends
    )
    details = {"engine": f"{'llama.cpp' if spec.engine == 'llamacpp' else 'transformers'}, not loaded", "dtype": "GGUF"}
    return UnloadedEngine(named, text, spec.context or header.context, gguf.path.stat().st_size, details)


def _described_folder(spec: EngineSpec) -> Engine:
    """Return an engine without weights for a folder or a hub id: what it will take of which device's memory."""
    from mixlm.engines.transformers import find_model

    source, name = find_model(spec, weights=False)
    from mixlm.engines.transformers.model_loading import (
        context_length,
        parse_device,
        parse_dtype,
        quantization,
        vocabulary_size,
    )
    from mixlm.engines.transformers.placement import empty_model, planned_memory

    named = replace(spec, name=name)
    device = parse_device(spec.device)
    dtype = parse_dtype(spec.dtype, device)
    model = empty_model(source, named)
    memory = planned_memory(model, source, named, dtype, device)
    adapter_size = 0
    if spec.adapter is not None:
        from mixlm.engines.transformers.adapters import adapter_bytes

        adapter_size = adapter_bytes(spec.adapter)
    memory[next(iter(memory))] += adapter_size
    setup = TokenizerSetup.load(source, named.name, trust_remote_code=spec.trust_remote_code)
    text = setup.text_interface(named, vocabulary_size(model))
    details = {
        "engine": "transformers, not loaded",
        "dtype": str(dtype).removeprefix("torch."),
        **({} if spec.adapter is None else {"adapter": spec.adapter}),
        **({} if (stored := quantization(model, spec)) is None else {"quantization": stored}),
        "memory": ", ".join(f"{place} {size / 1e6:,.1f} MB" for place, size in memory.items()),
    }
    return UnloadedEngine(named, text, context_length(model), sum(memory.values()), details, adapter_size)


class UnloadedEngine(Engine):
    """A model that has not been loaded: its tokenizer, prompts and size.

    context: its length, where it is known. weights_bytes: memory of the weights, with those of an adapter.
    """

    def __init__(
        self,
        spec: EngineSpec,
        text: TextInterface,
        context: int | None,
        weights_bytes: int,
        details: Mapping[str, str],
        adapter_bytes: int = 0,
    ) -> None:
        super().__init__(spec.name, text, context or 1 << 20)
        # As the loaded engine has it, so that the same methods are possible.
        self.takes_ids = spec.engine == "llamacpp"
        self.top_k_limit = min(spec.candidates, self.vocabulary.size) if self.takes_ids else None
        self.weights_bytes = weights_bytes
        self.details = details
        self._parts: dict[Hashable, int] = {spec.weights_key: weights_bytes - adapter_bytes}
        if adapter_bytes:
            self._parts[replace(spec, name="", template=None, system=None)] = adapter_bytes

    @property
    def weight_parts(self) -> Mapping[Hashable, int]:
        """Bytes of the model, which members with other prompts and adapters will share, and of the adapter."""
        return self._parts

    def session(self) -> Session:
        """Raise UnsupportedError."""
        raise UnsupportedError(f"{self.name} is not loaded, so it cannot be run")
