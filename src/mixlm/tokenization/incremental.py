"""Text as tokens: the canonical encoding of any bytes, redone only where it can still change.

A member of an ensemble reads text that others wrote, so it must read it as it would have in training: encoded as a
whole, never token by token. `Encoder.encode` gives that encoding for any bytes, valid UTF-8 or not, and says how much
of it no later byte can change; `Growing` uses this to encode a growing text in time proportional to what is new.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol, cast
from unicodedata import category

from mixlm.tokenization.vocabulary import SPACE, TokenizerFamily, byte_alphabet, describe

# Where a tokenizer puts a space of its own: nowhere; in front of a text; also behind every control token; or there even
# if the text begins with a space already.
LeadingSpace = Literal["never", "first", "always", "doubled"]


class Encoded(NamedTuple):
    """Ids of some text. The first `stable_ids` of them cover the first `stable_bytes` bytes whatever follows."""

    ids: list[int]
    stable_ids: int
    stable_bytes: int


class Encoder(Protocol):
    """Canonical encoding of plain text. Control tokens never result, whatever the text looks like."""

    def encode(self, data: bytes) -> Encoded:
        """Encode bytes that follow a control token or a stable boundary."""
        ...


class _Settled(NamedTuple):
    """A stable boundary: bytes and ids before it, and the length of the text that showed it to be stable."""

    bytes: int
    ids: int
    seen: int


class IncrementalEncoder:
    """The canonical encoding of one text for one member; the text grows, and may be cut back."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._settled = [_Settled(0, 0, 0)]
        self._ids = 0

    def update(self, data: bytes | bytearray) -> tuple[int, list[int]]:
        """Read the whole text so far. Returns how many ids at the end of the last call fall, and those that follow.

        Only the part behind the last stable boundary is read.
        """
        last = self._settled[-1]
        fallen = self._ids - last.ids
        result = self._encoder.encode(bytes(data[last.bytes :]))
        self._ids = last.ids + len(result.ids)
        if result.stable_bytes:
            self._settled.append(_Settled(last.bytes + result.stable_bytes, last.ids + result.stable_ids, len(data)))
        return fallen, result.ids

    def truncate(self, length: int) -> None:
        """Forget boundaries that only text behind the first `length` bytes has shown to be stable."""
        while self._settled[-1].seen > length:
            self._settled.pop()


