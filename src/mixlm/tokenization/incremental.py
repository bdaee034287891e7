"""Canonical encoding of growing text: any bytes, encoded again only where the result can still change.

A member reads text that other members sampled. It must read it as in training: encoded as a whole, never token by
token. `Encoder.encode` gives that canonical encoding for any bytes, valid UTF-8 or not, and tells how much of it no
later byte can change. `IncrementalEncoder` uses this to encode a growing text in time proportional to what is new.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol, cast
from unicodedata import category

from mixlm.tokenization.vocabulary import SPACE, TokenizerFamily, byte_alphabet, describe, flatten_component

# Where a tokenizer adds a space: nowhere; in front of a text; also after every special token; or there even if the text
# already begins with a space.
LeadingSpace = Literal["never", "first", "always", "doubled"]


class Encoded(NamedTuple):
    """Ids of a text. Whatever follows, the first `stable_ids` of them cover its first `stable_bytes` bytes."""

    ids: list[int]
    stable_ids: int
    stable_bytes: int


class Encoder(Protocol):
    """Canonical encoding of plain text. It never gives special tokens, whatever the text looks like."""

    def encode(self, data: bytes) -> Encoded:
        """Encode bytes that follow a special token or a stable boundary."""
        ...


class _StableBoundary(NamedTuple):
    """A boundary that no later text removes: bytes and ids before it, and the length of the text that showed it."""

    bytes: int
    ids: int
    shown_at: int


class IncrementalEncoder:
    """The canonical encoding of one text for one member; the text grows, and may be truncated."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._boundaries = [_StableBoundary(0, 0, 0)]
        self._count = 0

    def update(self, data: bytes | bytearray) -> tuple[int, list[int]]:
        """Encode the text, of which only the part after the last stable boundary is read.

        Args:
            data: The whole text so far.

        Returns:
            How many ids to drop at the end of the last encoding, and the ids that take their place.
        """
        last = self._boundaries[-1]
        dropped = self._count - last.ids
        encoded = self._encoder.encode(bytes(data[last.bytes :]))
        self._count = last.ids + len(encoded.ids)
        if encoded.stable_bytes:
            boundary = _StableBoundary(last.bytes + encoded.stable_bytes, last.ids + encoded.stable_ids, len(data))
            self._boundaries.append(boundary)
        return dropped, encoded.ids

    def truncate(self, length: int) -> None:
        """Forget boundaries that only text after the first `length` bytes has shown to be stable."""
        while self._boundaries[-1].shown_at > length:
            self._boundaries.pop()


def utf8_runs(data: bytes) -> tuple[list[tuple[str | None, bytes]], bytes]:
    """Split bytes into runs of valid UTF-8 and of stray bytes.

    Returns:
        The runs, (text, bytes), with None for the text of stray bytes; and the first bytes of an incomplete character
        at the very end, empty when the last character is whole.
    """
    runs: list[tuple[str | None, bytes]] = []
    start = 0
    while start < len(data):
        try:
            runs.append((data[start:].decode(), data[start:]))
            return runs, b""
        except UnicodeDecodeError as error:
            bad, after = start + error.start, start + error.end
            if bad > start:
                runs.append((data[start:bad].decode(), data[start:bad]))
            if error.reason == "unexpected end of data":
                return runs, data[bad:]
            if runs and runs[-1][0] is None:
                runs[-1] = (None, runs[-1][1] + data[bad:after])
            else:
                runs.append((None, data[bad:after]))
            start = after
    return runs, b""


