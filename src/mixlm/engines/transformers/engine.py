"""Models through Hugging Face transformers: safetensors folders and hub ids, on CPU or CUDA."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

# Spinning OpenMP threads starve each other on shared machines; this must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


from mixlm.engines.base import Engine, Request, Response, Session
from mixlm.engines.spec import EngineSpec
from mixlm.engines.tokenizer_setup import TokenizerSetup, as_ids, first_line, load_tokenizer
from mixlm.engines.transformers.lora import LoadedModel
from mixlm.engines.transformers.runner import HFSession, ModelRunner, memory_errors
from mixlm.errors import ConfigError, MixlmError, ModelLoadError


class HFEngine(Engine):
    """A causal language model of transformers with its fast tokenizer.

    Raises ModelLoadError when it cannot be loaded, TokenizerError when its tokens cannot be mapped to bytes,
    MemoryLimitError when the device has too little memory. like: an engine whose weights and tokenizer it uses too.
    """

    def __init__(self, spec: EngineSpec, source: str, like: HFEngine | None = None) -> None:
        self.name = spec.name
        self._source = source
        self._tokenizer: Any = load_tokenizer(source, spec.name, memory_errors) if like is None else like._tokenizer
        self.device = _device(spec.device)
        self.dtype = _dtype(spec.dtype, self.device)
        model = _load_model(source, spec.name, self.dtype, self.device) if like is None else None
        self.loaded: LoadedModel = LoadedModel(model) if like is None else like.loaded
        self.model = self.loaded.model
        self.adapter = spec.adapter
        self.details = {"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)}
        if spec.adapter is not None:
            self.loaded.add(spec.adapter, spec.name)
            self.details["adapter"] = spec.adapter
        self.weights_bytes = sum(self.weight_parts.values())
        text_config = self.model.config.get_text_config()
        self.context_length = int(getattr(text_config, "max_position_embeddings", None) or 1 << 20)
        rows = int(self.model.get_output_embeddings().weight.shape[0])
        self.runner: ModelRunner = (
            ModelRunner(self.loaded, spec.name, spec.graphs) if like is None else like.runner
        ).using(spec.adapter)
        self.details |= self.runner.details
        notes = []
        if self.runner.recomputes:
            notes.append(f"{spec.name} keeps no cache that can be cut back: it reads the whole text at every token")
        self._read: TokenizerSetup = (
            TokenizerSetup.of(self._tokenizer, spec.name, source) if like is None else like._read
        )
        ends = set(as_ids(self.model.config.eos_token_id))
        ends |= set(as_ids(getattr(self.model.generation_config, "eos_token_id", None)))
        notes += self._read.give(self, self._tokenizer, spec, rows, ends)
        self.notes = tuple(notes)

    @property
    def batch_key(self) -> int:
        """Engines that differ in their prompts alone run as one."""
        return id(self.runner)

    @property
    def weight_parts(self) -> Mapping[Hashable, int]:
        """Bytes of the model, and of the adapter."""
        return self.loaded.weights(self.adapter)

    @property
    def run_ahead_depth(self) -> int:
        """As many as are run before they are asked for, where forwards are run in steps."""
        return self.runner.run_ahead_depth

    def with_spec(self, spec: EngineSpec) -> HFEngine:
        """Return an engine on the same weights, with prompts and an adapter of its own."""
        own = f"{self.name}+{Path(spec.adapter).name}" if spec.adapter is not None else self.name
        return HFEngine(replace(spec, name=spec.name or own), self._source, like=self)

    def replica(self) -> HFEngine:
        """Return an engine on the same weights that runs for itself."""
        other = copy(self)
        other.runner = copy(self.runner)
        return other

    def session(self) -> HFSession:
        """Begin a sequence."""
        return HFSession(self.runner, self.context_length)

    def respond(self, requests: Sequence[tuple[Session, Request]]) -> list[Response]:
        """Answer all requests, in one forward where they fit and the model can."""
        # A session may stand in for another, as one that remembers its answers does: it is asked by itself.
        together = self.runner.batches and all(isinstance(session, HFSession) for session, _ in requests)
        return self.runner.respond(requests) if together else super().respond(requests)


def _load_model(source: str, name: str, dtype: Any, device: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with memory_errors(name):
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map={"": device})
            return model.eval()
    except MixlmError:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"{name} cannot be loaded: {first_line(error)}", "give a folder of a causal language model"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise ConfigError(f"device {name!r} is not there", f"this machine has {there}") from error
    return device


def _dtype(name: str, device: Any) -> Any:
    import torch

    if name != "auto":
        return getattr(torch, name)
    # bfloat16 is fast only where the processor computes in it.
    fast = device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if fast else torch.float32
