"""A model's tokenizer as an engine needs it: the bytes of its tokens, special tokens, ends of text, and prompts.

Every engine that runs a model sets up its tokenizer here, whatever runs the weights: from a folder with
`tokenizer.json`, or from a tokenizer that was converted from a GGUF file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlm.engines.base import TextInterface
from mixlm.engines.spec import EngineSpec
from mixlm.errors import ConfigError, MixlmError, ModelLoadError, TokenizerError
from mixlm.tokenization.chat_template import PLAIN_STOPS, PLAIN_TEMPLATE, PromptEncoder
from mixlm.tokenization.incremental import TokenizerEncoder
from mixlm.tokenization.vocabulary import TokenizerFamily, Vocabulary, describe, detect_family, token_bytes
from mixlm.types import Message

_PROBE = "0123456789"


@dataclass(frozen=True)
class TokenizerSetup:
    """A tokenizer and what is known of its tokens, whatever prompts it is used for.

    tokens: bytes of each id. names: its spelling. special_ids: those that no text encodes to. special_tokens: the id of
    each special token by its spelling. begin: ids in front of a text. ends: ends of text by the model's configuration.
    """

    tokenizer: Any
    family: TokenizerFamily
    encoder: TokenizerEncoder
    tokens: Mapping[int, bytes]
    names: Mapping[int, str]
    special_ids: frozenset[int]
    special_tokens: dict[str, int]
    begin: list[int]
    ends: list[int]

    @classmethod
    def load(
        cls, source: str, name: str, memory_errors: Callable[[str], AbstractContextManager[Any]] = nullcontext
    ) -> TokenizerSetup:
        """Load a tokenizer from a folder or a hub id.

        Args:
            source: folder or hub id.
            name: of the model, for messages.
            memory_errors: translates errors that mean that memory ran out.

        Raises:
            ModelLoadError: it cannot be loaded.
            TokenizerError: it has no fast form, or its tokens cannot be mapped to bytes.
        """
        tokenizer = load_tokenizer(source, name, memory_errors)
        conversion_notes = _conversion_notes(source)
        backend = tokenizer.backend_tokenizer
        family = detect_family(describe(backend), name)
        _make_special(backend, conversion_notes.get("control", []))
        tokens, special_ids = token_bytes(backend, family, name)
        begin = _begin_ids(tokenizer)  # before the encoder, which removes the post-processor
        return cls(
            tokenizer,
            family,
            TokenizerEncoder(backend, family),
            tokens,
            {i: spelling for spelling, i in backend.get_vocab(with_added_tokens=True).items()},
            special_ids,
            {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special},
            begin,
            [*conversion_notes.get("ends", []), *configured_end_ids(source)],
        )

    def text_interface(
        self, spec: EngineSpec, vocab_size: int, end_ids: Collection[int] = (), notes: Sequence[str] = ()
    ) -> TextInterface:
        """Return the text interface of an engine.

        Args:
            spec: its name, chat template and system message count.
            vocab_size: rows of the output layer.
            end_ids: the model's own ends of text, besides those of the tokenizer and the configuration.
            notes: what a user should know about the model.
        """
        renderer = _Renderer(self.tokenizer, spec.template, self.begin)
        own_ends = {*as_ids(self.tokenizer.eos_token_id), *self.ends, *renderer.end_of_turn(self.special_tokens)}
        prompts = PromptEncoder(self.encoder, self.special_tokens, renderer, self.begin, self.encoder.leading_space)
        prompts.system = spec.system
        plain = f"{spec.name} has no chat template: it gets a plain 'Question: … Answer:' prompt"
        return TextInterface(
            Vocabulary.of(self.tokens, vocab_size, {*own_ends, *end_ids}, self.special_ids, self.names),
            self.encoder,
            prompts,
            PLAIN_STOPS if renderer.plain else (),
            {
                "family": self.family.value,
                "normaliser": self.encoder.normalizers,
                "leading space": self.encoder.leading_space,
                "template": "given" if spec.template is not None else "plain" if renderer.plain else "its own",
            },
            (*notes, plain) if renderer.plain else tuple(notes),
        )


def load_tokenizer(
    source: str, name: str, memory_errors: Callable[[str], AbstractContextManager[Any]] = nullcontext
) -> Any:
    """Load the fast tokenizer of a folder or a hub id: see `TokenizerSetup.load`."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        with memory_errors(name):
            if (Path(source) / "tokenizer.json").is_file():
                # The file is complete; the class that a model names would only rebuild it, slowly.
                return PreTrainedTokenizerFast.from_pretrained(source)
            tokenizer = AutoTokenizer.from_pretrained(source)
    except MixlmError:
        raise
    except Exception as error:
        raise ModelLoadError(f"the tokenizer of {name} cannot be loaded: {first_line(error)}") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise TokenizerError(f"the tokenizer of {name} has no fast form ({type(tokenizer).__name__})")
    if (file := Path(source) / "tokenizer.model").is_file():
        from mixlm.tokenization.sentencepiece import restore_leading_space

        restore_leading_space(tokenizer.backend_tokenizer, file)
    return tokenizer


