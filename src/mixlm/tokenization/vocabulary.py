"""Token ids as exact bytes, for the two families of tokenizers in use.

    byte-level      each character of a token stands for one byte, by GPT-2's alphabet (GPT-2, Llama 3, Qwen, SmolLM)
    SentencePiece   "▁" stands for a space, "<0x0A>" for one byte where the tokenizer falls back to bytes
                    (Llama 2, Gemma, Mistral), the rest is the text itself

Other tokenizers, such as WordPiece, are refused: a guess would put wrong bytes into a text.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, product
from string import hexdigits
from typing import Any

import numpy as np

from mixlm.errors import TokenizerError
from mixlm.types import Ids

SPACE = "▁"
_SPACES = (SPACE, " ", "Ġ")  # how a token of a space alone is spelled; the last one in the byte-level alphabet
# From here on, in characters, a text is encoded so that other threads go on; that takes 0.2 ms more.
_LONG_TEXT = 2000


class TokenizerFamily(Enum):
    """How a tokenizer spells its tokens."""

    BYTE_LEVEL = "byte-level"
    SENTENCEPIECE = "SentencePiece"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one model, by the rows of its output layer.

    tokens: exact bytes of each id; empty for special tokens, end-of-text and padding rows.
    end_ids: ids that end a completion. special_ids: ids that only templates may use; they include `end_ids`.
    names: the tokenizer's own spelling of each id, also of those without a row; empty for padding rows, and altogether
        where it is not known.
    """

    tokens: tuple[bytes, ...]
    end_ids: frozenset[int]
    special_ids: frozenset[int]
    names: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of rows of the output layer, padding included."""
        return len(self.tokens)

    @property
    def has_all_rows(self) -> bool:
        """Whether every token of the tokenizer has a row, so that no text has one without; false if not known."""
        return 0 < len(self.names) <= self.size

    def name(self, i: int) -> str:
        """Return the tokenizer's spelling of an id; where that is not known, its bytes as text, or its number."""
        name = self.names[i] if i < len(self.names) else ""
        data = self.tokens[i] if i < self.size else b""
        return name or data.decode(errors="backslashreplace") or f"<{i}>"

    def check_rows(self, ids: Sequence[int] | Ids, name: str) -> None:
        """Raise TokenizerError for ids that the model has no row for: a forward pass would fail on them.

        name: of the member, for the message.
        """
        if self.has_all_rows:  # no need to look at every id of a text at every token
            return
        if len(ids) and (token := int(np.max(ids))) >= self.size:
            raise TokenizerError(
                f"the text has the token {self.name(token)!r} (id {token}) for {name}, whose model "
                f"has embeddings for ids below {self.size} only",
                "its tokenizer has tokens that the model was not trained with; take this one out of the text",
            )

    @classmethod
    def of(
        cls,
        tokens: Mapping[int, bytes],
        size: int,
        end_ids: Iterable[int],
        special_ids: Iterable[int],
        names: Mapping[int, str] | None = None,
    ) -> Vocabulary:
        """Build a vocabulary from the bytes of its tokens.

        Args:
            tokens: Bytes by id; ids without bytes are padding.
            size: Rows of the output layer; ids beyond it cannot be sampled.
            end_ids: Ids that end a completion.
            special_ids: Ids of special tokens.
            names: The tokenizer's own spelling by id.
        """
        ends = frozenset(i for i in end_ids if i < size)
        special = frozenset(i for i in special_ids if i < size) | ends
        rows = [b""] * size
        for i, data in tokens.items():
            if i < size and i not in special:
                rows[i] = data
        spellings = [""] * max(size, max(names, default=-1) + 1) if names is not None else []
        for i, spelling in (names or {}).items():
            spellings[i] = spelling
        return cls(tuple(rows), ends, special, tuple(spellings))


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: the character that stands for each byte (Radford et al., 2019).

    Printable Latin-1 stands for itself; the other 68 bytes take the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def detect_family(tokenizer: Any, name: str) -> TokenizerFamily:
    """Return how a tokenizer spells its tokens.

    Args:
        tokenizer: A `tokenizers.Tokenizer`.
        name: The model's, for the message.

    Raises:
        TokenizerError: The tokenizer is neither byte-level nor SentencePiece.
    """
    decoders = components(tokenizer, "decoder")
    kinds = {decoder["type"] for decoder in decoders}
    pre = {part["type"] for part in components(tokenizer, "pre_tokenizer")}
    if "ByteLevel" in kinds or (not kinds and "ByteLevel" in pre):
        return TokenizerFamily.BYTE_LEVEL
    spaces = any(d["type"] == "Replace" and d["pattern"].get("String") == SPACE for d in decoders)
    if "Metaspace" in kinds or spaces:
        return TokenizerFamily.SENTENCEPIECE
    raise TokenizerError(
        f"the tokenizer of {name} cannot be mapped to bytes: its decoder is {', '.join(sorted(kinds)) or 'none'}",
        "byte-level BPE and SentencePiece tokenizers can be used",
    )