class TokenizerEncoder:
    """The encoder of a `tokenizers.Tokenizer`, which it changes: no special tokens in text, no space added in front.

    Text that a member reads continues a prompt, so the leading space that some SentencePiece tokenizers add to a
    sentence has no place in it. leading_space: where the tokenizer would add one, for prompts. normalizers: the names
    of the normalizers that change a text before it is encoded, or "none".
    """

    leading_space: LeadingSpace
    normalizers: str

    def __init__(self, tokenizer: Any, kind: TokenizerFamily) -> None:
        from tokenizers import processors

        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.leading_space = _take_leading_space(tokenizer)
        self.normalizers = ", ".join(_changes(tokenizer)) or "none"
        # A post-processor adds ids for prompts, and trims spaces from offsets, which hides boundaries.
        tokenizer.post_processor = processors.Sequence([])
        self._tokenizer = tokenizer
        self._byte_ids = _byte_ids(tokenizer, kind)
        byte_level = kind is TokenizerFamily.BYTE_LEVEL
        self._boundary = _PretokenBoundaries(tokenizer) if byte_level else _PairBoundaries(tokenizer)
        self._byte_characters = {b: c for c, b in byte_alphabet().items()} if byte_level else None
        self._unknown = _unknown_id(tokenizer)
        self._lookalikes = _lookalike_pattern(tokenizer)

    def encode(self, data: bytes) -> Encoded:
        """Encode any bytes. An incomplete character at the end is encoded as the bytes that are there."""
        runs, partial = utf8_runs(data)
        ids: list[int] = []
        stable_ids = stable_bytes = 0
        offset = 0
        for number, (text, raw) in enumerate(runs):
            last = number == len(runs) - 1
            if text is None:
                ids += self._encode_bytes(raw)
                offset += len(raw)
                stable_ids, stable_bytes = len(ids), offset
                continue
            text_ids, stable_tokens, stable_characters = self._encode_text(text)
            if stable_tokens or not last:
                stable_ids = len(ids) + (stable_tokens if last else len(text_ids))
                stable_bytes = offset + len(text[:stable_characters].encode() if last else raw)
            offset += len(raw)
            if partial and last and self._byte_characters is not None:
                ids += self._encode_partial(text, partial)
                return Encoded(ids, stable_ids, stable_bytes)
            ids += text_ids
        return Encoded(ids + self._encode_bytes(partial), stable_ids, stable_bytes)

    def _encode_text(self, text: str) -> tuple[list[int], int, int]:
        """Return the ids of a text, and how many ids and characters of it no later text can change."""
        if self._lookalikes is not None:
            normalizer = self._tokenizer.normalizer
            parts = self._lookalikes.split(text if normalizer is None else normalizer.normalize_str(text))
            if len(parts) > 1:
                return [i for part in parts for i in self._tokenizer.encode(part, add_special_tokens=False).ids], 0, 0
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return (encoding.ids, *self._boundary(encoding, text))

    def _encode_partial(self, text: str, partial: bytes) -> list[int]:
        """Encode text and the incomplete character after it as byte-level BPE would have begun to merge them.

        The pre-token of a character depends on its class, so a whole character with the same first bytes stands in to
        find the pre-token. The model itself then merges its bytes up to the incomplete character.
        """
        for fill in (0x80, 0x90, 0xA0, 0xB0):
            try:
                whole = (partial + bytes([fill]) + b"\x80" * 3)[: _character_length(partial[0])].decode()
                break
            except UnicodeDecodeError:
                continue
        else:
            return [*self._tokenizer.encode(text, add_special_tokens=False).ids, *self._encode_bytes(partial)]
        encoding = self._tokenizer.encode(text + whole, add_special_tokens=False)
        words, offsets = encoding.word_ids, encoding.offsets
        first = next((i for i, word in enumerate(words) if word == words[-1]), 0)
        # By whole pre-tokens: where a vocabulary lacks bytes, offsets inside one are wrong.
        while first and offsets[first - 1][1] != offsets[first][0]:
            first = words.index(words[first - 1])
        tail = text[offsets[first][0] if first else 0 :].encode() + partial
        assert self._byte_characters is not None
        merged = self._tokenizer.model.tokenize("".join(self._byte_characters[b] for b in tail))
        return [*encoding.ids[:first], *(token.id for token in merged)]

    def _encode_bytes(self, raw: bytes) -> list[int]:
        """Encode bytes that are no text, one token each.

        A byte without a token is the unknown token, or is left out if there is none: some byte-level vocabularies lack
        bytes that never occur in UTF-8.
        """
        ids = (self._byte_ids.get(b, self._unknown) for b in raw)
        return [i for i in ids if i is not None]


def _lookalike_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Return a pattern of the offsets at which to split a text so that no part looks like a special or byte token.

    SentencePiece never reads text as one of these. A unigram model of `tokenizers` takes any piece that is spelled in
    the text. Other models merge single characters and never arrive at such a piece.
    """
    if type(tokenizer.model).__name__ != "Unigram":
        return None
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    patterns = [re.escape(name[0]) + f")(?={re.escape(name[1:])}" for name in special if len(name) > 1]
    return re.compile("|".join(f"(?<={pattern})" for pattern in [*patterns, "<)(?=0x[0-9A-F]{2}>"]))


def _character_length(first: int) -> int:
    """Return the length of a UTF-8 character from its first byte."""
    return 4 if first >= 0xF0 else 3 if first >= 0xE0 else 2


class _PretokenBoundaries:
    """Stable boundaries of a tokenizer that finds pre-tokens by a pattern from left to right.

    A pattern looks ahead by at most one character and never back, so more text can only change the last pre-token; the
    last but one counts as unstable too. A combining mark may be normalized together with the character before it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values() if not token.special]
        # Prefixes of added tokens, which are found before the pattern is applied.
        self._added_prefixes = {content[:length] for content in added for length in range(1, len(content))}
        self._longest = max(map(len, self._added_prefixes), default=0)

    def __call__(self, encoding: Any, text: str) -> tuple[int, int]:
        """Return how many ids and how many characters no later text can change."""
        for start in range(max(len(text) - self._longest, 0), len(text)):
            if text[start:] in self._added_prefixes:
                text = text[:start]
                encoding = self._tokenizer.encode(text, add_special_tokens=False)
                break
        words, offsets = encoding.word_ids, encoding.offsets
        for count in range(len(words) - 1, 0, -1):
            if words[count - 1] >= words[-1] - 1 or words[count - 1] == words[count]:
                continue
            offset = offsets[count][0]
            if offsets[count - 1][1] == offset and not category(text[offset]).startswith("M"):
                return count, offset
        return 0, 0