def configured_end_ids(source: str) -> list[int]:
    """Return the ends of text that `config.json` and `generation_config.json` name; none where there is neither.

    Args:
        source: folder or hub id.
    """
    from transformers import AutoConfig, GenerationConfig

    end_ids: list[int] = []
    for reader in (AutoConfig, GenerationConfig):
        try:
            config = reader.from_pretrained(source)
        except (OSError, ValueError):  # there is none, or transformers does not know the architecture
            continue
        end_ids += as_ids(getattr(config, "eos_token_id", None))
    return end_ids


def as_ids(value: int | Sequence[int] | None) -> list[int]:
    """Return the ids of a configuration's field, which holds one, several or none."""
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _Renderer:
    """Renders messages by a chat template. plain: the tokenizer has none."""

    def __init__(self, tokenizer: Any, template: str | None, begin: Sequence[int]) -> None:
        self.plain = template is None and not tokenizer.chat_template
        self._template = PLAIN_TEMPLATE if self.plain else template
        self._tokenizer = tokenizer
        if self.plain:
            # The plain template begins with what the tokenizer itself puts in front of a text.
            self._bos = "".join(tokenizer.convert_ids_to_tokens(list(begin)))

    def __call__(self, messages: Sequence[Message]) -> str:
        """Render up to where the response begins.

        Where a template allows no system message, it is joined to the first user message.
        """
        from jinja2 import TemplateError

        if not messages:
            raise ConfigError("the conversation has no messages", "give at least one message of the user")
        turns = [{"role": message.role, "content": message.content} for message in messages]
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

    def end_of_turn(self, special_tokens: dict[str, int]) -> set[int]:
        """Return the special token that the template writes right behind a response, if there is one."""
        from jinja2 import TemplateError

        if self.plain:
            return set()
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        try:
            rest = self._render(turns, add_generation_prompt=False).rpartition(_PROBE)[2].lstrip()
        except TemplateError:
            return set()
        return {i for spelling, i in special_tokens.items() if rest.startswith(spelling)}


def _begin_ids(tokenizer: Any) -> list[int]:
    """Return the ids that the tokenizer puts in front of a text."""
    ids: list[int] = tokenizer.backend_tokenizer.encode("", add_special_tokens=True).ids
    if ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
        ids = ids[:-1]
    return ids


def _make_special(backend: Any, special_ids: Sequence[int]) -> None:
    """Mark special tokens that the tokenizer's own file lists as text."""
    from tokenizers import AddedToken

    added = backend.get_added_tokens_decoder()
    unmarked = [i for i in special_ids if i not in added or not added[i].special]
    names = [backend.id_to_token(i) for i in unmarked]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names if name])


def _conversion_notes(source: str) -> dict[str, Any]:
    """Return the special ids and ends of text that the conversion from GGUF noted."""
    path = Path(source) / "mixlm.json"
    notes: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return notes
