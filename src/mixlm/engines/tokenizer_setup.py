"""A model's tokenizer as an engine needs it: the bytes of its tokens, special tokens, ends of text, and prompts.

Every engine that runs a model sets up its tokenizer here, whatever runs the weights: from a folder with
`tokenizer.json`, or from a tokenizer that was converted from a GGUF file.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mixlm.engines.base import EngineSpec, TextInterface
from mixlm.errors import MixlmError, ModelLoadError, TemplateError, TokenizerError, memory_errors
from mixlm.models.cache import read_info
from mixlm.models.tokenizer_tables import parse_tokenizer
from mixlm.tokenization.chat_template import (
    PROBE,
    ChatTemplate,
    looks_like_control,
    text_after_response,
    turn_tokens,
)
from mixlm.tokenization.conversation import ConversationRenderer
from mixlm.tokenization.incremental import TokenizerEncoder
from mixlm.tokenization.prompt_encoder import PLAIN_STOPS, PLAIN_TEMPLATE, PromptEncoder
from mixlm.tokenization.tokenizer_folder import TOKENIZER_FILE, FolderTokenizer, read_json_object, read_tokenizer
from mixlm.tokenization.vocabulary import (
    Vocabulary,
    detect_family,
    panics_as_errors,
    token_bytes,
    token_names,
)
from mixlm.types import Message


class TokenizerSetup:
    """A tokenizer and what is known of its tokens, whatever prompts it is used for.

    special_tokens: the id of each special token by its spelling. ends: ends of text by the model's configuration.

    Args:
        read: reads the tokenizer.
        name: of the model, for messages.
        ends: as above.
        control: other ids of control tokens.
        template: a chat template in place of the model's own, whose control tokens are special too.

    Raises:
        TemplateError: the chat template is broken.
        TokenizerError: the tokenizer has no fast form, or its tokens cannot be mapped to bytes.
    """

    def __init__(
        self,
        read: Callable[[], FolderTokenizer],
        name: str,
        ends: Sequence[int],
        control: Sequence[int] = (),
        template: str | None = None,
    ) -> None:
        self._with_template = partial(TokenizerSetup, read, name, ends, control)
        with _without_collections():
            self.tokenizer = tokenizer = read()
            backend = tokenizer.backend
            # As transformers does unless it is asked to: what a training run left in the file is not of the text.
            backend.no_truncation()
            backend.no_padding()
            self._family = detect_family(backend, name)
            special = [*control, *(i for i in ends if looks_like_control(backend.id_to_token(i) or ""))]
            for source_text in (tokenizer.chat_template, template):
                if source_text is not None:
                    own = _compiled(tokenizer, source_text, name)
                    special += [backend.token_to_id(token) for token in turn_tokens(own, backend)]
            _make_special(backend, special)
            self._names = token_names(backend, tokenizer.vocabulary)
            self._tokens, self._special_ids = token_bytes(backend, self._family, name, self._names)
            self._begin = _begin_ids(tokenizer)  # before the encoder, which removes the post-processor
            self._encoder = TokenizerEncoder(backend, self._family, self._names)
            added = backend.get_added_tokens_decoder()
            self.special_tokens: dict[str, int] = {token.content: i for i, token in added.items() if token.special}
            self.ends = list(ends)

    @classmethod
    def load(cls, source: str, name: str, *, trust_remote_code: bool = False) -> TokenizerSetup:
        """Load a tokenizer from a folder or a hub id. Raises ModelLoadError too, where it cannot be loaded."""
        info = read_info(Path(source))  # of what was converted from GGUF
        ends = [*(info.ends if info else ()), *configured_end_ids(source)]
        read = partial(load_tokenizer, source, name, trust_remote_code=trust_remote_code)
        return cls(read, name, ends, info.control if info else ())

    @classmethod
    def of(cls, tokenizer: Any, name: str, ends: Sequence[int]) -> TokenizerSetup:
        """Set up a tokenizer of transformers, a `PreTrainedTokenizerFast`, of which the setup keeps a copy."""

        def read() -> FolderTokenizer:
            from tokenizers import Tokenizer

            loaded = _from_transformers(tokenizer, name)
            return replace(loaded, backend=Tokenizer.from_str(loaded.backend.to_str()))

        return cls(read, name, ends)

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
        tokenizer = self.tokenizer
        source = spec.template if spec.template is not None else tokenizer.chat_template
        if source is None:
            # The plain template begins with what the tokenizer itself puts in front of a text.
            begin = "".join(tokenizer.backend.id_to_token(i) for i in self._begin)
            template = ChatTemplate(PLAIN_TEMPLATE, {"bos_token": begin}, f"the plain prompt of {spec.name}")
        else:
            template = _compiled(tokenizer, source, spec.name)
        if spec.template is not None and not self.special_tokens.keys() >= {*turn_tokens(template, tokenizer.backend)}:
            return self._with_template(spec.template).text_interface(spec, vocab_size, end_ids, notes)
        after_response = "" if source is None else text_after_response(template)
        end_of_turn = {i for spelling, i in self.special_tokens.items() if after_response.startswith(spelling)}
        own_ends = {*as_ids(tokenizer.named_id("eos_token")), *self.ends, *end_of_turn}
        renderer = ConversationRenderer(template, spec.name)
        prompts = PromptEncoder(self._encoder, self.special_tokens, renderer, self._begin)
        prompts.system = spec.system
        notes = [*notes]
        if source is None:
            notes.append(f"{spec.name} has no chat template: it gets a plain 'Question: … Answer:' prompt")
        else:
            try:
                renderer([Message("user", PROBE)])
            except TemplateError as error:
                notes.append(f"{spec.name} takes no messages, only --raw text: {error.message}")
        return TextInterface(
            Vocabulary.of(self._tokens, vocab_size, {*own_ends, *end_ids}, self._special_ids, self._names),
            self._encoder,
            prompts,
            PLAIN_STOPS if source is None else (),
            {
                "family": self._family.value,
                "normaliser": self._encoder.normalizers,
                "leading space": self._encoder.leading_space,
                "template": "given" if spec.template is not None else "plain" if source is None else "its own",
            },
            tuple(notes),
        )


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
