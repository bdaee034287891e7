"""Models through Hugging Face transformers: safetensors folders and hub ids, on CPU or CUDA."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Spinning OpenMP threads starve each other on shared machines; this must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


from mixlm.engines.adapters import Loaded
from mixlm.engines.base import Engine, Reply, Request, Session
from mixlm.engines.runner import HFSession, Runner, memory_errors
from mixlm.engines.spec import EngineSpec
from mixlm.errors import ConfigError, MixlmError, ModelLoadError, TokenizerError
from mixlm.records import Message
from mixlm.vocab.encoding import TokenizerEncoder
from mixlm.vocab.prompts import PLAIN_STOPS, PLAIN_TEMPLATE, PromptEncoder
from mixlm.vocab.spm import restore_leading_space
from mixlm.vocab.tokens import Family, Vocabulary, describe, family, token_bytes

_PROBE = "0123456789"


class HFEngine(Engine):
    """A causal language model of transformers with its fast tokenizer.

    Raises ModelLoadError when it cannot be loaded, TokenizerError when its tokens cannot be mapped to bytes,
    MemoryLimitError when the device has too little memory. like: an engine whose weights and tokenizer it uses too.
    """

    def __init__(self, spec: EngineSpec, source: str, like: HFEngine | None = None) -> None:
        self.name = spec.name
        self._source = source
        self._tokenizer: Any = _load_tokenizer(source, spec.name) if like is None else like._tokenizer
        self.device = _device(spec.device)
        self.dtype = _dtype(spec.dtype, self.device)
        model = _load_model(source, spec.name, self.dtype, self.device) if like is None else None
        self.loaded: Loaded = Loaded(model) if like is None else like.loaded
        self.model = self.loaded.model
        self.adapter = spec.adapter
        self.details = {"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)}
        if spec.adapter is not None:
            self.loaded.add(spec.adapter, spec.name)
            self.details["adapter"] = spec.adapter
        self.weights_bytes = sum(self.weights.values())
        text_config = self.model.config.get_text_config()
        self.context_length = int(getattr(text_config, "max_position_embeddings", None) or 1 << 20)
        rows = int(self.model.get_output_embeddings().weight.shape[0])
        self.runner: Runner = (Runner(self.loaded, spec.name) if like is None else like.runner).using(spec.adapter)
        notes = []
        if self.runner.recomputes:
            notes.append(f"{spec.name} keeps no cache that can be cut back: it reads the whole text at every token")
        self._read: _Read = _Read.of(self._tokenizer, spec.name, source) if like is None else like._read
        self._set_prompts(spec, rows)
        if spec.template is None and not self._tokenizer.chat_template:
            notes.append(f"{spec.name} has no chat template: it gets a plain 'Question: … Answer:' prompt")
        self.notes = tuple(notes)

    def _set_prompts(self, spec: EngineSpec, rows: int) -> None:
        read, tokenizer = self._read, self._tokenizer
        renderer = _Renderer(tokenizer, spec.template, read.begin)
        ends = {*_as_list(tokenizer.eos_token_id), *_as_list(self.model.config.eos_token_id), *read.ends}
        ends |= set(_as_list(getattr(self.model.generation_config, "eos_token_id", None)))
        ends |= renderer.end_of_turn(read.spelled)
        self.encoder = read.encoder
        self.vocabulary = Vocabulary.of(read.tokens, rows, ends, read.control, read.names)
        self.prompts = PromptEncoder(self.encoder, read.spelled, renderer, read.begin, self.encoder.leading_space)
        self.prompts.system = spec.system
        self.stops = PLAIN_STOPS if renderer.plain else ()
        self.reading = {
            "family": read.family.value,
            "normaliser": self.encoder.normaliser,
            "leading space": self.encoder.leading_space,
            "template": "given" if spec.template is not None else "plain" if renderer.plain else "its own",
        }

    @property
    def runs(self) -> int:
        """Engines that differ in their prompts alone run as one."""
        return id(self.runner)

    @property
    def weights(self) -> Mapping[Hashable, int]:
        """Bytes of the model, and of the adapter."""
        return self.loaded.weights(self.adapter)

    def sharing(self, spec: EngineSpec) -> HFEngine:
        """Return an engine on the same weights, with prompts and an adapter of its own."""
        own = f"{self.name}+{Path(spec.adapter).name}" if spec.adapter is not None else self.name
        return HFEngine(replace(spec, name=spec.name or own), self._source, like=self)

    def session(self) -> HFSession:
        """Begin a sequence."""
        return HFSession(self.runner, self.context_length)

    def answer(self, requests: Sequence[tuple[Session, Request]]) -> list[Reply]:
        """Answer all requests, in one forward where they fit and the model can."""
        # A session may stand in for another, as one that remembers its answers does: it is asked by itself.
        together = self.runner.batches and all(isinstance(session, HFSession) for session, _ in requests)
        return self.runner.answer(requests) if together else super().answer(requests)


@dataclass(frozen=True)
class _Read:
    """What a tokenizer says, whatever prompts it is used for.

    spelled: id of each control token by its spelling. begin: ids in front of a text. ends: those a conversion noted.
    """

    family: Family
    encoder: TokenizerEncoder
    tokens: Mapping[int, bytes]
    names: Mapping[int, str]
    control: frozenset[int]
    spelled: dict[str, int]
    begin: list[int]
    ends: list[int]

    @classmethod
    def of(cls, tokenizer: Any, name: str, source: str) -> _Read:
        """Read a tokenizer. Raises TokenizerError when its tokens cannot be mapped to bytes."""
        extra = _converted_notes(source)
        backend = tokenizer.backend_tokenizer
        kind = family(describe(backend), name)
        _make_special(backend, extra.get("control", []))
        tokens, control = token_bytes(backend, kind, name)
        names = {i: spelling for spelling, i in backend.get_vocab(with_added_tokens=True).items()}
        spelled = {one.content: i for i, one in backend.get_added_tokens_decoder().items() if one.special}
        begin = _begin_ids(tokenizer)
        encoder = TokenizerEncoder(backend, kind)
        return cls(kind, encoder, tokens, names, control, spelled, begin, extra.get("ends", []))


class _Renderer:
    """Messages to the text of a chat template."""

    def __init__(self, tokenizer: Any, template: str | None, begin: Sequence[int]) -> None:
        self.plain = template is None and not tokenizer.chat_template
        self._template = PLAIN_TEMPLATE if self.plain else template
        self._tokenizer = tokenizer
        if self.plain:
            # The plain template writes what the tokenizer itself puts in front of a text, and nothing else.
            self._bos = "".join(tokenizer.convert_ids_to_tokens(list(begin)))

    def __call__(self, messages: Sequence[Message]) -> str:
        """Render up to where the reply begins. A system text joins the first question where it has no place."""
        from jinja2 import TemplateError

        if not messages:
            raise ConfigError("the conversation has no messages", "give at least one message of the user")
        turns = [{"role": one.role, "content": one.content} for one in messages]
        try:
            return self._render(turns, add_generation_prompt=True)
        except TemplateError as error:
            if len(turns) > 1 and turns[0]["role"] == "system":
                joined = {"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
                try:
                    return self._render([joined, *turns[2:]], add_generation_prompt=True)
                except TemplateError:
                    pass
            raise ConfigError(f"the prompt template refuses these messages: {error}") from error

    def _render(self, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        options: dict[str, Any] = {"bos_token": self._bos} if self.plain else {}
        rendered: str = self._tokenizer.apply_chat_template(
            turns, chat_template=self._template, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
        return rendered

    def end_of_turn(self, control: dict[str, int]) -> set[int]:
        """Return the control token that the template writes right behind a reply, if it writes one."""
        from jinja2 import TemplateError

        if self.plain:
            return set()
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        try:
            behind = self._render(turns, add_generation_prompt=False).rpartition(_PROBE)[2].lstrip()
        except TemplateError:
            return set()
        return {i for spelled, i in control.items() if behind.startswith(spelled)}


def _load_tokenizer(source: str, name: str) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        with memory_errors(name):
            if (Path(source) / "tokenizer.json").is_file():
                # The file says all that is needed; the class that a model names would only rebuild it, slowly.
                return PreTrainedTokenizerFast.from_pretrained(source)
            tokenizer = AutoTokenizer.from_pretrained(source)
    except MixlmError:
        raise
    except Exception as error:
        raise ModelLoadError(f"the tokenizer of {name} cannot be loaded: {_first_line(error)}") from error
    if hasattr(tokenizer, "backend_tokenizer") and (file := Path(source) / "tokenizer.model").is_file():
        restore_leading_space(tokenizer.backend_tokenizer, file)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise TokenizerError(f"the tokenizer of {name} has no fast form ({type(tokenizer).__name__})")
    return tokenizer


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
            f"{name} cannot be loaded: {_first_line(error)}", "give a folder of a causal language model"
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


def _begin_ids(tokenizer: Any) -> list[int]:
    """Return the ids that the tokenizer puts in front of a text."""
    ids: list[int] = tokenizer.backend_tokenizer.encode("", add_special_tokens=True).ids
    if ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
        ids = ids[:-1]
    return ids


def _make_special(backend: Any, control: Sequence[int]) -> None:
    """Mark control tokens that the tokenizer's own file lists as text."""
    from tokenizers import AddedToken

    added = backend.get_added_tokens_decoder()
    unmarked = [i for i in control if i not in added or not added[i].special]
    names = [backend.id_to_token(i) for i in unmarked]
    backend.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in names if one])


def _converted_notes(source: str) -> dict[str, Any]:
    """Return what the conversion from GGUF wrote down about a model: control ids and end-of-text ids."""
    path = Path(source) / "mixlm.json"
    notes: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return notes


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
