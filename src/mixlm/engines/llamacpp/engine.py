"""Models through llama.cpp: GGUF files, memory-mapped, as they are. Needs the extra `llamacpp`.

Each forward pass is one request for one token with the top N and their probabilities, which costs no more than the same
token inside a longer generation (docs/engines.md has the figures), so sampling in llama.cpp would gain nothing. Noise,
transforms and distributions are mixlm's own. The prefix cache of a slot does the catch-up.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mixlm.engines.base import EngineSpec, Session, TextInterface
from mixlm.engines.batching import respond_in_threads
from mixlm.engines.llamacpp.protocol import LlamaCppProtocol
from mixlm.engines.llamacpp.slots import Slots
from mixlm.engines.requests import Request, Response
from mixlm.engines.tokenizer_setup import TokenizerSetup
from mixlm.engines.topk_only import TopKOnlyEngine, TopKOnlySession
from mixlm.errors import ConfigError, EngineError, ModelLoadError, ModelNotFoundError, TokenizerError
from mixlm.models.gguf import find_gguf, tokenizer_folder
from mixlm.models.header import read_header
from mixlm.models.resolve import resolve
from mixlm.types import Candidates, Ids, Logits

# Tokens. llama.cpp allocates the KV cache of every slot when a model is loaded.
_MAX_DEFAULT_CONTEXT = 8192


def load(spec: EngineSpec) -> LlamaCppEngine:
    """Load a GGUF file, or that of a catalogue name.

    Raises:
        ModelNotFoundError: there is no such GGUF file.
        ConfigError: the device is not the CPU.
    """
    gguf = find_gguf(spec.model)
    if gguf is None:
        if spec.model.lower().endswith(".gguf"):
            resolve(spec.model)  # raises what is wrong with it
        raise ModelNotFoundError(
            f"llama.cpp runs GGUF files, and there is none for {spec.model!r}",
            f"give a .gguf file; of a model of the catalogue it is kept by: mixlm models get {spec.model}",
        )
    if spec.device not in ("auto", "cpu"):
        raise ConfigError(f"device is {spec.device!r}, and llama.cpp is used on the CPU only", "use --engine hf")
    return LlamaCppEngine(replace(spec, name=spec.name or gguf.name), gguf.path, tokenizer_folder(gguf))


class LlamaCppEngine(TopKOnlyEngine):
    """A GGUF model in llama.cpp.

    Each session holds a slot; when there are more sessions than slots, the one with the shortest text loses its slot
    and is prefilled again at its next request. dtype "float32" runs one token a forward pass, also in prefill: its
    responses depend on the ids alone, to the last bit. Otherwise the kernels for several tokens round differently from
    those for one.

    Args:
        path: of the GGUF file.
        folder: of its tokenizer.

    Raises:
        ModelLoadError: it cannot be loaded.
        ConfigError: the spec has another dtype or an adapter.
        TokenizerError: the tokenizer belongs to another model.
    """

    takes_ids = True

    def __init__(self, spec: EngineSpec, path: Path, folder: Path) -> None:
        if spec.dtype not in ("auto", "float32"):
            raise ConfigError(
                f"dtype is {spec.dtype!r}, and llama.cpp runs {spec.name} in the types that the file has",
                "leave dtype out, or use --engine hf",
            )
        if spec.adapter is not None:
            raise ConfigError(f"member {spec.name} has an adapter, and llama.cpp is given none", "use --engine hf")
        self._header = header = read_header(path)
        self._tokenizer = TokenizerSetup.load(str(folder), spec.name)
        size = len(self._tokenizer.tokenizer)
        if size > header.tokens:
            raise TokenizerError(
                f"the tokenizer in {folder} has {size} tokens, and {path.name} has {header.tokens}",
                "it belongs to another model",
            )
        context_length = spec.context or min(header.context or _MAX_DEFAULT_CONTEXT, _MAX_DEFAULT_CONTEXT)
        super().__init__(spec.name, self.text_interface(spec), context_length)
        exact = spec.dtype == "float32"
        self.server = _start_server(spec, path, context_length, exact)
        self.slots = Slots(spec.slots)
        self.max_sequences = spec.slots
        self.top_k_limit = min(spec.candidates, header.tokens)
        self.weights_bytes = path.stat().st_size
        self.protocol = LlamaCppProtocol(letter_token=self.encoder.encode(b"A").ids[0])
        dtype = "one token at a time" if exact else "GGUF"
        self.details = {"engine": "llama.cpp", "device": "cpu", "dtype": dtype}
        self._threads = ThreadPoolExecutor(spec.slots)
        # A request now shows a library with other responses at once. It also makes sure that the server's loop runs: a
        # server that is dropped before that never ends.
        self.session().logits(np.flatnonzero(self.sampleable)[:1])

    def text_interface(self, spec: EngineSpec) -> TextInterface:
        """Return the prompts and the vocabulary of a spec on this model."""
        return self._tokenizer.text_interface(spec, self._header.tokens, self._header.ends)

    @property
    def batch_key(self) -> int:
        """Equal for engines that differ in their prompts alone."""
        return id(self.server)

    def session(self) -> LlamaCppSession:
        """Begin a sequence; it takes a slot at its first request."""
        return LlamaCppSession(self)

    def respond(self, requests: Sequence[tuple[Session, Request]]) -> list[Response]:
        """Serve requests of several sequences together: llama.cpp runs the busy slots as one batch."""
        return respond_in_threads(self._threads, super().respond, requests)


class LlamaCppSession(TopKOnlySession):
    """One sequence. Its KV cache is the slot that it holds, if it still holds one."""

    def __init__(self, engine: LlamaCppEngine) -> None:
        super().__init__(engine)
        self._engine = engine

    def cached_tokens(self, ids: Ids, last: int = 1) -> int:
        """Return how many tokens of `ids` are in the KV cache; none where another session has taken the slot."""
        return super().cached_tokens(ids, last) if self._engine.slots.owns(self) else 0

    def logits(self, ids: Ids, last: int = 1) -> Logits:
        """Return the logits of the top tokens after each of the last prefixes, -inf for the others."""
        with self._engine.slots.acquired(self) as (self._slot, is_own):
            # What another session left in a slot is never reused, though its prefix may be the same: the split of a
            # text into forward passes shows in the last digits, and equal seeds give equal texts.
            self.keeps_cache = self._use_cache = is_own
            try:
                return super().logits(ids, last)
            finally:
                self.keeps_cache = True

    def top_tokens(self, ids: Ids, count: int, among: Ids | None = None) -> Candidates:
        """Request one token with its top `count` alternatives from llama.cpp."""
        engine = self._engine
        bodies = engine.protocol.request_bodies(ids.tolist(), count, among)
        for body in bodies[-1:] if self.normalized else bodies:
            # Each request says whether the slot's KV cache may be used; llama.cpp finds the common prefix.
            response = engine.server.handle_completions(
                {**body, "id_slot": self._slot, "cache_prompt": self._use_cache}
            )
            self._use_cache = True
            try:
                candidates = engine.protocol.parse(response)
            except (TypeError, LookupError, ValueError):
                detail = response.get("error", {}).get("message", response) if isinstance(response, dict) else response
                raise EngineError(f"llama.cpp gives no logits for {engine.name}: {str(detail)[:200]}") from None
            if candidates is not None:
                return candidates
        raise EngineError(f"llama.cpp returns no probabilities for {engine.name}", "use --engine hf")


def _start_server(spec: EngineSpec, path: Path, context: int, exact: bool) -> Any:
    """Load the weights into a server of llama.cpp."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel = spec.slots
    params.n_ctx = context * spec.slots
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cpuparams.poll = params.cpuparams_batch.poll = 0
    params.verbosity = -1
    params.warmup = params.fit_params = params.ui = False
    # Layers with a sliding window keep every position, for rollback; slots are never swapped out.
    params.swa_full = True
    params.cache_ram_mib = params.n_ctx_checkpoints = 0
    if exact:
        params.n_ubatch = 1
        params.no_extra_bufts = True
    # The library always listens on the loopback interface: nobody else may use it.
    params.api_keys = [secrets.token_hex(16)]
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise ModelLoadError(
            f"llama.cpp cannot load {path}: {error}",
            "its architecture may be unknown to it, or memory too small for slots × context; or use --engine hf",
        ) from error