def components(tokenizer: Any, field: str) -> list[dict[str, Any]]:
    """Return the parts of a component of a `tokenizers.Tokenizer` as plain data: itself, or those of a sequence.

    field: "normalizer", "pre_tokenizer" or "decoder".
    """

    def parts(component: Mapping[str, Any]) -> list[dict[str, Any]]:
        if component["type"] != "Sequence":
            return [dict(component)]
        return [part for nested in component[f"{field.replace('_', '')}s"] for part in parts(nested)]

    component = getattr(tokenizer, field)
    return [] if component is None else parts(json.loads(component.__getstate__()))


def load_component(field: str, description: Mapping[str, Any]) -> Any:
    """Return a component from its description. field: "normalizer" or "pre_tokenizer"."""
    from tokenizers import Tokenizer, models

    shell = json.loads(Tokenizer(models.BPE()).to_str())
    return getattr(Tokenizer.from_str(json.dumps(shell | {field: description})), field)


def encode_text(tokenizer: Any, text: str, *, ids_only: bool = False) -> Any:
    """Return the encoding of a text by a `tokenizers.Tokenizer`, without what it puts around a text.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        ids_only: Whether nothing but the ids is needed; that takes less time.

    Raises:
        TokenizerError: The library fails.
    """
    # It panics where two added tokens both want the spaces between them, or a normalizer cuts a character.
    with panics_as_errors(text, "look at its normalizer, and at lstrip and rstrip of its added tokens"):
        if len(text) < _LONG_TEXT:
            return tokenizer.encode(text, add_special_tokens=False)
        # The library holds Python's lock while it encodes one text, and not while it encodes a batch.
        encode = tokenizer.encode_batch_fast if ids_only else tokenizer.encode_batch
        return encode([text], add_special_tokens=False)[0]


