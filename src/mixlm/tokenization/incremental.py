"""Canonical encoding of growing text: any bytes, encoded again only where the result can still change.

A member reads text that other members sampled. It must read it as in training: encoded as a whole, never token by
token. `Encoder.encode` gives that canonical encoding for any bytes, valid UTF-8 or not, and tells how much of it no
later byte can change. `IncrementalEncoder` uses this to encode a growing text in time proportional to what is new.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast

import numpy as np

from mixlm.tokenization.vocabulary import (
    TokenizerFamily,
    byte_alphabet,
    components,
    encode_text,
    load_component,
)

if TYPE_CHECKING:
    from mixlm.tokenization.boundaries import Boundaries

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
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # stray bytes become surrogates
    text, partial = decoder.decode(data), decoder.getstate()[0]
    if partial[:1] == b"\xed" and partial[1:] > b"\x9f":  # no character begins like a surrogate
        text, partial = text + decoder.decode(b"", final=True), b""
    runs = re.findall("[\udc80-\udcff]+|[^\udc80-\udcff]+", text)
    return [
        (None if "\udc80" <= run[0] <= "\udcff" else run, run.encode(errors="surrogateescape")) for run in runs
    ], partial


class TokenizerEncoder:
    """The encoder of a `tokenizers.Tokenizer`: no special tokens in text, no space added in front.

    Text that a member reads continues a prompt, so the leading space that some SentencePiece tokenizers add to a
    sentence has no place in it; prompts have it. leading_space: where the tokenizer would add one. normalizers: the
    names of the normalizers that change a text before it is encoded, or "none".

    Args:
        tokenizer: The tokenizer.
        kind: How it spells its tokens.
        names: Its `token_names`, if they are known already.
    """

    leading_space: LeadingSpace
    normalizers: str

    def __init__(self, tokenizer: Any, kind: TokenizerFamily, names: Mapping[int, str] | None = None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = False
        self._chat_tokenizer = tokenizer
        # Without a post-processor, which trims spaces from offsets and so hides boundaries.
        self._prompt_tokenizer, self._tokenizer = _without_special_tokens(tokenizer), _without_special_tokens(tokenizer)
        self.leading_space = _take_leading_space(self._tokenizer)
        self.normalizers = ", ".join(_changes(tokenizer)) or "none"
        self._byte_ids = _byte_ids(tokenizer, kind)
        self._byte_level = kind is TokenizerFamily.BYTE_LEVEL
        self._names = names
        # A normalizer that spells bytes cannot be applied to parts of a character, nor a model that reads whole words.
        whole_characters = "ByteLevel" in self.normalizers or type(tokenizer.model).__name__ != "BPE"
        self._byte_characters = (
            {b: c for c, b in byte_alphabet().items()} if self._byte_level and not whole_characters else None
        )
        self._unknown = _unknown_id(tokenizer)
        self._lookalikes = _lookalike_pattern(tokenizer)
        self._special = {i: token for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def _boundaries(self) -> Boundaries:
        # Where no text grows in other members' tokens, none is needed.
        from mixlm.tokenization.boundaries import Boundaries

        return Boundaries(self._tokenizer, byte_level=self._byte_level, names=self._names)

    def prompt(self, text: str, *, first: bool) -> list[int]:
        """Return the ids of a part of a prompt without special tokens, with a leading space where there is to be one.

        first: whether it is the beginning; other parts follow a special token.
        """
        text = text.encode(errors="replace").decode()
        anew = first or self.leading_space != "first"
        tokenizer = self._prompt_tokenizer if anew else self._tokenizer
        ids = self._lookalike_ids(tokenizer, text)
        return list(encode_text(tokenizer, text, ids_only=True).ids) if ids is None else ids

    def conversation(self, rendered: str, mark: str) -> list[int]:
        """Return the ids of a rendered conversation: those of the tokenizer itself, special tokens included.

        Args:
            rendered: the prompt.
            mark: a character that breaks spellings of special tokens that are text; it is no part of the prompt.
        """
        rendered = rendered.encode(errors="replace").decode()
        if mark not in rendered and self._lookalikes is None:
            return list(encode_text(self._chat_tokenizer, rendered, ids_only=True).ids)
        encoding = encode_text(self._finder, rendered)
        parts: list[tuple[str, list[int]]] = []  # texts, and the special token after each
        end = 0
        for start, stop, i in self._special_spans(encoding, rendered):
            parts.append((rendered[end:start], [i]))
            end = stop
        parts.append((rendered[end:], []))
        if mark not in rendered and not any(self._lookalike_parts(self._tokenizer, text) for text, _ in parts):
            return list(encoding.ids)  # the tokenizer itself has found them
        ids: list[int] = []
        for number, (text, special) in enumerate(parts):
            ids += self.prompt(text.replace(mark, ""), first=number == 0) + special
        return ids

    def spells_special(self, text: str) -> bool:
        """Return whether a text is read as a special token though it does not contain one: a normalizer made one."""
        if not any(token.normalized for token in self._special.values()):
            return False
        encoding = encode_text(self._finder, text.encode(errors="replace").decode())
        return any(self._special_spans(encoding, text))

    @cached_property
    def _finder(self) -> Any:
        """A tokenizer that finds the special tokens of the chat tokenizer in a text.

        Where no text between added tokens becomes a special one, the model need not run: this one leaves it whole.
        """
        if self._lookalikes is not None:
            return self._chat_tokenizer
        from tokenizers import Tokenizer, models

        finder = Tokenizer(models.WordLevel({"": 0}, unk_token=""))
        if self._chat_tokenizer.normalizer is not None:
            finder.normalizer = self._chat_tokenizer.normalizer
        finder.add_tokens([token for _, token in sorted(self._chat_tokenizer.get_added_tokens_decoder().items())])
        return finder

    @cached_property
    def _special_of_finder(self) -> dict[int, int]:
        """The special token that each id of the finder stands for."""
        ids = {token.content: i for i, token in self._special.items()}
        added = self._finder.get_added_tokens_decoder().items()
        return {i: ids[token.content] for i, token in added if token.content in ids}

    def _special_spans(self, encoding: Any, text: str) -> Iterator[tuple[int, int, int]]:
        """Yield each special token of a text that the finder encoded: where it begins and ends, and its id."""
        ids = np.array(encoding.ids, dtype=np.int64)
        for number in np.flatnonzero(np.isin(ids, list(self._special_of_finder))).tolist():
            start, stop = encoding.token_to_chars(number)
            i = self._special_of_finder[int(ids[number])]
            content, spelled = self._special[i].content, text[start:stop]
            if self._special[i].normalized and content not in spelled:
                content, spelled = (_normalized(self._chat_tokenizer, part) for part in (content, spelled))
            if content in spelled:  # some are also what unknown characters become
                yield start, stop, i

    def encode(self, data: bytes) -> Encoded:
        """Encode any bytes. An incomplete character at the end is encoded as the bytes that are there."""
        runs, partial = utf8_runs(data)
        text = (runs.pop()[0] or "") if runs and runs[-1][0] else ""
        ids: list[int] = []
        for before, raw in runs:  # what comes after stray bytes is encoded apart
            ids += self._encode_bytes(raw) if before is None else self._encode_text(before)[0]
        text_ids, stable_ids, stable_characters = self._encode_text(text) if text else ([], 0, 0)
        stable_bytes = sum(len(raw) for _, raw in runs) + len(text[:stable_characters].encode())
        if partial and text and self._byte_characters is not None:
            text_ids = text_ids[:stable_ids] + self._encode_partial(text[stable_characters:], partial)
        else:
            text_ids = text_ids + self._encode_bytes(partial)
        return Encoded(ids + text_ids, len(ids) + stable_ids, stable_bytes)

    def _encode_text(self, text: str) -> tuple[list[int], int, int]:
        """Return the ids of a text, and how many ids and characters of it no later text can change."""
        if (ids := self._lookalike_ids(self._tokenizer, text)) is not None:
            return ids, 0, 0
        encoding = encode_text(self._tokenizer, text)
        return (encoding.ids, *self._boundaries.find(encoding, text))

    def _lookalike_ids(self, tokenizer: Any, text: str) -> list[int] | None:
        """Return the ids of a text parts of which look like a special token, and none of which is read as one.

        None where nothing looks like one.
        """
        parts = self._lookalike_parts(tokenizer, text)
        if not parts:
            return None
        # The parts are normalized already, and only the first may get a leading space.
        bare = [_without_special_tokens(original) for original in (tokenizer, self._tokenizer)]
        for copied in bare:
            copied.normalizer = None
        ids: list[int] = encode_text(bare[0], parts[0], ids_only=True).ids
        return ids + [i for part in parts[1:] for i in encode_text(bare[1], part, ids_only=True).ids]

    def _lookalike_parts(self, tokenizer: Any, text: str) -> list[str]:
        """Return parts of a normalized text none of which looks like a special token; none if the whole does not."""
        parts = [] if self._lookalikes is None else self._lookalikes.split(_normalized(tokenizer, text))
        return parts if len(parts) > 1 else []

    def _encode_partial(self, text: str, partial: bytes) -> list[int]:
        """Encode text and the incomplete character after it as byte-level BPE would have begun to merge them.

        The pre-token of a character depends on its class, so a whole character with the same first bytes stands in to
        find the pre-token. The model itself then merges its bytes up to the incomplete character.
        """
        fills = (partial + bytes([fill, 0x80, 0x80]) for fill in (0x80, 0x90, 0xA0))
        whole = next(filter(None, (fill.decode(errors="ignore") for fill in fills)))
        encoding = encode_text(self._tokenizer, text + whole)
        words, offsets = encoding.word_ids, encoding.offsets
        first = next((i for i, word in enumerate(words) if word == words[-1]), 0)
        # By whole pre-tokens: where a vocabulary lacks bytes, offsets inside one are wrong.
        while first and offsets[first - 1][1] != offsets[first][0]:
            first = words.index(words[first - 1])
        tail = _normalized(self._tokenizer, text[offsets[first][0] if first else 0 :]).encode() + partial
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
    the text, other models words that are a token as a whole. BPE merges single characters and never arrives at one.
    """
    if type(tokenizer.model).__name__ == "BPE" and not tokenizer.model.ignore_merges:
        return None
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    patterns = [re.escape(name[0]) + f")(?={re.escape(name[1:])}" for name in special if len(name) > 1]
    if tokenizer.token_to_id("<0x0A>") is not None:
        patterns.append("<)(?=0x[0-9A-F]{2}>")
    return re.compile("|".join(f"(?<={pattern})" for pattern in patterns)) if patterns else None


