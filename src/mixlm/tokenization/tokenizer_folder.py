"""The tokenizer of a model folder with `tokenizer.json`, read by the `tokenizers` library alone.

What stands beside that file is read as transformers reads it (`PreTrainedTokenizerFast.from_pretrained`): special
tokens and added tokens of `tokenizer_config.json`, in its absence of `special_tokens_map.json` and `added_tokens.json`,
and the chat template. Importing transformers takes longer than loading a small model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixlm.errors import TemplateError

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKENIZER_FILE = "tokenizer.json"
_COMPONENTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_BPE_OPTIONS = (
    *("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"),
    *("fuse_unk", "byte_fallback", "ignore_merges"),
)


@dataclass(frozen=True)
class FolderTokenizer:
    """A tokenizer with what chat templates need.

    backend: a `tokenizers.Tokenizer`. named: special tokens by their names, such as "bos_token". chat_template: the
    model's own, if it has one. template_file: where it stands, for messages. vocabulary: the ids of the model's tokens,
    where they are known without asking for them.
    """

    backend: Any
    named: Mapping[str, str]
    chat_template: str | None
    template_file: str = ""
    vocabulary: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of tokens, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def named_id(self, name: str) -> int | None:
        """Return the id of a named special token, such as "eos_token"; None if there is none."""
        token = self.named.get(name)
        return None if token is None else self.backend.token_to_id(token)


def read_tokenizer(folder: Path, parse: Callable[[bytes], Any] = json.loads) -> FolderTokenizer:
    """Read the tokenizer of a folder with `tokenizer.json`.

    Args:
        folder: The folder.
        parse: Reads the JSON of that file.

    Raises:
        TemplateError: There are several chat templates, and none is the default.
        OSError, ValueError, TypeError: A file cannot be read.
        Exception: `tokenizers` raises it bare where `tokenizer.json` is broken.
    """
    config = read_json_object(folder / "tokenizer_config.json") or {}
    backend, vocabulary = _read_backend(folder / TOKENIZER_FILE, parse)
    named = {name: value for name, value in config.items() if name.endswith("_token") and _is_token(value)}
    extra = _extra_tokens(config, named)
    if "added_tokens_decoder" in config:
        added = {int(i): _added(token) for i, token in config["added_tokens_decoder"].items()}
    else:  # as older versions of transformers wrote it
        special = read_json_object(folder / "special_tokens_map.json") or {}
        named |= {name: value for name, value in special.items() if _is_token(value)}
        more = [token for token in _extra_tokens(special, named) if token not in extra]
        # The old name "additional_special_tokens" does not make special what stands in added_tokens.json.
        contents = {_content(token) for token in [*named.values(), *extra]}
        if "extra_special_tokens" in special:
            contents |= {_content(token) for token in more}
        extra += more
        listed = read_json_object(folder / "added_tokens.json") or {}
        added = {
            i: _added({"content": token, "normalized": token not in contents, "special": token in contents})
            for token, i in listed.items()
        } | backend.get_added_tokens_decoder()
    named = {name: named[name] for name in _NAMED if name in named} | named
    _add_tokens(backend, added, named, extra)
    template, file = _chat_template(folder, config)
    named = {name: _content(value) for name, value in named.items()}
    return FolderTokenizer(backend, named, template, file, vocabulary)


def _read_backend(file: Path, parse: Callable[[bytes], Any] = json.loads) -> tuple[Any, Mapping[str, int]]:
    """Return the tokenizer of a file, and the ids of its model's tokens if they are known.

    Python's JSON reads the large table of a BPE model in less time than the library does, which reads all others.
    """
    from tokenizers import Tokenizer, models

    data = parse(file.read_bytes())
    model = data.get("model") or {}
    if model.get("type") == "BPE" and not data.get("truncation") and not data.get("padding"):
        options = {name: model[name] for name in _BPE_OPTIONS if model.get(name) is not None}
        try:
            backend = Tokenizer(models.BPE(model["vocab"], list(map(tuple, model["merges"])), **options))
            shell = Tokenizer.from_str(
                json.dumps({**data, "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []})
            )
            for name in _COMPONENTS:
                if (component := getattr(shell, name)) is not None:
                    setattr(backend, name, component)
            backend.add_tokens([_added(token) for token in data["added_tokens"]])
        except Exception:  # an older form, or a broken file: the library says what is wrong
            return Tokenizer.from_file(str(file)), {}
        added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
        if added == {token["id"]: token["content"] for token in data["added_tokens"]}:
            return backend, model["vocab"]
    return Tokenizer.from_file(str(file)), {}


def _add_tokens(backend: Any, added: Mapping[int, Any], named: Mapping[str, Any], extra: Sequence[Any]) -> None:
    """Add the tokens that the configuration has and `tokenizer.json` lacks, in the order of transformers."""
    existing = backend.get_added_tokens_decoder().values()
    flags = {_flags(token) for token in existing}
    known = {token.content for token in existing} | {token.content for token in added.values()}
    named_contents = {_content(token) for token in named.values()}
    tokens = []
    for _, token in sorted(added.items()):
        token.special = token.special or token.content in named_contents
        if _flags(token) not in flags:
            tokens.append(token)
    for value in [*named.values(), *extra]:
        if _content(value) not in known:
            known.add(_content(value))
            tokens.append(_added(value, special=True))
    backend.add_tokens(tokens)


def _extra_tokens(config: Mapping[str, Any], named: dict[str, Any]) -> list[Any]:
    """Return the special tokens without a name; those that have one join `named`."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        named |= extra
        return []
    return list(extra)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the default chat template and the name of the file that it stands in."""
    templates: dict[str, str] = {}
    source = "tokenizer_config.json"
    main = folder / "chat_template.jinja"
    if main.is_file():
        templates["default"] = main.read_text("utf-8")
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = file.read_text("utf-8")
    if templates:
        source = main.name
    else:
        value = config.get("chat_template")
        if value is None:
            # Processors of multimodal models keep it here.
            source = "chat_template.json"
            value = (read_json_object(folder / source) or {}).get("chat_template")
        if isinstance(value, list | tuple):
            value = {entry["name"]: entry["template"] for entry in value}
        templates = value if isinstance(value, dict) else {"default": value} if value else {}
    if templates and "default" not in templates:
        raise TemplateError(
            f"{folder / source} has the chat templates {', '.join(sorted(templates))}, and none is 'default'",
            "give the member one of them, or a template of its own: template_file = PATH",
        )
    return templates.get("default"), source


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file; None where there is none. Raises OSError or ValueError."""
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text("utf-8"))
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return data


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _content(token: Any) -> str:
    return str(token if isinstance(token, str) else token["content"])


def _added(value: Any, *, special: bool | None = None) -> Any:
    """Return an `AddedToken` from its description, or from its text."""
    from tokenizers import AddedToken

    if isinstance(value, str):
        return AddedToken(value, special=bool(special))
    options = {key: flag for key, flag in value.items() if key in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(value["content"], special=value.get("special", False) or bool(special), **options)


def _flags(token: Any) -> tuple[Any, ...]:
    return token.content, token.single_word, token.lstrip, token.rstrip, token.normalized, token.special
