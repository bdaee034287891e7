"""A model's tokenizer as an engine needs it: the bytes of its tokens, special tokens, ends of text, and prompts.

Every engine that runs a model sets up its tokenizer here, whatever runs the weights: from a folder with
`tokenizer.json`, or from a tokenizer that was converted from a GGUF file.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mixlm.engines.base import TextInterface
from mixlm.engines.registry import EngineSpec
from mixlm.errors import MixlmError, ModelLoadError, TemplateError, TokenizerError, memory_errors
from mixlm.models.cache import read_info
from mixlm.models.tokenizer_tables import parse_tokenizer
from mixlm.tokenization.chat_template import ChatTemplate
from mixlm.tokenization.conversation import ConversationRenderer
from mixlm.tokenization.incremental import TokenizerEncoder
from mixlm.tokenization.prompt_encoder import PLAIN_STOPS, PLAIN_TEMPLATE, PromptEncoder
from mixlm.tokenization.tokenizer_folder import TOKENIZER_FILE, FolderTokenizer, read_json_object, read_tokenizer
from mixlm.tokenization.turn_tokens import PROBE, looks_like_control, text_after_response, turn_tokens
from mixlm.tokenization.vocabulary import (
    TokenizerFamily,
    Vocabulary,
    describe,
    detect_family,
    panics_as_errors,
    token_bytes,
    token_names,
)
from mixlm.types import Message


@dataclass(frozen=True)
class TokenizerSetup:
    """A tokenizer and what is known of its tokens, whatever prompts it is used for.

    tokens: bytes of each id. names: its spelling. special_ids: those that no text encodes to. special_tokens: the id of
    each special token by its spelling. begin: ids in front of a text. ends: ends of text by the model's configuration.
    with_template: sets the tokenizer up again, for a chat template in place of the model's own.
    """

    tokenizer: FolderTokenizer
    family: TokenizerFamily
    encoder: TokenizerEncoder
    tokens: Mapping[int, bytes]
    names: Mapping[int, str]
    special_ids: frozenset[int]
    special_tokens: dict[str, int]
    begin: list[int]
    ends: list[int]
    with_template: Callable[[str], TokenizerSetup]

    @classmethod
    def load(cls, source: str, name: str, *, trust_remote_code: bool = False) -> TokenizerSetup:
        """Load a tokenizer from a folder or a hub id.

        Args:
            source: folder or hub id.
            name: of the model, for messages.
            trust_remote_code: whether code in the folder may run.

        Raises:
            ModelLoadError: it cannot be loaded.
            TemplateError: the chat template is broken.
            TokenizerError: it has no fast form, or its tokens cannot be mapped to bytes.
        """
        info = read_info(Path(source))  # of what was converted from GGUF
        ends = [*(info.ends if info else ()), *configured_end_ids(source)]

        def read(template: str | None) -> TokenizerSetup:
            with _without_collections():
                tokenizer = load_tokenizer(source, name, trust_remote_code=trust_remote_code)
                return cls._set_up(tokenizer, name, ends, info.control if info else (), template, read)

        return read(None)

    @classmethod
    def of(cls, tokenizer: Any, name: str, ends: Sequence[int]) -> TokenizerSetup:
        """Set up a tokenizer of transformers, of which the setup keeps a copy.

        Args:
            tokenizer: a `PreTrainedTokenizerFast`.
            name: of the model, for messages.
            ends: ends of text by the model's configuration.

        Raises:
            TemplateError: the chat template is broken.
            TokenizerError: it has no fast form, or its tokens cannot be mapped to bytes.
        """

        def read(template: str | None) -> TokenizerSetup:
            from tokenizers import Tokenizer

            loaded = _from_transformers(tokenizer, name)
            loaded = replace(loaded, backend=Tokenizer.from_str(loaded.backend.to_str()))
            return cls._set_up(loaded, name, ends, [], template, read)

        return read(None)

    @classmethod
    def _set_up(
        cls,
        tokenizer: FolderTokenizer,
        name: str,
        ends: Sequence[int],
        control: Sequence[int],
        template: str | None,
        with_template: Callable[[str], TokenizerSetup],
    ) -> TokenizerSetup:
        backend = tokenizer.backend
        # As transformers does unless it is asked to: what a training run left in the file is not of the text.
        backend.no_truncation()
        backend.no_padding()
        family = detect_family(describe(backend), name)
        control = [*control, *(i for i in ends if looks_like_control(backend.id_to_token(i) or ""))]
        for source_text in (tokenizer.chat_template, template):
            if source_text is not None:
                render = _compiled(tokenizer, source_text, name).render
                control += [backend.token_to_id(token) for token in turn_tokens(render, backend)]
        _make_special(backend, control)
        names = token_names(backend, tokenizer.vocabulary)
        tokens, special_ids = token_bytes(backend, family, name, names)
        begin = _begin_ids(tokenizer)  # before the encoder, which removes the post-processor
        return cls(
            tokenizer,
            family,
            TokenizerEncoder(backend, family, names),
            tokens,
            names,
            special_ids,
            {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special},
            begin,
            list(ends),
            with_template,
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
        template, plain = self._chat_template(spec)
        if spec.template is not None and not self.special_tokens.keys() >= set(
            turn_tokens(template.render, self.tokenizer.backend)
        ):
            return self.with_template(spec.template).text_interface(spec, vocab_size, end_ids, notes)
        after_response = "" if plain else text_after_response(template.render)
        end_of_turn = {i for spelling, i in self.special_tokens.items() if after_response.startswith(spelling)}
        end_of_text = self.tokenizer.named_id("eos_token")
        own_ends = {*as_ids(end_of_text), *self.ends, *end_of_turn}
        renderer = ConversationRenderer(template.render, spec.name, template.variables)
        prompts = PromptEncoder(self.encoder, self.special_tokens, renderer, self.begin)
        prompts.system = spec.system
        notes = [*notes, *self._template_notes(spec, renderer, plain=plain)]
        return TextInterface(
            Vocabulary.of(self.tokens, vocab_size, {*own_ends, *end_ids}, self.special_ids, self.names),
            self.encoder,
            prompts,
            PLAIN_STOPS if plain else (),
            {
                "family": self.family.value,
                "normaliser": self.encoder.normalizers,
                "leading space": self.encoder.leading_space,
                "template": "given" if spec.template is not None else "plain" if plain else "its own",
            },
            tuple(notes),
        )

    def _chat_template(self, spec: EngineSpec) -> tuple[ChatTemplate, bool]:
        """Return a member's chat template, and whether it is the plain one, for want of another."""
        source = spec.template if spec.template is not None else self.tokenizer.chat_template
        if source is not None:
            return _compiled(self.tokenizer, source, spec.name), False
        # The plain template begins with what the tokenizer itself puts in front of a text.
        begin = "".join(self.tokenizer.backend.id_to_token(i) for i in self.begin)
        return ChatTemplate(PLAIN_TEMPLATE, {"bos_token": begin}, f"the plain prompt of {spec.name}"), True

    def _template_notes(self, spec: EngineSpec, renderer: ConversationRenderer, *, plain: bool) -> list[str]:
        """Return what a user should know about the chat template."""
        if plain:
            return [f"{spec.name} has no chat template: it gets a plain 'Question: … Answer:' prompt"]
        try:
            renderer([Message("user", PROBE)])
        except TemplateError as error:
            return [f"{spec.name} takes no messages, only --raw text: {error.message}"]
        return []


