"""Models through llama.cpp: GGUF files, memory-mapped, as they are. Needs the extra `llamacpp`.

Every question is one request for one token with the likeliest N and their probabilities, which costs no more than the
same token inside a longer run (docs/engines.md has the figures), so letting llama.cpp draw several gains nothing.
Noise, transforms and laws are mixlm's own. The prefix cache of a slot does the catching up.
"""

from __future__ import annotations

import copy
import os
import secrets
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

# Spinning OpenMP threads starve each other on shared machines; this must be set before llama.cpp is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from mixlm.engines.base import Request, Response, Session
from mixlm.engines.batching import respond_in_threads
from mixlm.engines.llamacpp.slots import Slots
from mixlm.engines.remote.protocols import LlamaCppProtocol
from mixlm.engines.spec import EngineSpec
from mixlm.engines.tokenizer_setup import TokenizerSetup, load_tokenizer
from mixlm.engines.topk_only import TopKOnlyEngine, TopKOnlySession
from mixlm.errors import ConfigError, EngineError, ModelLoadError, TokenizerError
from mixlm.models.header import read_header
from mixlm.types import Candidates, Ids, Logits

# Memory for keys and values is taken when a model is loaded, for each slot.
_CONTEXT = 8192


class LlamaCppEngine(TopKOnlyEngine):
    """A GGUF model in llama.cpp, with the tokenizer in `folder`.

    Sessions hold a slot each; when there are more of them than slots, the one that has rested longest loses its own and
    reads its text anew when it is next asked. dtype "float32" runs one token at a time, also in prompts: then what a
    member answers depends on nothing but the ids, to the last bit, where otherwise the kernels for several tokens
    round differently from those for one.

    Raises ModelLoadError when it cannot be loaded, ConfigError for another dtype.
    """

    def __init__(self, spec: EngineSpec, path: Path, folder: Path) -> None:
        self.name = spec.name
        if spec.dtype not in ("auto", "float32"):
            raise ConfigError(
                f"dtype is {spec.dtype!r}, and llama.cpp runs {path.name} in the types that the file has",
                "leave dtype out, or use --engine hf",
            )
        if spec.adapter is not None:
            raise ConfigError(f"member {spec.name} has an adapter, and llama.cpp is given none", "use --engine hf")
        header = read_header(path)
        self.top_k_limit = min(spec.candidates, header.tokens)
        self.context_length = spec.context or min(header.context or _CONTEXT, _CONTEXT)
        tokenizer = load_tokenizer(str(folder), spec.name)
        if len(tokenizer) > header.tokens:
            raise TokenizerError(
                f"the tokenizer in {folder} has {len(tokenizer)} tokens, and {path.name} has {header.tokens}",
                "it belongs to another model",
            )
        self._tokenizer, self._header = tokenizer, header
        self._read = TokenizerSetup.of(tokenizer, spec.name, str(folder))
        self._set_prompts(spec)
        self.protocol = LlamaCppProtocol(self.letter_token())
        self.weights_bytes = path.stat().st_size
        exact = spec.dtype == "float32"
        self.server = _serve(spec, path, self.context_length, exact)
        self.details = {"engine": "llama.cpp", "device": "cpu", "dtype": "one token at a time" if exact else "GGUF"}
        self.slots = Slots(spec.slots)
        self._threads = ThreadPoolExecutor(spec.slots)
        # One answer now tells a library that answers otherwise at once, and not in the first reply. It also makes sure
        # that the server's loop runs: a server that is dropped before never ends.
        self.session().logits(np.flatnonzero(self.drawable)[:1])

    def with_spec(self, spec: EngineSpec) -> LlamaCppEngine | None:
        """Return an engine on the same server and slots, with prompts of its own; None for an adapter."""
        if spec.adapter is not None:
            return None
        shared = copy.copy(self)
        shared.name = spec.name or self.name
        shared._set_prompts(replace(spec, name=shared.name))
        return shared

    def _set_prompts(self, spec: EngineSpec) -> None:
        header = self._header
        self.notes = tuple(self._read.give(self, self._tokenizer, spec, header.tokens, header.ends))

    @property
    def batch_key(self) -> int:
        """Engines that differ in their prompts alone run as one."""
        return id(self.server)

    @property
    def weight_parts(self) -> Mapping[Hashable, int]:
        """Bytes of the file."""
        return {id(self.server): self.weights_bytes}

    def session(self) -> LlamaCppSession:
        """Begin a sequence; it takes a slot when it is first asked."""
        return LlamaCppSession(self)

    def respond(self, requests: Sequence[tuple[Session, Request]]) -> list[Response]:
        """Answer questions of several sequences together: llama.cpp runs slots that are busy at once as one batch."""
        return respond_in_threads(self._threads, super().respond, requests)


class LlamaCppSession(TopKOnlySession):
    """One sequence. Its cache is the slot that it holds, if it still holds one."""

    def __init__(self, engine: LlamaCppEngine) -> None:
        super().__init__(engine)
        self._engine = engine

    def logits(self, ids: Ids, last: int = 1) -> Logits:
        """Return the logits of the likeliest tokens after each of the last prefixes, -inf for the others."""
        with self._engine.slots.held(self) as (self._slot, kept):
            # What another session left in a slot is never built on, though its beginning may be the same: how a text
            # was cut into forwards shows in the last digits, and equal seeds give equal texts.
            self.keeps_cache = self._builds_on = kept
            try:
                return super().logits(ids, last)
            finally:
                self.keeps_cache = True

    def _top_tokens(self, ids: Ids, count: int) -> Candidates:
        engine = self._engine
        for body in engine.protocol.request_bodies(ids.tolist(), count):
            # Whether anything of what the slot holds is used is said with each request; the rest is found by llama.cpp.
            request = {**body, "id_slot": self._slot, "cache_prompt": self._builds_on}
            answer = engine.server.handle_completions(request)
            self._builds_on = True
            try:
                found = engine.protocol.parse(answer)
            except (TypeError, LookupError, ValueError):
                said = answer.get("error", {}).get("message", answer) if isinstance(answer, dict) else answer
                raise EngineError(f"llama.cpp gives no answer for {engine.name}: {str(said)[:200]}") from None
            if found is not None:
                return found
        raise EngineError(f"llama.cpp keeps the probabilities of {engine.name} back", "use --engine hf")


def _serve(spec: EngineSpec, path: Path, context: int, exact: bool) -> Any:
    """Load the weights."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel = spec.slots
    params.n_ctx = context * spec.slots
    threads = len(os.sched_getaffinity(0))
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cpuparams.poll = params.cpuparams_batch.poll = 0
    params.verbosity = -1
    params.warmup = params.fit_params = params.ui = False
    # Sliding windows keep every position, so that any prefix can be gone back to; slots are never swapped out.
    params.swa_full = True
    params.cache_ram_mib = params.n_ctx_checkpoints = 0
    if exact:
        params.n_ubatch = 1
        params.no_extra_bufts = True
    # The library listens on the loopback whether it is asked or not: nobody else may use it.
    params.api_keys = [secrets.token_hex(16)]
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise ModelLoadError(
            f"llama.cpp cannot load {path}: {error}",
            "its architecture may be unknown to it, or memory too small for slots × context; or use --engine hf",
        ) from error