class _PairBoundaries:
    """Stable boundaries of a tokenizer without pre-tokens, as SentencePiece's are.

    No token reaches across two characters that are adjacent in no token. The text before and the text after are then
    encoded apart, whatever follows.
    """

    def __init__(self, tokenizer: Any) -> None:
        pairs: set[tuple[str, str]] = set()
        for token in tokenizer.get_vocab(with_added_tokens=True):
            pairs.update(pairwise(token.replace(SPACE, " ")))
        self._pairs = pairs
        # A normalizer may join characters, and without byte tokens unknown characters are fused into one token. Then
        # only a boundary in front of a space is safe.
        self._normalizes = bool(_changes(tokenizer))
        self._only_spaces = self._normalizes or not getattr(tokenizer.model, "byte_fallback", False)
        self._tokenizer = tokenizer

    def __call__(self, encoding: Any, text: str) -> tuple[int, int]:
        """Return how many ids and how many characters no later text can change."""
        offsets = encoding.offsets
        plain = text.replace(SPACE, " ")
        for count in range(len(offsets) - 1, 0, -1):
            offset = offsets[count][0]
            if offset < 1 or offsets[count - 1][1] != offset or (self._only_spaces and plain[offset] != " "):
                continue
            last = self._last_normalized(text[:offset]) if self._normalizes else plain[offset - 1]
            if (last, plain[offset]) in self._pairs:
                continue
            if not self._normalizes:
                return count, offset
            # A normalizer that drops characters shifts the offsets of all tokens after them: count the ids anew.
            before = self._tokenizer.encode(text[:offset], add_special_tokens=False).ids
            if encoding.ids[: len(before)] == before:
                return len(before), offset
        return 0, 0

    def _last_normalized(self, text: str) -> str:
        """Return the last character of a text as its tokens spell it; empty where nothing remains of the text."""
        normalized: str = self._tokenizer.normalizer.normalize_str(text)
        return normalized[-1:].replace(SPACE, " ")


def _changes(tokenizer: Any) -> list[str]:
    """Return the types of the normalizers that change a text, except SentencePiece's spelling of spaces."""
    return [
        part["type"]
        for part in flatten_component(describe(tokenizer)["normalizer"], "normalizers")
        if part["type"] != "Prepend" and not (part["type"] == "Replace" and part["pattern"].get("String") == " ")
    ]


def _take_leading_space(tokenizer: Any) -> LeadingSpace:
    """Stop a tokenizer from adding spaces in front of texts, and return where it did."""
    from tokenizers import normalizers, pre_tokenizers

    rule: LeadingSpace = "never"
    description = describe(tokenizer)
    parts = flatten_component(description["normalizer"], "normalizers")
    remaining = [part for part in parts if part["type"] != "Prepend"]
    if len(remaining) != len(parts):
        rule = "doubled"
        tokenizer.normalizer = normalizers.Sequence([_load(normalizers.Normalizer, part) for part in remaining])
    state = json.dumps(description["pre_tokenizer"])
    for setting, replacement, meaning in (
        ('"prepend_scheme": "always"', '"prepend_scheme": "never"', "always"),
        ('"prepend_scheme": "first"', '"prepend_scheme": "never"', "first"),
        ('"add_prefix_space": true', '"add_prefix_space": false', "always"),
    ):
        if setting in state:
            rule = cast(LeadingSpace, meaning)
            state = state.replace(setting, replacement)
    if rule != "never" and description["pre_tokenizer"] is not None:
        tokenizer.pre_tokenizer = _load(pre_tokenizers.PreTokenizer, json.loads(state))
    return rule


def _load(base: Any, state: dict[str, Any]) -> Any:
    """Return a component of a tokenizer from its description."""
    from tokenizers import Tokenizer, models

    shell = json.loads(Tokenizer(models.BPE()).to_str())
    field = "normalizer" if base.__name__ == "Normalizer" else "pre_tokenizer"
    shell[field] = state
    return getattr(Tokenizer.from_str(json.dumps(shell)), field)


def _byte_ids(tokenizer: Any, kind: TokenizerFamily) -> dict[int, int]:
    alphabet = {b: c for c, b in byte_alphabet().items()} if kind is TokenizerFamily.BYTE_LEVEL else None
    names = {b: alphabet[b] if alphabet else f"<0x{b:02X}>" for b in range(256)}
    ids = {b: tokenizer.token_to_id(name) for b, name in names.items()}
    return {b: i for b, i in ids.items() if i is not None}


def _unknown_id(tokenizer: Any) -> int | None:
    name = getattr(tokenizer.model, "unk_token", None)
    unknown: int | None = tokenizer.token_to_id(name) if isinstance(name, str) else None
    return unknown