def load_tokenizer(source: str, name: str, *, trust_remote_code: bool = False) -> FolderTokenizer:
    """Load the fast tokenizer of a folder or a hub id: see `TokenizerSetup.load`."""
    try:
        with memory_errors(name):
            if (Path(source) / TOKENIZER_FILE).is_file():
                # The file is complete; the class that a model names would only rebuild it, slowly.
                return read_tokenizer(Path(source), partial(parse_tokenizer, folder=Path(source)))
            return _converted_tokenizer(source, name, trust_remote_code=trust_remote_code)
    except MixlmError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise remote_code_error(f"the tokenizer of {name}") from error
        raise ModelLoadError(f"the tokenizer of {name} cannot be loaded: {error_summary(error)}") from error


def _converted_tokenizer(source: str, name: str, *, trust_remote_code: bool) -> FolderTokenizer:
    """Load the tokenizer of a folder without `tokenizer.json`, or of a hub id, by transformers."""
    from transformers import AutoTokenizer

    tokenizer = _from_transformers(AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code), name)
    if (file := Path(source) / "tokenizer.model").is_file():
        from mixlm.tokenization.sentencepiece import restore_leading_space

        restore_leading_space(tokenizer.backend, file)
    return tokenizer


def _from_transformers(tokenizer: Any, name: str) -> FolderTokenizer:
    """Return what is needed of a tokenizer of transformers, which shares its backend."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise TokenizerError(f"the tokenizer of {name} has no fast form ({type(tokenizer).__name__})")
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    return FolderTokenizer(tokenizer.backend_tokenizer, tokenizer.special_tokens_map, template)


def _compiled(tokenizer: FolderTokenizer, source: str, name: str) -> ChatTemplate:
    """Return a member's chat template, ready to render."""
    own = source == tokenizer.chat_template and tokenizer.template_file
    origin = f"the chat template of {name}" + (f" ({tokenizer.template_file})" if own else "")
    return ChatTemplate(source, tokenizer.named, origin)


