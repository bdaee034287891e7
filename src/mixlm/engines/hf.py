"""Models through Hugging Face transformers: safetensors folders and hub ids, on CPU or CUDA."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Spinning OpenMP threads starve each other on shared machines; this must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


from mixlm.engines.base import Engine, Session
from mixlm.engines.spec import EngineSpec
from mixlm.engines.tokenizer import TextSide, as_ids, first_line, load_tokenizer
from mixlm.errors import ConfigError, MemoryLimitError, MixlmError, ModelLoadError
from mixlm.sampling import Floats, Ids, Logits

# A long prompt is run in parts, so that attention scores of all its positions never lie in memory at once.
_PREFILL = 1024
# What torch, safetensors and the system say when memory is out, where it is no error of a type of its own.
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory")


class HFEngine(Engine):
    """A causal language model of transformers with its fast tokenizer.

    Raises ModelLoadError when it cannot be loaded, TokenizerError when its tokens cannot be mapped to bytes,
    MemoryLimitError when the device has too little memory.
    """

    def __init__(self, spec: EngineSpec, source: str) -> None:
        self.name = spec.name
        tokenizer = load_tokenizer(source, spec.name, _memory_errors)
        self.device = _device(spec.device)
        self.dtype = _dtype(spec.dtype, self.device)
        self.model = _load_model(source, spec.name, self.dtype, self.device)
        self.details = {"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)}
        self.weights_bytes = sum(one.numel() * one.element_size() for one in self.model.parameters())
        text_config = self.model.config.get_text_config()
        self.context_length = int(getattr(text_config, "max_position_embeddings", None) or 1 << 20)
        rows = int(self.model.get_output_embeddings().weight.shape[0])
        # Models that carry a state instead of keys and values cannot take tokens back.
        self.recomputes = bool(getattr(self.model, "_is_stateful", False))
        notes = []
        if self.recomputes:
            notes.append(f"{spec.name} keeps no cache that can be cut back: it reads the whole text at every token")
        ends = set(as_ids(self.model.config.eos_token_id))
        ends |= set(as_ids(getattr(self.model.generation_config, "eos_token_id", None)))
        text = TextSide.of(tokenizer, Path(source), spec, rows, ends)
        self.encoder, self.vocabulary, self.prompts, self.stops = (
            text.encoder,
            text.vocabulary,
            text.prompts,
            text.stops,
        )
        self.notes = (*notes, *text.notes)

    def session(self) -> HFSession:
        """Begin a sequence."""
        return HFSession(self)


class HFSession(Session):
    """One sequence: a cache that keeps every position, also where the model attends to a window only.

    A cache made from the model's config forgets what leaves the window and could not be cut back into it.
    """

    def __init__(self, engine: HFEngine) -> None:
        super().__init__(engine.context_length)
        self._engine = engine
        self._cache: Any = None
        self._length = 0
        self.keeps_cache = not engine.recomputes

    def _keep(self, length: int) -> int:
        if length == 0:
            self._cache = None
        elif length < self._length:
            self._cache.crop(length - self._length)
        self._length = length
        return length

    def _forward(self, ids: Ids, last: int) -> Logits:
        if not self.keeps_cache:
            return self._run(ids, last)
        if self._cache is None:
            from transformers import DynamicCache

            self._cache = DynamicCache()
        head = max(len(ids) - max(_PREFILL, last), 0)
        for start in range(0, head, _PREFILL):
            self._run(ids[start : min(start + _PREFILL, head)], 1)
        return self._run(ids[head:], last)

    def _normalisers(self, logits: Logits) -> Floats:
        """Return log Σ exp of each row, on all cores."""
        import torch

        sums: Floats = torch.from_numpy(logits).logsumexp(dim=1).double().numpy()
        return sums

    def _run(self, ids: Ids, last: int) -> Logits:
        import torch

        engine = self._engine
        # A copy: the caller's array is a view of a buffer that goes on changing.
        batch = torch.tensor(ids[None], device=engine.device)
        cached = {"use_cache": False} if not self.keeps_cache else {"past_key_values": self._cache, "use_cache": True}
        with torch.inference_mode(), _memory_errors(engine.name):
            out = engine.model(input_ids=batch, logits_to_keep=last, **cached).logits[0, -last:]
            logits: Logits = out.float().cpu().numpy()
        if self.keeps_cache:
            self._length += len(ids)
        return logits


def _load_model(source: str, name: str, dtype: Any, device: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with _memory_errors(name):
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


@contextmanager
def _memory_errors(name: str) -> Iterator[None]:
    """Turn torch's ways of saying that memory is out into one error."""
    import torch

    try:
        yield
    except MixlmError:
        raise
    except Exception as error:
        said = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(one in said for one in _NO_MEMORY):
            raise _out_of_memory(name) from error
        raise


def _out_of_memory(name: str) -> MemoryLimitError:
    return MemoryLimitError(f"the device has too little memory for {name}", "use --dtype bfloat16, or smaller members")
