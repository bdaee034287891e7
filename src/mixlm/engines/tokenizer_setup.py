"""A model's tokenizer as an engine needs it: exact bytes of tokens, control tokens, ends of text, and its prompts.

Every engine that runs a model reads its tokenizer here, whatever runs the weights: from a folder with `tokenizer.json`,
or from what was converted of a GGUF file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlm.engines.base import Engine
from mixlm.engines.spec import EngineSpec
from mixlm.errors import ConfigError, MixlmError, ModelLoadError, TokenizerError
from mixlm.tokenization.chat_template import PLAIN_STOPS, PLAIN_TEMPLATE, PromptEncoder
from mixlm.tokenization.incremental import TokenizerEncoder
from mixlm.tokenization.sentencepiece import restore_leading_space
from mixlm.tokenization.vocabulary import TokenizerFamily, Vocabulary, describe, detect_family, token_bytes
from mixlm.types import Message

_PROBE = "0123456789"


@dataclass(frozen=True)
class TokenizerSetup:
    """What a tokenizer says, whatever prompts it is used for.

    spelled: id of each control token by its spelling. begin: ids in front of a text. ends: those a conversion noted.
    """

    family: TokenizerFamily
    encoder: TokenizerEncoder
    tokens: Mapping[int, bytes]
    names: Mapping[int, str]
    control: frozenset[int]
    spelled: dict[str, int]
    begin: list[int]
    ends: list[int]

    @classmethod
    def of(cls, tokenizer: Any, name: str, source: str) -> TokenizerSetup:
        """Read a tokenizer. Raises TokenizerError when its tokens cannot be mapped to bytes."""
        extra = _converted_notes(source)
        backend = tokenizer.backend_tokenizer
        kind = detect_family(describe(backend), name)
        _make_special(backend, extra.get("control", []))
        tokens, control = token_bytes(backend, kind, name)
        names = {i: spelling for spelling, i in backend.get_vocab(with_added_tokens=True).items()}
        spelled = {one.content: i for i, one in backend.get_added_tokens_decoder().items() if one.special}
        begin = _begin_ids(tokenizer)
        encoder = TokenizerEncoder(backend, kind)
        return cls(kind, encoder, tokens, names, control, spelled, begin, extra.get("ends", []))

    def give(self, engine: Engine, tokenizer: Any, spec: EngineSpec, rows: int, ends: Collection[int]) -> list[str]:
        """Set an engine's vocabulary, encoder, prompts, stops and reading; return what a user should know.

        rows: of the output layer. ends: the model's own ends of text, beside those that the tokenizer has.
        """
        renderer = _Renderer(tokenizer, spec.template, self.begin)
        every_end = {*as_ids(tokenizer.eos_token_id), *ends, *self.ends, *renderer.end_of_turn(self.spelled)}
        engine.encoder = self.encoder
        engine.vocabulary = Vocabulary.of(self.tokens, rows, every_end, self.control, self.names)
        engine.prompts = PromptEncoder(self.encoder, self.spelled, renderer, self.begin, self.encoder.leading_space)
        engine.prompts.system = spec.system
        engine.stops = PLAIN_STOPS if renderer.plain else ()
        engine.tokenizer_info = {
            "family": self.family.value,
            "normaliser": self.encoder.normalizers,
            "leading space": self.encoder.leading_space,
            "template": "given" if spec.template is not None else "plain" if renderer.plain else "its own",
        }
        plain = f"{spec.name} has no chat template: it gets a plain 'Question: … Answer:' prompt"
        return [plain] if renderer.plain else []


def load_tokenizer(
    source: str, name: str, memory_errors: Callable[[str], AbstractContextManager[Any]] = nullcontext
) -> Any:
    """Load the tokenizer of a folder or a hub id, in its fast form. memory_errors: names what says that memory is out.

    Raises ModelLoadError when it cannot be loaded, TokenizerError when it has no fast form.
    """
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
        raise ModelLoadError(f"the tokenizer of {name} cannot be loaded: {first_line(error)}") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise TokenizerError(f"the tokenizer of {name} has no fast form ({type(tokenizer).__name__})")
    if (file := Path(source) / "tokenizer.model").is_file():
        restore_leading_space(tokenizer.backend_tokenizer, file)
    return tokenizer


def as_ids(value: int | Sequence[int] | None) -> list[int]:
    """Return what a configuration gives as one id, several or none, as a list."""
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or what it is called."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