def configured_end_ids(source: str) -> list[int]:
    """Return the ends of text that `config.json` and `generation_config.json` name; none where there is neither.

    Args:
        source: folder or hub id.

    Raises:
        ModelLoadError: a file is broken.
    """
    if Path(source).is_dir():
        files = (Path(source) / name for name in ("config.json", "generation_config.json"))
        return [i for file in files for i in _end_ids(file)]
    from transformers import AutoConfig, GenerationConfig

    end_ids: list[int] = []
    for reader in (AutoConfig, GenerationConfig):
        try:
            # Never with the code of a repository: a configuration is read without it.
            hub_config = reader.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError):  # there is none, or transformers does not know the architecture
            continue
        end_ids += as_ids(getattr(hub_config, "eos_token_id", None))
    return end_ids


def _end_ids(file: Path) -> list[int]:
    """Return the ends of text that a configuration file names. Raises ModelLoadError for one that is broken."""
    try:
        config = read_json_object(file) or {}
        parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
        ids = [i for part in parts for i in as_ids(part.get("eos_token_id"))]
        if not all(type(i) is int and i < 1 << 31 for i in ids):
            raise ValueError(f"its eos_token_id is {ids}, and must be an id or a list of ids")
    except (OSError, ValueError, TypeError) as error:
        raise ModelLoadError(f"{file} cannot be read: {error_summary(error)}", "copy or download it again") from error
    return ids


def as_ids(value: int | Sequence[int] | None) -> list[int]:
    """Return the ids of a configuration's field, which holds one, several or none; a negative number is none."""
    ids = [] if value is None else [value] if isinstance(value, int) else value
    return [i for i in ids if not (isinstance(i, int) and i < 0)]


def remote_code_error(what: str) -> ModelLoadError:
    """Return the error for what needs Python code from a model's folder."""
    return ModelLoadError(
        f"{what} needs Python code in the model's folder, which is not run",
        "if you trust it: trust_remote_code = true for the member in the ensemble file, or "
        "mixlm.load(…, trust_remote_code=True), or --trust-remote-code",
    )


def error_summary(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    # Such messages say what was not found, and not that it was looked for.
    programming = isinstance(error, LookupError | ArithmeticError | AttributeError | TypeError | NameError)
    return f"{type(error).__name__}: {line}" if programming and line != type(error).__name__ else line


@contextmanager
def _without_collections() -> Iterator[None]:
    """Pause the garbage collector: it would look again and again at the millions of objects of a large vocabulary."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _begin_ids(tokenizer: FolderTokenizer) -> list[int]:
    """Return the ids that the tokenizer puts in front of a text."""
    with panics_as_errors("", "look at its post_processor"):
        ids: list[int] = tokenizer.backend.encode("", add_special_tokens=True).ids
    if ids and ids[-1] == tokenizer.named_id("eos_token") != tokenizer.named_id("bos_token"):
        ids = ids[:-1]
    return ids


def _make_special(backend: Any, ids: Iterable[int]) -> None:
    """Mark special tokens that the tokenizer's own file lists as text."""
    from tokenizers import AddedToken

    added = backend.get_added_tokens_decoder()
    tokens = []
    for i in dict.fromkeys(ids):
        name = backend.id_to_token(i)
        if name and not (i in added and added[i].special):
            token = added.get(i) or AddedToken(name, normalized=False)
            token.special = True
            tokens.append(token)
    backend.add_special_tokens(tokens)
