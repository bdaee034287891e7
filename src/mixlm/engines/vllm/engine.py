"""Models in vLLM, in this process: folders and hub ids. Needs the extra `vllm`.

vLLM samples itself where temperature, top-k, top-p, min-p and banned ids mean there what they mean here, so positions
of one member in a row are one request. Where they do not (min-p beside top-p, very low temperatures, penalties), and in
methods that need members' distributions, it is asked for its top tokens, as llama.cpp is.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mixlm.engines.base import EngineSpec, Session, TextInterface
from mixlm.engines.batching import respond_in_threads
from mixlm.engines.requests import GenerateRequest, GenerateResponse, Request, Response
from mixlm.engines.tokenizer_setup import TokenizerSetup, error_summary
from mixlm.engines.topk_only import TopKOnlyEngine, TopKOnlySession
from mixlm.engines.vllm.engine_thread import EngineThread, VllmBackend
from mixlm.engines.vllm.sampling_params import (
    BANNED_ARGUMENT,
    banned_ranges,
    generation_parameters,
    logprobs_parameters,
    samples_identically,
)
from mixlm.errors import ConfigError, EngineError, ModelLoadError, UnsupportedError
from mixlm.models.resolve import resolve
from mixlm.types import Candidates, Ids, Sampling

_DEFAULT_CONTEXT = 8192
_BLOCK_SIZE = 32  # the smallest that vLLM runs on a CPU: tokens after the last whole block are prefilled again
_MAX_SEQUENCES = 64


def load(spec: EngineSpec) -> VllmEngine:
    """Load a folder, a catalogue name or a hub id. Raises UnsupportedError for a GGUF file."""
    if spec.model.lower().endswith(".gguf"):
        raise UnsupportedError(f"{spec.model} is a GGUF file, and vLLM is given folders here", "use --engine llamacpp")
    resolved = resolve(spec.model, "float32" if spec.dtype == "float32" else "bfloat16")
    return VllmEngine(replace(spec, name=spec.name or resolved.name), resolved.path_or_id)


class VllmEngine(TopKOnlyEngine):
    """A model in vLLM, in this process.

    Args:
        spec: `slots` is how many sequences of `context` tokens the KV cache has room for.
        source: folder or hub id of the model and its tokenizer.
        create_backend: makes the engine, from options of `vllm.LLM`.

    Raises:
        ModelLoadError: the model cannot be loaded.
        ConfigError: an option that vLLM does not get here.
    """

    takes_ids = True

    def __init__(
        self, spec: EngineSpec, source: str, create_backend: Callable[[dict[str, Any]], VllmBackend] = VllmBackend
    ) -> None:
        if spec.adapter is not None:
            raise ConfigError(f"member {spec.name} has an adapter, and vLLM is given none", "use --engine hf")
        self._tokenizer = TokenizerSetup.load(source, spec.name)
        options = _options(spec, source)
        try:
            self.thread = EngineThread(lambda: create_backend(options))
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            raise ModelLoadError(
                f"vLLM cannot load {spec.name}: {error_summary(error)}",
                "its architecture may be unknown to it, or memory too small; or use --engine hf",
            ) from error
        self._threads = ThreadPoolExecutor(_MAX_SEQUENCES)  # of all engines on these weights
        self._closing = weakref.finalize(self._threads, self.thread.close)
        config = self.thread.config
        model = config.model_config
        self._vocab_size: int = model.get_vocab_size()
        # One token at least is generated, and has to fit in too.
        super().__init__(spec.name, self.text_interface(spec), model.max_model_len - 1)
        self.top_k_limit = min(spec.candidates, self.vocabulary.size)
        dtype = str(model.dtype).removeprefix("torch.")
        self.device = config.device_config.device_type
        self.details = {"engine": "vLLM", "device": self.device, "dtype": dtype}
        self.weights_bytes = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
        self.session().logits(np.flatnonzero(self.sampleable)[:1])

    def text_interface(self, spec: EngineSpec) -> TextInterface:
        """Return the prompts and the vocabulary of a spec on this model."""
        return self._tokenizer.text_interface(spec, self._vocab_size)

    @property
    def batch_key(self) -> int:
        """Engines that differ in their prompts alone run as one."""
        return id(self.thread)

    def session(self) -> VllmSession:
        """Begin a sequence. vLLM keeps of it what its prefix cache holds."""
        return VllmSession(self)

    def samples_itself(self, sampling: Sampling, banned: Ids) -> bool:
        """Whether the options mean the same in vLLM."""
        return samples_identically(sampling)

    def respond(self, requests: Sequence[tuple[Session, Request]]) -> list[Response]:
        """Serve several sequences together, in one batch of vLLM's."""
        return respond_in_threads(self._threads, super().respond, requests)

    def alive(self) -> bool:
        """Whether vLLM takes requests."""
        return self.thread.alive


