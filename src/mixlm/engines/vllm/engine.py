"""Models in vLLM, in this process: folders and hub ids. Needs the extra `vllm`.

What a member draws by itself, vLLM draws: temperature, top-k, top-p, min-p and banned ids mean there what they mean
here, so consecutive coins are one request. Where they do not (min-p beside top-p, very low temperatures, penalties),
and in methods that look at members' laws, it is asked for its likeliest tokens, as llama.cpp is.
"""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mixlm.engines.base import GenerateRequest, GenerateResponse, Request, Response, Session
from mixlm.engines.batching import respond_in_threads
from mixlm.engines.spec import EngineSpec
from mixlm.engines.tokenizer_setup import TokenizerSetup, as_ids, first_line, load_tokenizer
from mixlm.engines.topk_only import TopKOnlyEngine, TopKOnlySession
from mixlm.engines.vllm.engine_thread import EngineThread
from mixlm.engines.vllm.id_ranges import BANNED_ARGUMENT, format_ranges
from mixlm.engines.vllm.sampling_params import samples_identically, sampling_parameters
from mixlm.errors import ConfigError, EngineError, ModelLoadError
from mixlm.types import Candidates, Ids, Sampling

_CONTEXT = 8192
_BLOCK = 32  # the smallest that vLLM runs on a CPU: what lies in no whole block is read again
_AT_ONCE = 64


class VllmEngine(TopKOnlyEngine):
    """A model in vLLM, in this process, with the tokenizer in the same folder. slots: sequences that have room at once.

    Raises ModelLoadError when it cannot be loaded, ConfigError for what vLLM is not given here.
    """

    def __init__(self, spec: EngineSpec, source: str) -> None:
        self.name = spec.name
        if spec.adapter is not None:
            raise ConfigError(f"member {spec.name} has an adapter, and vLLM is given none", "use --engine hf")
        self.top_k_limit = spec.candidates
        self._tokenizer = load_tokenizer(source, spec.name)
        self._read = TokenizerSetup.of(self._tokenizer, spec.name, source)
        try:
            self.loop = EngineThread(_options(spec, source))
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            raise ModelLoadError(
                f"vLLM cannot load {spec.name}: {first_line(error)}",
                "its architecture may be unknown to it, or memory too small; or use --engine hf",
            ) from error
        self._closing = weakref.finalize(self, self.loop.close)
        model = self.loop.config.model_config
        self._rows: int = model.get_vocab_size()
        self._model_ends = as_ids(getattr(model.hf_config, "eos_token_id", None))
        # A question is answered with one token at least, and that has to fit in too.
        self.context_length = model.max_model_len - 1
        self._set_prompts(spec)
        self.top_k_limit = min(spec.candidates, self.vocabulary.size)
        dtype = str(model.dtype).removeprefix("torch.")
        self.device = self.loop.config.device_config.device_type
        self.details = {"engine": "vLLM", "device": self.device, "dtype": dtype}
        self.weights_bytes = sum(one.stat().st_size for one in Path(source).glob("*.safetensors"))
        self._threads = ThreadPoolExecutor(_AT_ONCE)
        self.session().logits(np.flatnonzero(self.drawable)[:1])

    def with_spec(self, spec: EngineSpec) -> VllmEngine | None:
        """Return an engine on the same weights with prompts of its own; None for an adapter."""
        if spec.adapter is not None:
            return None
        shared = copy.copy(self)
        shared.name = spec.name or self.name
        shared._set_prompts(replace(spec, name=shared.name))
        return shared

    def _set_prompts(self, spec: EngineSpec) -> None:
        self.notes = tuple(self._read.give(self, self._tokenizer, spec, self._rows, self._model_ends))

    @property
    def batch_key(self) -> int:
        """Engines that differ in their prompts alone run as one."""
        return id(self.loop)

    @property
    def weight_parts(self) -> Mapping[Hashable, int]:
        """Bytes of the model's files."""
        return {id(self.loop): self.weights_bytes}

    def session(self) -> VllmSession:
        """Begin a sequence. What vLLM keeps of it is its prefix cache's affair."""
        return VllmSession(self)

    def samples_itself(self, sampling: Sampling, banned: Ids) -> bool:
        """Whether the options mean the same in vLLM."""
        return samples_identically(sampling)

    def respond(self, requests: Sequence[tuple[Session, Request]]) -> list[Response]:
        """Answer questions of several sequences together, in one batch of vLLM's."""
        return respond_in_threads(self._threads, super().respond, requests)

    def alive(self) -> bool:
        """Whether vLLM takes requests."""
        return self.loop.alive


class VllmSession(TopKOnlySession):
    """One sequence, known to vLLM by its ids alone."""

    def __init__(self, engine: VllmEngine) -> None:
        super().__init__(engine)
        self._engine = engine

    def generate(self, run: GenerateRequest) -> GenerateResponse:
        """Let vLLM draw up to `length` tokens."""
        engine = self._engine
        ends = sorted(engine.vocabulary.end_ids)
        length = min(run.max_tokens, engine.context_length + 1 - len(run.ids))
        params = sampling_parameters(run.sampling, run.seed, length) | {"stop_token_ids": ends, "logprobs": 0}
        if run.banned.size:
            params["extra_args"] = {BANNED_ARGUMENT: _ranges(run.banned.tobytes())}
        start = time.perf_counter()
        found = engine.loop.submit(run.ids, params).result()
        if not found.ids:
            raise EngineError(f"vLLM wrote nothing for {engine.name}")
        written = GenerateResponse(found.ids, [told[i] for i, told in zip(found.ids, found.logprobs, strict=True)])
        self.record_generation(run.ids, written, time.perf_counter() - start)
        return written

    def _top_tokens(self, ids: Ids, count: int) -> Candidates:
        params = sampling_parameters(Sampling(temperature=1.0, top_k=0), 0, 1) | {"logprobs": count}
        told = self._engine.loop.submit(ids, params).result().logprobs[0]
        return Candidates(np.fromiter(told, dtype=np.int64), np.fromiter(told.values(), dtype=np.float64))


@lru_cache(maxsize=64)
def _ranges(banned: bytes) -> str:
    return format_ranges(np.frombuffer(banned, dtype=np.int64))


def _options(spec: EngineSpec, source: str) -> dict[str, Any]:
    """Return what vLLM is started with. Raises ConfigError for a device that it was not built for, in its words."""
    if spec.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {spec.device!r}, and vLLM is given auto, cpu or cuda", "use --engine hf")
    context = spec.context or min(_longest(source), _CONTEXT)
    return {
        "model": source,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": spec.dtype,
        "max_model_len": context,
        "max_num_seqs": _AT_ONCE,
        "block_size": _BLOCK,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": spec.slots * context * _bytes_of_a_token(source, spec.dtype),
        "enforce_eager": True,
        "max_logprobs": -1,
        "logprobs_mode": "processed_logprobs",
        "logits_processors": ["mixlm.engines.vllm.banned_tokens_plugin:BannedTokensProcessor"],
    }


def _config(source: str) -> dict[str, Any]:
    """Return the text part of a model's configuration."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{source} cannot be read: {first_line(error)}") from error
    found: dict[str, Any] = config.get_text_config().to_dict()
    return found


def _longest(source: str) -> int:
    return int(_config(source).get("max_position_embeddings") or _CONTEXT)


def _bytes_of_a_token(source: str, dtype: str) -> int:
    """Return the memory of one token's keys and values, with room for blocks that are not full."""
    config = _config(source)
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    size = 4 if dtype == "float32" else 2
    keys = int(2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * width * size)
    return keys * 5 // 4
