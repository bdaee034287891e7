"""Models through Hugging Face transformers: safetensors folders and hub ids, on CPU or CUDA."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from mixlm.engines.base import Engine, EngineSpec, Session, TextInterface
from mixlm.engines.requests import ForwardRequest, Request, Response
from mixlm.engines.tokenizer_setup import TokenizerSetup, as_ids
from mixlm.engines.transformers.few_rows import speed_up_linear_layers
from mixlm.engines.transformers.load_trial import load_runner
from mixlm.engines.transformers.loaded_model import LoadedModel
from mixlm.engines.transformers.model_loading import (
    context_length,
    load_model,
    parse_device,
    parse_dtype,
    quantization,
    share_weights,
    vocabulary_size,
)
from mixlm.engines.transformers.runner import HFSession, ModelRunner
from mixlm.engines.transformers.self_test import max_length


class HFEngine(Engine):
    """A causal language model of transformers.

    runner: the model with the engine's adapter, if any. details: for display, beside what every model has and what the
    runner adds. tokenizer: what `with_spec` makes other prompts of; without one it returns None.
    """

    def __init__(
        self,
        name: str,
        text: TextInterface,
        context_length: int,
        runner: ModelRunner,
        details: Mapping[str, str] | None = None,
        tokenizer: TokenizerSetup | None = None,
    ) -> None:
        super().__init__(name, text, context_length)
        self.runner = runner
        self.loaded = runner.loaded
        self.model = runner.model
        self.device = self.model.device
        self.adapter = runner.adapter
        self.weights_bytes = sum(self.weight_parts.values())
        self.hidden_size = int(self.model.get_output_embeddings().weight.shape[1])
        self.details = {
            "engine": "transformers",
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.device),
            **({} if self.adapter is None else {"adapter": self.adapter}),
            **(details or {}),
            **runner.details,
        }
        self._tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, spec: EngineSpec, source: str) -> HFEngine:
        """Load a model and its tokenizer from a folder or a hub id.

        Raises:
            ModelLoadError: the model, its tokenizer or its adapter cannot be loaded.
            TokenizerError: its tokens cannot be mapped to bytes.
            MemoryLimitError: the device has too little memory.
        """
        tokenizer = TokenizerSetup.load(source, spec.name, trust_remote_code=spec.trust_remote_code)
        device = parse_device(spec.device)
        dtype = parse_dtype(spec.dtype, device)
        options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
        if spec.loading_options:
            from mixlm.engines.transformers.placement import empty_model, loading_options

            options = loading_options(spec, dtype, device, partial(empty_model, source, spec))
        return cls._of_model(spec, tokenizer, *load_model(source, spec, options))

    @classmethod
    def from_objects(cls, spec: EngineSpec, model: Any, tokenizer: Any) -> HFEngine:
        """Return the engine of a model and a tokenizer that transformers has loaded, on the model's own tensors.

        The model may be quantised, spread over devices, or one of PEFT with its active adapters. It stays as it is, and
        may be used elsewhere; its weights must not change.

        Raises:
            ConfigError, UnsupportedError: they cannot be used.
            ModelLoadError: the model cannot run.
            TokenizerError: the tokenizer's tokens cannot be mapped to bytes.
        """
        shared = share_weights(model, spec.name)
        configs = (shared.config, shared.config.get_text_config(), getattr(shared, "generation_config", None))
        ends = [i for config in configs for i in as_ids(getattr(config, "eos_token_id", None))]
        return cls._of_model(spec, TokenizerSetup.of(tokenizer, spec.name, ends), shared)

    @classmethod
    def _of_model(cls, spec: EngineSpec, tokenizer: TokenizerSetup, model: Any, notes: Sequence[str] = ()) -> HFEngine:
        """Return the engine of a spec on a model, which is tried out. notes: on its weights."""
        speed_up_linear_layers(model)
        loaded = LoadedModel(model, spec.name, notes)
        if spec.adapter is not None:
            loaded.add(spec.adapter, spec.name)
        runner = load_runner(loaded, spec.graphs, spec.prefix_cache << 20)
        return cls._of_runner(spec, tokenizer, runner.with_adapter(spec.adapter))

    @classmethod
    def _of_runner(cls, spec: EngineSpec, tokenizer: TokenizerSetup, runner: ModelRunner) -> HFEngine:
        """Return the engine of a spec on a model that is loaded and tried out."""
        notes = list(runner.loaded.notes)
        if not runner.keeps_cache:
            notes.append(f"{spec.name} cannot roll back its state: it runs the whole text for every token")
        length = context_length(runner.model)
        if (longest := max_length(runner.model.config)) < length:
            length = longest
            notes.append(f"{spec.name} takes {length} tokens: beyond them its attention selects some of the text")
        text = tokenizer.text_interface(spec, vocabulary_size(runner.model), notes=notes)
        stored = quantization(runner.model, spec)
        details = {} if stored is None else {"quantization": stored}
        return cls(spec.name, text, length, runner, details, tokenizer)

    @property
    def batch_key(self) -> int:
        """Equal for engines that differ in their prompts alone."""
        return id(self.runner)

    @property
    def weight_parts(self) -> Mapping[Hashable, int]:
        """Bytes of the model, and of the adapter."""
        parts: dict[Hashable, int] = {id(self.loaded): self.loaded.size}
        if self.adapter is not None and self.loaded.adapters is not None:
            parts[id(self.loaded), self.adapter] = self.loaded.adapters.sizes[self.adapter]
        return parts

    @property
    def run_ahead_depth(self) -> int:
        """How many positions the runner runs ahead."""
        return self.runner.run_ahead_depth

    def with_spec(self, spec: EngineSpec) -> HFEngine | None:
        """Return an engine on the same weights, with prompts and an adapter of its own."""
        if self._tokenizer is None:
            return None
        name = spec.name or (self.name if spec.adapter is None else f"{self.name}+{Path(spec.adapter).name}")
        if spec.adapter is not None:
            self.loaded.add(spec.adapter, name)
        return self._of_runner(replace(spec, name=name), self._tokenizer, self.runner.with_adapter(spec.adapter))

    def replica(self) -> HFEngine:
        """Return an engine on the same weights with a runner of its own."""
        other = copy(self)
        other.runner = self.runner.replica()
        return other

    @property
    def prefix_cache_parts(self) -> Mapping[Hashable, int]:
        """Bytes of the texts that are kept for other sequences, of all adapters."""
        prefixes = self.runner.prefixes
        return {} if prefixes is None else {id(prefixes): prefixes.nbytes}

    def drop_prefixes(self) -> None:
        """Forget the texts that are kept for other sequences."""
        if self.runner.prefixes is not None:
            self.runner.prefixes.clear()

    def session(self) -> HFSession:
        """Begin a sequence."""
        return HFSession(self.runner, self.context_length)

    def respond(self, requests: Sequence[tuple[Session, Request]]) -> list[Response]:
        """Serve all requests, in one forward pass where they fit and the model can."""
        # A session of another type, such as one that caches responses, is served by itself.
        if self.runner.batches and all(isinstance(session, HFSession) for session, _ in requests):
            return self.runner.respond(cast("Sequence[tuple[Session, ForwardRequest]]", requests))
        return super().respond(requests)
