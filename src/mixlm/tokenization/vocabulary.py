"""Token ids as exact bytes, for the tokenizer families that spell their tokens.

Two spellings cover the language models in use:

    byte-level      each character of a token stands for one byte, by GPT-2's alphabet (GPT-2, Llama 3, Qwen, SmolLM)
    SentencePiece   "▁" stands for a space, "<0x0A>" for one byte where the tokenizer falls back to bytes
                    (Llama 2, Gemma, Mistral), the rest is the text itself

What is neither, WordPiece for one, is refused by name: a guess would put wrong bytes into a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mixlm.errors import TokenizerError

SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenizerFamily(Enum):
    """How a tokenizer spells its tokens."""

    BYTE_LEVEL = "byte-level"
    SENTENCEPIECE = "SentencePiece"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one model, one row for each row of its output layer.

    tokens: exact bytes of each id; empty for control tokens, for end-of-text and for padding rows.
    ends: ids that end a reply. control: ids that only templates may write; they include `ends`.
    names: how the tokenizer itself spells each id; empty for padding rows, and as a whole where that is not known.
    """

    tokens: tuple[bytes, ...]
    end_ids: frozenset[int]
    special_ids: frozenset[int]
    names: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Rows of the output layer, padding included."""
        return len(self.tokens)

    def name(self, i: int) -> str:
        """Return how the tokenizer spells an id; where that is not known, its bytes as text, or its number."""
        named = self.names[i] if self.names else ""
        return named or self.tokens[i].decode(errors="backslashreplace") or f"<{i}>"

    @classmethod
    def of(
        cls,
        tokens: Mapping[int, bytes],
        size: int,
        end_ids: Iterable[int],
        special_ids: Iterable[int],
        names: Mapping[int, str] | None = None,
    ) -> Vocabulary:
        """Build from known bytes; ids without bytes are padding. Ids beyond the output layer cannot be drawn."""
        end_ids = frozenset(one for one in end_ids if one < size)
        control_ids = frozenset(one for one in special_ids if one < size) | end_ids
        rows = tuple(b"" if i in control_ids else tokens.get(i, b"") for i in range(size))
        spelled = tuple(names.get(i, "") for i in range(size)) if names is not None else ()
        return cls(rows, end_ids, control_ids, spelled)


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: the character that stands for each byte (Radford et al., 2019).

    Printable Latin-1 stands for itself; the other 68 bytes take the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _parts(component: Any, field: str) -> list[dict[str, Any]]:
    """Return a tokenizer component as a flat list: itself, or its members when it is a sequence."""
    if component is None:
        return []
    if component.get("type") == "Sequence":
        return [part for one in component[field] for part in _parts(one, field)]
    return [component]


def detect_family(description: Mapping[str, Any], name: str) -> TokenizerFamily:
    """Tell how a tokenizer spells tokens, from its description without the vocabulary (`describe`).

    Raises TokenizerError when it is neither byte-level nor SentencePiece.
    """
    decoders = _parts(description.get("decoder"), "decoders")
    kinds = {one["type"] for one in decoders}
    pre = {one["type"] for one in _parts(description.get("pre_tokenizer"), "pretokenizers")}
    if "ByteLevel" in kinds or (not kinds and "ByteLevel" in pre):
        return TokenizerFamily.BYTE_LEVEL
    spaces = any(d["type"] == "Replace" and d["pattern"].get("String") == SPACE for d in decoders)
    if "Metaspace" in kinds or spaces:
        return TokenizerFamily.SENTENCEPIECE
    found = ", ".join(sorted(kinds)) or "none"
    raise TokenizerError(
        f"the tokenizer of {name} cannot be mapped to bytes: its decoder is {found}",
        "byte-level BPE and SentencePiece tokenizers can be used",
    )


def describe(tokenizer: Any) -> dict[str, Any]:
    """Return the parts of a `tokenizers.Tokenizer` as plain data, without its vocabulary."""
    parts = {}
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        component = getattr(tokenizer, name)
        parts[name] = None if component is None else json.loads(component.__getstate__())
    return parts


def has_byte_fallback(tokenizer: Any) -> bool:
    """Whether a `tokenizers.Tokenizer` spells characters that it has no token for byte by byte.

    BPE models say so themselves. Unigram models do not; their decoder joins the bytes again.
    """
    if getattr(tokenizer.model, "byte_fallback", False):
        return True
    decoders = _parts(describe(tokenizer)["decoder"], "decoders")
    return type(tokenizer.model).__name__ == "Unigram" and any(one["type"] == "ByteFallback" for one in decoders)


def token_bytes(tokenizer: Any, kind: TokenizerFamily, name: str) -> tuple[dict[int, bytes], frozenset[int]]:
    """Return the bytes of every id of a `tokenizers.Tokenizer`, and its control ids, which have none.

    Raises TokenizerError when a token is not spelled in the family's alphabet.
    """
    added = tokenizer.get_added_tokens_decoder()
    control = {i for i, token in added.items() if token.special}
    out = {i: token.content.encode() for i, token in added.items() if i not in control}
    fallback = has_byte_fallback(tokenizer)
    alphabet = byte_alphabet()
    for token, i in tokenizer.get_vocab(with_added_tokens=True).items():
        if i in added:
            continue
        if kind is TokenizerFamily.BYTE_LEVEL:
            if not all(c in alphabet for c in token):
                raise TokenizerError(f"token {i} of {name}, {token!r}, is not spelled in the byte-level alphabet")
            out[i] = bytes(alphabet[c] for c in token)
        elif fallback and (found := _BYTE_TOKEN.fullmatch(token)):
            out[i] = bytes([int(found[1], 16)])
        else:
            out[i] = token.replace(SPACE, " ").encode()
    return out, frozenset(control)