def utf8_runs(data: bytes) -> tuple[list[tuple[str | None, bytes]], bytes]:
    """Split bytes into runs of valid UTF-8 (text, bytes), runs of stray bytes (None, bytes), and a cut character.

    The second value is the beginning of a character at the very end, empty when the last one is whole.
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
    """The encoder of a `tokenizers.Tokenizer`, which it changes: no control tokens in text, no space put in front.

    Text that a member reads continues a prompt, so the leading space that some SentencePiece tokenizers put in front
    of a sentence has no place in it; `leading_space` says where the tokenizer would put one, for prompts.
    normaliser: the names of what changes a text before it is encoded, "none" where nothing does.
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
        # What a post-processor does to ids is for prompts; what it does to offsets (trimming spaces) hides boundaries.
        tokenizer.post_processor = processors.Sequence([])
        self._tokenizer = tokenizer
        self._byte_ids = _byte_ids(tokenizer, kind)
        self._boundary = _Words(tokenizer) if kind is TokenizerFamily.BYTE_LEVEL else _Pairs(tokenizer)
        self._raw = {b: c for c, b in byte_alphabet().items()} if kind is TokenizerFamily.BYTE_LEVEL else None
        self._unknown = _unknown_id(tokenizer)
        self._disguises = _disguises(tokenizer)

    def encode(self, data: bytes) -> Encoded:
        """Encode any bytes. A character cut at the end is encoded as the bytes that are there."""
        runs, cut = utf8_runs(data)
        ids: list[int] = []
        stable_ids = stable_bytes = 0
        done = 0
        for at, (text, raw) in enumerate(runs):
            last = at == len(runs) - 1
            if text is None:
                ids += self._bytes(raw)
                done += len(raw)
                stable_ids, stable_bytes = len(ids), done
                continue
            own, tokens, characters = self._text(text)
            if tokens or not last:
                stable_ids = len(ids) + (tokens if last else len(own))
                stable_bytes = done + len(text[:characters].encode() if last else raw)
            done += len(raw)
            if cut and last and self._raw is not None:
                ids += self._with_cut(text, cut)
                return Encoded(ids, stable_ids, stable_bytes)
            ids += own
        return Encoded(ids + self._bytes(cut), stable_ids, stable_bytes)

    def _text(self, text: str) -> tuple[list[int], int, int]:
        """Return the ids of a text, and how many ids and characters of it no later text can change."""
        if self._disguises is not None:
            read = self._tokenizer.normalizer.normalize_str(text) if self._tokenizer.normalizer is not None else text
            parts = self._disguises.split(read)
            if len(parts) > 1:
                return [i for part in parts for i in self._tokenizer.encode(part, add_special_tokens=False).ids], 0, 0
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return (encoding.ids, *self._boundary(encoding, text))

    def _with_cut(self, text: str, cut: bytes) -> list[int]:
        """Encode text and the cut character behind it as byte-level BPE would have begun to merge them.

        Which pre-token the character falls into depends on its class, so a whole one with the same first bytes stands
        in to find the pre-token; its bytes up to the cut are then merged by the model itself.
        """
        for fill in (0x80, 0x90, 0xA0, 0xB0):
            try:
                whole = (cut + bytes([fill]) + b"\x80" * 3)[: _length(cut[0])].decode()
                break
            except UnicodeDecodeError:
                continue
        else:
            return [*self._tokenizer.encode(text, add_special_tokens=False).ids, *self._bytes(cut)]
        encoding = self._tokenizer.encode(text + whole, add_special_tokens=False)
        words, offsets = encoding.word_ids, encoding.offsets
        first = next((i for i, word in enumerate(words) if word == words[-1]), 0)
        # By whole pre-tokens: where a vocabulary lacks bytes, offsets inside one are wrong.
        while first and offsets[first - 1][1] != offsets[first][0]:
            first = words.index(words[first - 1])
        head = text[offsets[first][0] if first else 0 :].encode() + cut
        assert self._raw is not None
        merged = self._tokenizer.model.tokenize("".join(self._raw[b] for b in head))
        return [*encoding.ids[:first], *(token.id for token in merged)]

    def _bytes(self, raw: bytes) -> list[int]:
        """Encode bytes that are no text, one token each.

        A byte without a token of its own is read as the unknown token, or not at all where there is none: some
        byte-level vocabularies lack bytes that never occur in UTF-8.
        """
        return [one for b in raw if (one := self._byte_ids.get(b, self._unknown)) is not None]


def _disguises(tokenizer: Any) -> re.Pattern[str] | None:
    """Return a pattern that finds where to cut a text so that nothing in it is taken for a control or byte token.

    SentencePiece never reads text as one of these; a unigram model of `tokenizers` takes any piece whose spelling is
    there. Other models build their tokens from single characters, and have no way to such a piece.
    """
    if type(tokenizer.model).__name__ != "Unigram":
        return None
    control = [one.content for one in tokenizer.get_added_tokens_decoder().values() if one.special]
    spelled = [re.escape(one[0]) + f")(?={re.escape(one[1:])}" for one in control if len(one) > 1]
    return re.compile("|".join(f"(?<={one})" for one in [*spelled, "<)(?=0x[0-9A-F]{2}>"]))


def _length(first: int) -> int:
    """Return the length of a UTF-8 character from its first byte."""
    return 4 if first >= 0xF0 else 3 if first >= 0xE0 else 2