class VllmSession(TopKOnlySession):
    """One sequence, known to vLLM by its ids alone."""

    def __init__(self, engine: VllmEngine) -> None:
        super().__init__(engine)
        self._engine = engine

    def generate(self, request: GenerateRequest) -> GenerateResponse:
        """Let vLLM sample up to `max_tokens` tokens."""
        engine = self._engine
        ends = sorted(engine.vocabulary.end_ids)
        length = min(request.max_tokens, engine.context_length + 1 - len(request.ids))
        parameters = generation_parameters(replace(request, max_tokens=length), ends)
        if request.banned.size:
            parameters["extra_args"] = {BANNED_ARGUMENT: banned_ranges(request.banned)}
        start = time.perf_counter()
        output = engine.thread.submit(request.ids, parameters).result()
        if not output.ids:
            raise EngineError(f"vLLM generated nothing for {engine.name}")
        logprobs = [position[token] for token, position in zip(output.ids, output.logprobs, strict=True)]
        response = GenerateResponse(output.ids, logprobs)
        self.record_generation(request.ids, response, time.perf_counter() - start)
        return response

    def top_tokens(self, ids: Ids, count: int, among: Ids | None = None) -> Candidates:
        """Ask vLLM for one token with the log-probabilities of the top ones."""
        [top] = self._engine.thread.submit(ids, logprobs_parameters(count, among)).result().logprobs
        return Candidates(np.fromiter(top, dtype=np.int64), np.fromiter(top.values(), dtype=np.float64))


def _options(spec: EngineSpec, source: str) -> dict[str, Any]:
    """Return the options of `vllm.LLM`. Raises ConfigError for a device that it does not get here."""
    if spec.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {spec.device!r}, and vLLM is given auto, cpu or cuda", "use --engine hf")
    config = _text_config(source)
    context = spec.context or min(int(config.get("max_position_embeddings") or _DEFAULT_CONTEXT), _DEFAULT_CONTEXT)
    return {
        "model": source,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": spec.dtype,
        "max_model_len": context,
        "max_num_seqs": _MAX_SEQUENCES,
        "block_size": _BLOCK_SIZE,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": spec.slots * context * _cache_bytes_per_token(config, spec.dtype),
        "enforce_eager": True,
        "max_logprobs": -1,
        "logprobs_mode": "processed_logprobs",
        "logits_processors": ["mixlm.engines.vllm.banned_tokens_plugin:BannedTokensProcessor"],
    }


def _text_config(source: str) -> dict[str, Any]:
    """Return the text part of a model's configuration."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{source} cannot be read: {error_summary(error)}") from error
    text_config: dict[str, Any] = config.get_text_config().to_dict()
    return text_config


def _cache_bytes_per_token(config: dict[str, Any], dtype: str) -> int:
    """Return the memory of one token in the KV cache, with a quarter more for blocks that are not full."""
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    value_size = 4 if dtype == "float32" else 2
    kv_heads = config.get("num_key_value_heads") or heads
    size = int(2 * config["num_hidden_layers"] * kv_heads * head_size * value_size)
    return size * 5 // 4