def _without_special_tokens(tokenizer: Any) -> Any:
    """Return a tokenizer that shares the model, and takes no special tokens from text."""
    from tokenizers import Tokenizer

    added = tokenizer.get_added_tokens_decoder()
    twin = Tokenizer(tokenizer.model)
    for field in ("normalizer", "pre_tokenizer"):
        if (component := getattr(tokenizer, field)) is not None:
            setattr(twin, field, component)
    twin.add_tokens([added[i] for i in sorted(added)])
    if twin.get_added_tokens_decoder().keys() != added.keys():  # their ids have gaps
        twin = Tokenizer.from_str(tokenizer.to_str())
        twin.post_processor = None
    twin.encode_special_tokens = True
    return twin


def _normalized(tokenizer: Any, text: str) -> str:
    return text if tokenizer.normalizer is None else str(tokenizer.normalizer.normalize_str(text))


def _changes(tokenizer: Any) -> list[str]:
    """Return the types of the normalizers that change a text, except SentencePiece's spelling of spaces."""
    return [
        part["type"]
        for part in components(tokenizer, "normalizer")
        if part["type"] != "Prepend" and not (part["type"] == "Replace" and part["pattern"].get("String") == " ")
    ]


def _take_leading_space(tokenizer: Any) -> LeadingSpace:
    """Stop a tokenizer from adding spaces in front of texts, and return where it did."""
    from tokenizers import normalizers, pre_tokenizers

    rule: LeadingSpace = "never"
    parts = components(tokenizer, "normalizer")
    remaining = [part for part in parts if part["type"] != "Prepend"]
    if len(remaining) != len(parts):
        rule = "doubled"
        tokenizer.normalizer = normalizers.Sequence([load_component("normalizer", part) for part in remaining])
    splitters = components(tokenizer, "pre_tokenizer")
    state = json.dumps(splitters)
    for setting, replacement, meaning in (
        ('"prepend_scheme": "always"', '"prepend_scheme": "never"', "always"),
        ('"prepend_scheme": "first"', '"prepend_scheme": "never"', "first"),
        ('"add_prefix_space": true', '"add_prefix_space": false', "always"),
    ):
        if setting in state:
            rule = cast(LeadingSpace, meaning)
            state = state.replace(setting, replacement)
    if rule != "never" and splitters:
        parts = [load_component("pre_tokenizer", part) for part in json.loads(state)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return rule


def _byte_ids(tokenizer: Any, kind: TokenizerFamily) -> dict[int, int]:
    alphabet = {b: c for c, b in byte_alphabet().items()} if kind is TokenizerFamily.BYTE_LEVEL else None
    names = {b: alphabet[b] if alphabet else f"<0x{b:02X}>" for b in range(256)}
    ids = {b: tokenizer.token_to_id(name) for b, name in names.items()}
    return {b: i for b, i in ids.items() if i is not None}


def _unknown_id(tokenizer: Any) -> int | None:
    name = getattr(tokenizer.model, "unk_token", None)
    unknown: int | None = tokenizer.token_to_id(name) if isinstance(name, str) else None
    return unknown