class _Words:
    """Stable boundaries of a tokenizer whose pre-tokens are found by a pattern from left to right.

    A pattern looks ahead by at most one character and never back, so more text can only change the last pre-token;
    the last but one stays open as well. A mark belongs to the character before it, which it may be normalised with.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = [one.content for one in tokenizer.get_added_tokens_decoder().values() if not one.special]
        # What may be the beginning of an added token, which is found before any pattern.
        self._beginnings = {one[:length] for one in added for length in range(1, len(one))}
        self._longest = max(map(len, self._beginnings), default=0)

    def __call__(self, encoding: Any, text: str) -> tuple[int, int]:
        """Return how many ids, and how many characters, no later text can change."""
        for start in range(max(len(text) - self._longest, 0), len(text)):
            if text[start:] in self._beginnings:
                text = text[:start]
                encoding = self._tokenizer.encode(text, add_special_tokens=False)
                break
        words, offsets = encoding.word_ids, encoding.offsets
        for count in range(len(words) - 1, 0, -1):
            if words[count - 1] >= words[-1] - 1 or words[count - 1] == words[count]:
                continue
            at = offsets[count][0]
            if offsets[count - 1][1] == at and not category(text[at]).startswith("M"):
                return count, at
        return 0, 0


class _Pairs:
    """Stable boundaries of a tokenizer that takes a text as one word, as SentencePiece's do.

    Between two characters that stand side by side in no token, no token ever reaches across: the text falls into two
    parts that are encoded apart, whatever follows.
    """

    def __init__(self, tokenizer: Any) -> None:
        pairs: set[tuple[str, str]] = set()
        for token in tokenizer.get_vocab(with_added_tokens=True):
            spelled = token.replace(SPACE, " ")
            pairs.update(pairwise(spelled))
        self._pairs = pairs
        # A normaliser may join characters, and without byte tokens unknown characters are fused into one token: only a
        # boundary in front of a space is safe then.
        self._only_spaces = bool(_changes(tokenizer)) or not getattr(tokenizer.model, "byte_fallback", False)

    def __call__(self, encoding: Any, text: str) -> tuple[int, int]:
        """Return how many ids, and how many characters, no later text can change."""
        offsets = encoding.offsets
        text = text.replace(SPACE, " ")
        for count in range(len(offsets) - 1, 0, -1):
            at = offsets[count][0]
            if at < 1 or offsets[count - 1][1] != at or (self._only_spaces and text[at] != " "):
                continue
            if (text[at - 1], text[at]) not in self._pairs:
                return count, at
        return 0, 0


def _flat(component: Any) -> list[dict[str, Any]]:
    if component is None:
        return []
    if component["type"] == "Sequence":
        return [part for one in component["normalizers"] for part in _flat(one)]
    return [component]


def _changes(tokenizer: Any) -> list[str]:
    """Name what a normaliser changes in a text, but for SentencePiece's way of writing spaces."""
    return [
        part["type"]
        for part in _flat(describe(tokenizer)["normalizer"])
        if part["type"] != "Prepend" and not (part["type"] == "Replace" and part["pattern"].get("String") == " ")
    ]


def _take_leading_space(tokenizer: Any) -> LeadingSpace:
    """Stop a tokenizer from putting spaces in front of texts, and return where it did."""
    from tokenizers import normalizers, pre_tokenizers

    rule: LeadingSpace = "never"
    description = describe(tokenizer)
    kept = [part for part in _flat(description["normalizer"]) if part["type"] != "Prepend"]
    if len(kept) != len(_flat(description["normalizer"])):
        rule = "doubled"
        tokenizer.normalizer = normalizers.Sequence([_load(normalizers.Normalizer, part) for part in kept])
    state = json.dumps(description["pre_tokenizer"])
    for spelled, spaces, found in (
        ('"prepend_scheme": "always"', '"prepend_scheme": "never"', "always"),
        ('"prepend_scheme": "first"', '"prepend_scheme": "never"', "first"),
        ('"add_prefix_space": true', '"add_prefix_space": false', "always"),
    ):
        if spelled in state:
            rule = cast(LeadingSpace, found)
            state = state.replace(spelled, spaces)
    if rule != "never" and description["pre_tokenizer"] is not None:
        tokenizer.pre_tokenizer = _load(pre_tokenizers.PreTokenizer, json.loads(state))
    return rule


def _load(base: Any, state: dict[str, Any]) -> Any:
    """Build a component of a tokenizer from its description."""
    from tokenizers import Tokenizer, models

    shell = json.loads(Tokenizer(models.BPE()).to_str())
    field = "normalizer" if base.__name__ == "Normalizer" else "pre_tokenizer"
    shell[field] = state
    return getattr(Tokenizer.from_str(json.dumps(shell)), field)


def _byte_ids(tokenizer: Any, kind: TokenizerFamily) -> dict[int, int]:
    spelled = {b: c for c, b in byte_alphabet().items()} if kind is TokenizerFamily.BYTE_LEVEL else None
    names = {b: spelled[b] if spelled else f"<0x{b:02X}>" for b in range(256)}
    found = {b: tokenizer.token_to_id(name) for b, name in names.items()}
    return {b: i for b, i in found.items() if i is not None}


def _unknown_id(tokenizer: Any) -> int | None:
    name = getattr(tokenizer.model, "unk_token", None)
    found: int | None = tokenizer.token_to_id(name) if isinstance(name, str) else None
    return found