@contextmanager
def panics_as_errors(text: str, hint: str) -> Iterator[None]:
    """Raise TokenizerError where the `tokenizers` library panics, which no `except Exception` would catch."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(
            f"the tokenizers library cannot encode {text[:40]!r} with this tokenizer: {error}", hint
        ) from error


def has_byte_fallback(tokenizer: Any) -> bool:
    """Return whether a `tokenizers.Tokenizer` spells characters without a token byte by byte.

    BPE models have a flag for it. Unigram models do not; their decoder joins the bytes again.
    """
    if getattr(tokenizer.model, "byte_fallback", False):
        return True
    decoders = {decoder["type"] for decoder in components(tokenizer, "decoder")}
    return type(tokenizer.model).__name__ == "Unigram" and "ByteFallback" in decoders


def token_names(tokenizer: Any, vocabulary: Mapping[str, int] | None = None) -> dict[int, str]:
    """Return the spelling of every id of a `tokenizers.Tokenizer`.

    Args:
        tokenizer: The tokenizer.
        vocabulary: The ids of its model's tokens, if they are known: for a large vocabulary asking takes long.
    """
    ids = vocabulary or tokenizer.get_vocab(with_added_tokens=True)
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    return {i: name for name, i in ids.items()} | added


def token_bytes(
    tokenizer: Any, kind: TokenizerFamily, name: str, names: Mapping[int, str] | None = None
) -> tuple[dict[int, bytes], frozenset[int]]:
    """Return the bytes of every id of a `tokenizers.Tokenizer`, and the ids of its special tokens, which have none.

    Args:
        tokenizer: The tokenizer.
        kind: How it spells its tokens.
        name: The model's, for messages.
        names: The tokenizer's `token_names`, if they are known already.

    Raises:
        TokenizerError: The bytes of its tokens cannot be known, or it does not read every text alike each time.
    """
    _refuse_unreadable(tokenizer, kind, name)
    added = tokenizer.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    names = token_names(tokenizer) if names is None else names
    plain = dict(names)
    for i in added:
        plain.pop(i, None)
    if kind is TokenizerFamily.BYTE_LEVEL:
        data = dict(zip(plain, _byte_level_bytes(plain, name), strict=True))
    else:
        data = dict(zip(plain, _sentencepiece_bytes(plain.values()), strict=True))
        if has_byte_fallback(tokenizer):
            for digits in map("".join, product(hexdigits, repeat=2)):
                if (i := tokenizer.token_to_id(f"<0x{digits}>")) in plain:
                    data[i] = bytes.fromhex(digits)
    data |= {i: token.content.encode() for i, token in added.items() if i not in special}
    _check_spelling(tokenizer, data, name)
    return data, frozenset(special)


def _byte_level_bytes(names: Mapping[int, str], name: str) -> list[bytes]:
    """Return the bytes of tokens in the byte-level alphabet, all at once: there may be hundreds of thousands."""
    alphabet = byte_alphabet()
    # No character outside the alphabet can be encoded.
    latin1 = dict.fromkeys(range(256), "\uffff") | {ord(character): chr(byte) for character, byte in alphabet.items()}
    try:
        data = "".join(names.values()).translate(latin1).encode("latin-1")
    except UnicodeEncodeError:
        i = next(i for i, token in names.items() if not set(token) <= alphabet.keys())
        raise TokenizerError(f"token {i} of {name}, {names[i]!r}, is not spelled in the byte-level alphabet") from None
    ends = list(accumulate(map(len, names.values())))
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _sentencepiece_bytes(names: Collection[str]) -> list[bytes]:
    """Return the bytes of SentencePiece tokens, but for byte tokens, all at once."""
    data = "\0".join(names).replace(SPACE, " ").encode().split(b"\0")
    return data if len(data) == len(names) else [token.replace(SPACE, " ").encode() for token in names]


def _refuse_unreadable(tokenizer: Any, kind: TokenizerFamily, name: str) -> None:
    """Raise TokenizerError for a tokenizer with a part that puts more or less into a text than its tokens tell."""
    model = tokenizer.model
    hint = "byte-level BPE and SentencePiece tokenizers can be used"
    for setting in ("continuing_subword_prefix", "end_of_word_suffix"):
        if mark := getattr(model, setting, None):
            raise TokenizerError(
                f"the tokenizer of {name} cannot be mapped to bytes: its tokens carry the mark {mark!r} ({setting})",
                hint,
            )
    if dropout := getattr(model, "dropout", None):
        raise TokenizerError(
            f"the tokenizer of {name} encodes a text differently each time: it drops merges at random ({dropout=})",
            "save it without dropout, which is for training",
        )
    for token in tokenizer.get_added_tokens_decoder().values():
        normalizer = tokenizer.normalizer if token.normalized else None
        # The library finds an empty token between any two characters, without end.
        if normalizer is not None and not normalizer.normalize_str(token.content):
            raise TokenizerError(
                f"the normalizer of {name}'s tokenizer leaves nothing of the added token {token.content!r}",
                'give the token "normalized": false',
            )
    parts = components(tokenizer, "pre_tokenizer")
    spelled_as_bytes = any(part["type"] == "ByteLevel" for part in [*parts, *components(tokenizer, "normalizer")])
    if spelled_as_bytes is not (kind is TokenizerFamily.BYTE_LEVEL):
        reads, writes = ("bytes", "text") if spelled_as_bytes else ("text", "bytes")
        raise TokenizerError(
            f"the tokenizer of {name} cannot be mapped to bytes: it reads {reads}, and its decoder writes {writes}",
            hint,
        )
    for number, part in enumerate(parts):
        if number and (part.get("add_prefix_space") or part.get("prepend_scheme") == "always"):
            raise TokenizerError(
                f"the tokenizer of {name} cannot be mapped to bytes: its {part['type']} pre-tokenizer puts a space in "
                f"front of every part that {parts[0]['type']} leaves",
                hint,
            )


def _check_spelling(tokenizer: Any, tokens: Mapping[int, bytes], name: str) -> None:
    """Raise TokenizerError where the tokenizer itself decodes tokens to another text than their bytes.

    A space tells most: whether it has a token at all, and by what sign it is spelled.
    """
    decoder = tokenizer.decoder
    if decoder is None:
        return
    ids = [i for i in encode_text(tokenizer, "a b  c\n1.").ids if i in tokens]
    spelled = b"".join(tokens[i] for i in ids)
    # Tokens of a space and more do not do: after a text, or before another one, a space stands alone.
    alone = any(tokenizer.token_to_id(sign) is not None for sign in _SPACES)
    if SPACE.encode() in spelled or not alone:
        raise TokenizerError(
            f"the tokenizer of {name} has no token for the space: it would read and write another text in its place",
            "the vocabulary needs the token '▁', or 'Ġ' where it is byte-level",
        )
    decoded: str = tokenizer.decode(ids)
    if decoded.strip(" ") != spelled.decode(errors="replace").strip(" "):
        raise TokenizerError(
            f"the tokenizer of {name} cannot be mapped to bytes: it decodes {spelled.decode(errors='replace')!r} as "
            f"{decoded!r}",
            "byte-level BPE and SentencePiece tokenizers can be used",
        )
