"""Models through Hugging Face transformers: safetensors folders and hub ids, on CPU or CUDA."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixlm.engines.base import Engine, Session, TextInterface
from mixlm.engines.requests import Request, Response
from mixlm.engines.spec import EngineSpec
from mixlm.engines.tokenizer_setup import TokenizerSetup, first_line, remote_code_error
from mixlm.engines.transformers.loaded_model import LoadedModel
from mixlm.engines.transformers.runner import HFSession, ModelRunner, memory_errors
from mixlm.errors import ConfigError, MixlmError, ModelLoadError
from mixlm.models import resolve


def load(spec: EngineSpec) -> HFEngine:
    """Load a folder, a catalogue name or a hub id: see `HFEngine.from_pretrained`."""
    resolved = resolve(spec.model, "float32" if spec.dtype == "float32" else "bfloat16")
    return HFEngine.from_pretrained(replace(spec, name=spec.name or resolved.name), resolved.path_or_id)


class HFEngine(Engine):
    """A causal language model of transformers.

    Args:
        name: of the model.
        text: its prompts and vocabulary.
        context_length: in tokens.
        runner: the model with the engine's adapter, if any.
        details: for reports, beside dtype, device, adapter and what the runner adds.
        tokenizer: what `with_spec` makes other prompts of; without one it returns None.
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
        trusted = spec.trust_remote_code
        tokenizer = TokenizerSetup.load(source, spec.name, memory_errors, trust_remote_code=trusted)
        device = parse_device(spec.device)
        model, notes = _load_model(source, spec, parse_dtype(spec.dtype, device), device)
        loaded = LoadedModel(model, notes)
        if spec.adapter is not None:
            loaded.add(spec.adapter, spec.name)
        runner = ModelRunner(loaded, spec.name, spec.graphs).with_adapter(spec.adapter)
        return cls._from_parts(spec, tokenizer, runner)

    @classmethod
    def _from_parts(cls, spec: EngineSpec, tokenizer: TokenizerSetup, runner: ModelRunner) -> HFEngine:
        """Return the engine of a spec on a model that is loaded."""
        config = runner.model.config
        vocab_size = int(runner.model.get_output_embeddings().weight.shape[0])
        notes = list(runner.loaded.notes)
        if not runner.keeps_cache:
            notes.append(f"{spec.name} cannot roll back its state: it runs the whole text for every token")
        context_length = int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20)
        if runner.max_length < context_length:
            context_length = runner.max_length
            notes.append(
                f"{spec.name} takes {context_length} tokens: behind them its attention selects some of the text"
            )
        text = tokenizer.text_interface(spec, vocab_size, notes=notes)
        return cls(spec.name, text, context_length, runner, tokenizer=tokenizer)

    @property
    def batch_key(self) -> int:
        """Equal for engines that differ in their prompts alone."""
        return id(self.runner)

    @property
    def weight_parts(self) -> Mapping[Hashable, int]:
        """Bytes of the model, and of the adapter."""
        return self.loaded.weight_parts(self.adapter)

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
        return self._from_parts(replace(spec, name=name), self._tokenizer, self.runner.with_adapter(spec.adapter))

    def replica(self) -> HFEngine:
        """Return an engine on the same weights with a runner of its own."""
        other = copy(self)
        other.runner = copy(self.runner)
        return other

    def session(self) -> HFSession:
        """Begin a sequence."""
        return HFSession(self.runner, self.context_length)

    def respond(self, requests: Sequence[tuple[Session, Request]]) -> list[Response]:
        """Serve all requests, in one forward pass where they fit and the model can."""
        # A session of another type, such as one that caches responses, is served by itself.
        batched = self.runner.batches and all(isinstance(session, HFSession) for session, _ in requests)
        return self.runner.respond(requests) if batched else super().respond(requests)


def _load_model(source: str, spec: EngineSpec, dtype: Any, device: Any) -> tuple[Any, tuple[str, ...]]:
    """Return a model in which every weight is from its files, and notes on weights that it has no place for."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    name = spec.name
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it says of weights is in the loading info
    try:
        with memory_errors(name):
            model, info = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                device_map={"": device},
                trust_remote_code=spec.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # an error below, with all their names
            )
    except MixlmError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise remote_code_error(name) from error
        raise ModelLoadError(
            f"{name} cannot be loaded: {first_line(error)}", "give a folder of a causal language model"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    return model.eval(), _check_weights(name, info)


def _check_weights(name: str, info: Mapping[str, Any]) -> tuple[str, ...]:
    """Check what transformers reports of a model's weights. Returns notes. Raises ModelLoadError."""
    unexpected = _listed(info["unexpected_keys"])
    if missing := _listed(info["missing_keys"]):
        also = f"; they hold {unexpected}, which it has no place for" if unexpected else ""
        raise ModelLoadError(
            f"the files of {name} lack {missing}{also}",
            "a file of the model may be missing, or its weights were saved under other names"
            + (", such as with a prefix" if unexpected else ""),
        )
    if mismatched := info["mismatched_keys"]:
        key, actual, expected = min(mismatched)
        raise ModelLoadError(
            f"{len(mismatched)} weights of {name} have other sizes than its config.json says, such as {key}: "
            f"{tuple(actual)} instead of {tuple(expected)}",
            "its config.json and its weights must be of one model",
        )
    return (f"the files of {name} hold {unexpected}, which the model has no place for",) if unexpected else ()


def _listed(keys: Iterable[str]) -> str:
    """Return the number of weights and the first of their names; empty for none."""
    names = sorted(keys)
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} weight{'s' if len(names) > 1 else ''} ({shown})" if names else ""


def parse_device(name: str) -> Any:
    """Return torch's device of a name; "auto" is CUDA where there is one. Raises ConfigError for one that is absent."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        devices = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise ConfigError(f"device {name!r} is not there", f"this machine has {devices}") from error
    return device


def parse_dtype(name: str, device: Any) -> Any:
    """Return torch's dtype of a name; "auto" is bfloat16 where the device computes in it, else float32."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    fast = device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if fast else torch.float32
