"""Stable boundaries: where no later text can change the tokens before, and those after are encoded alike apart.

A text passes stages: normalizers, then pre-tokenizers, each reading what the one before it left. `Boundaries` knows of
each how far its decisions are final and which adjacent characters it keeps together. Where nothing can be proven of a
stage, no boundary is stable, and the whole text is encoded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from unicodedata import category

import numpy as np

from mixlm.tokenization.pattern_reach import PatternReach, Reach, UnprovableError, escaped
from mixlm.tokenization.vocabulary import SPACE, components, encode_text, load_component, token_names

# The pattern of ByteLevel, GPT-2's, and that of Whitespace.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"\w+|[^\w\s]+"
_UNICODE_FORMS = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
_ONE_BY_ONE = frozenset({"Lowercase", "Nmt", "StripAccents", "ByteLevel", "Prepend"})
_CHARACTER_SPLITS = frozenset({"WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit", "Punctuation", "Digits"})
# Characters that stay together with whatever follows them (Grapheme_Cluster_Break=Prepend), outside category Cf.
_PREPENDED = frozenset("\u0d4e\U000111c2\U000111c3\U0001193f\U00011941\U00011a3a\U00011d46\U00011f02") | {
    chr(code) for code in range(0x11A84, 0x11A8A)
}


class _OneByOne(Reach):
    """Changes each character by itself."""

    def limit(self, text: str, end: int) -> int:
        return end


class _Counting(_OneByOne):
    """What it does depends on all that came before: nothing may be cut off."""

    def joins(self, left: str, right: str) -> bool:
        return True


class _UnicodeForm(Reach):
    """A normalization form: a character may be changed by combining ones after it."""

    def joins(self, left: str, right: str) -> bool:
        return not right.isascii() and (
            category(right)[0] in "MC" or "\u1100" <= right <= "\u11ff" or "\ud7b0" <= right <= "\ud7ff"
        )


class _Graphemes(Reach):
    """Reads clusters of characters: only a space after a character of no cluster is sure to stand apart."""

    def joins(self, left: str, right: str) -> bool:
        return right != " " or category(left)[0] in "MC" or left in _PREPENDED


class _Strip(Reach):
    """Drops spaces at the ends of the text."""

    def joins(self, left: str, right: str) -> bool:
        return left.isspace() or right.isspace()


class _AddedTokens(Reach):
    """Finds added tokens, which are looked for in a text before anything else is done to it."""

    def __init__(self, tokens: Iterable[Any], contents: Iterable[str]) -> None:
        self._prefixes: set[str] = set()
        self._takes_spaces = self._takes_spaces_before = self._takes_spaces_behind = self._whole_words = False
        for token, content in zip(tokens, contents, strict=True):
            # Only what comes after it tells whether a token stands alone, and how many spaces belong to it.
            open_end = token.rstrip or token.single_word
            self._prefixes |= {content[:length] for length in range(1, len(content) + open_end)}
            self._takes_spaces |= token.rstrip or token.lstrip
            self._takes_spaces_before |= token.lstrip
            self._takes_spaces_behind |= token.rstrip
            self._whole_words |= token.single_word
        self._longest = max(map(len, self._prefixes), default=0)

    def limit(self, text: str, end: int) -> int:
        if self._takes_spaces:
            end = len(text[:end].rstrip())
        first = max(end - self._longest, 0)
        end = next((start for start in range(first, end) if text[start:end] in self._prefixes), end)
        return len(text[:end].rstrip()) if self._takes_spaces_before else end

    def joins(self, left: str, right: str) -> bool:
        # A space after a token may be the first character of the next one, too.
        if self._takes_spaces_behind and left.isspace():
            return True
        return self._whole_words and (not left.isascii() or left.isalnum() or left == "_")


class Boundaries:
    """The stable boundaries of a `tokenizers.Tokenizer` that takes no special tokens from text and adds no space.

    Args:
        tokenizer: The tokenizer.
        byte_level: Whether its tokens are spelled in the byte-level alphabet.
        names: Its `token_names`, if they are known already.
    """

    def __init__(self, tokenizer: Any, *, byte_level: bool, names: Mapping[int, str] | None = None) -> None:
        self._tokenizer = tokenizer
        normalizers, splitters = components(tokenizer, "normalizer"), components(tokenizer, "pre_tokenizer")
        added = [token for token in tokenizer.get_added_tokens_decoder().values() if not token.special]
        plain, normalized = ([token for token in added if token.normalized is flag] for flag in (False, True))
        try:
            self._normalizers = [(load_component("normalizer", part), _normalizer_reach(part)) for part in normalizers]
            self._splitters = _splitter_reaches(splitters)
            counting = any(isinstance(reach, _Counting) for reach, _ in self._splitters)
            self._provable = not (counting and normalizers)
        except UnprovableError:
            self._provable = False
            return
        self._added = _AddedTokens(plain, (token.content for token in plain))
        contents = (self._normalized(token.content) for token in normalized)
        self._splitters.insert(0, (_AddedTokens(normalized, contents), " "))
        self._one_splitter = len(self._splitters) == 2
        self._normalized_character = lru_cache(4096)(self._normalized)
        self._pairs = None if byte_level else _pairs(tokenizer, names)
        model = tokenizer.model
        self._drops_unknown = not getattr(model, "byte_fallback", False) and getattr(model, "unk_token", None) is None
        # A normalizer may join characters, and without byte tokens unknown characters are fused into one token.
        self._only_spaces = not getattr(model, "byte_fallback", False) or any(
            part["type"] != "Replace" for part in normalizers
        )

    def find(self, encoding: Any, text: str) -> tuple[int, int]:
        """Return how many ids and how many characters no later text can change.

        Args:
            encoding: The text's.
            text: The text.
        """
        limit = self._limit(text) if self._provable else 0
        if not limit:
            return 0, 0
        words, offsets, ids = encoding.word_ids, encoding.offsets, encoding.ids
        unchanged = not self._normalizers or self._normalized(text) == text
        for count in range(len(ids) - 1, 0, -1):
            cut = offsets[count][0]
            between_words = words[count - 1] != words[count]
            if not 0 < cut < len(text) or offsets[count - 1][1] != cut or not (between_words or self._pairs):
                continue
            # To refuse a cut is always right. What is certain without a look at the whole text comes first.
            if (unchanged and cut >= limit) or not (between_words or self._may_part(text[cut - 1], text[cut])):
                continue
            if not self._may_cut(text[:cut], text[cut:], limit, between_words, unchanged and between_words):
                continue
            if unchanged and (between_words or not self._drops_unknown):
                return count, cut
            # A character that a normalizer or the model drops shifts the offsets of all tokens after it: count anew.
            before, after = (encode_text(self._tokenizer, part).ids for part in (text[:cut], text[cut:]))
            if before + after == ids:
                return len(before), cut
        return 0, 0

    def _limit(self, text: str) -> int:
        """Return an offset in the normalized text before which everything is final."""
        text = text[: self._added.limit(text, len(text))]
        for normalizer, reach in self._normalizers:
            end = reach.limit(text, len(text))
            while 0 < end < len(text) and reach.joins(text[end - 1], text[end]):
                end -= 1
            text = normalizer.normalize_str(text[:end])
        end = len(text)
        for reach, space in self._splitters:
            end = reach.limit(text, end)
            text = text.replace(" ", space)
        return end

    def _may_cut(self, left: str, right: str, limit: int, between_words: bool, split: bool) -> bool:
        """Return whether a text may be cut between two parts, where one of its tokens ends.

        Args:
            left: What is before the cut.
            right: What is after it.
            limit: The offset in the normalized text before which everything is final.
            between_words: Whether another part of what the pre-tokenizers leave begins there.
            split: Whether this is certain, whatever the normalizers do.
        """
        if self._added.joins(left[-1], right[0]):
            return False
        for normalizer, reach in self._normalizers:
            if not left or not right or reach.joins(left[-1], right[0]):
                return False
            left, right = normalizer.normalize_str(left), normalizer.normalize_str(right)
        if not left or not right or len(left) >= limit:
            return False
        last, first = left[-1], right[0]
        for number, (reach, space) in enumerate(self._splitters):
            # A cut that the only splitter makes itself is one that it may make.
            if not (split and self._one_splitter and number) and reach.joins(last, first):
                return False
            last, first = last.replace(" ", space), first.replace(" ", space)
        last, first = last.replace(SPACE, " "), first.replace(SPACE, " ")
        return between_words or self._are_apart(last, first)

    def _may_part(self, left: str, right: str) -> bool:
        """Return whether the model may keep two characters apart, as far as the characters alone tell."""
        last, first = self._normalized_character(left)[-1:], self._normalized_character(right)[:1]
        return not last or not first or self._are_apart(last.replace(SPACE, " "), first.replace(SPACE, " "))

    def _are_apart(self, last: str, first: str) -> bool:
        """Return whether no token of the model has two adjacent characters, with spaces as such."""
        return not (self._only_spaces and first != " ") and (ord(last) << 32 | ord(first)) not in (self._pairs or ())

    def _normalized(self, text: str) -> str:
        for normalizer, _ in self._normalizers:
            text = normalizer.normalize_str(text)
        return text


def _pairs(tokenizer: Any, names: Mapping[int, str] | None) -> set[int] | None:
    """Return the pairs of characters that are adjacent in a token of a BPE model; None for other models.

    No token reaches across two other characters, and the text before and the text after are merged apart. Not so in
    other models: a unigram model adds up the scores of a word from its beginning, and how the sum is rounded decides
    between ways that are equally likely, such as a long and a short run of spaces in either order.
    """
    if type(tokenizer.model).__name__ != "BPE":
        return None
    tokens = "\0".join((token_names(tokenizer) if names is None else names).values()).replace(SPACE, " ")
    codes = np.frombuffer(tokens.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    left, right = codes[:-1], codes[1:]
    pairs = np.sort(((left << np.uint64(32)) | right)[(left != 0) & (right != 0)])
    is_last = np.ones(pairs.size, dtype=np.bool_)  # of equal ones; np.unique takes several times as long
    np.not_equal(pairs[1:], pairs[:-1], out=is_last[:-1])
    return set(pairs[is_last].tolist())


def _normalizer_reach(part: Mapping[str, Any]) -> Reach:
    kind = part["type"]
    if kind in _ONE_BY_ONE:
        return _OneByOne()
    if kind in _UNICODE_FORMS or kind == "BertNormalizer":
        return _UnicodeForm()
    if kind == "Precompiled":
        return _Graphemes()
    if kind == "Strip":
        return _Strip()
    if kind == "Replace":
        if len(part["pattern"].get("String", "")) == 1:
            return _OneByOne()
        reach = _pattern_reach(part["pattern"])
        if not reach.nullable:
            return reach
    raise UnprovableError


def _splitter_reaches(parts: Sequence[Mapping[str, Any]]) -> list[tuple[Reach, str]]:
    """Return what each pre-tokenizer that splits can read, and how it spells a space."""
    reaches: list[tuple[Reach, str]] = []
    for number, part in enumerate(parts):
        kind = part["type"]
        if kind == "ByteLevel":
            if number < len(parts) - 1:  # what follows sees bytes
                raise UnprovableError
            if part.get("use_regex", True):
                reaches.append((PatternReach(_GPT2), " "))
        elif kind == "Metaspace":
            reaches.append((Reach(), part["replacement"]))
        elif kind == "Split":
            reaches.append((_pattern_reach(part["pattern"]), " "))
        elif kind == "Whitespace":
            reaches.append((PatternReach(_WORDS), " "))
        elif kind in _CHARACTER_SPLITS:
            reaches.append((Reach(), " "))
        elif kind in ("UnicodeScripts", "FixedLength"):
            reaches.append((_Counting(), " "))
        else:
            raise UnprovableError
    return reaches


def _pattern_reach(pattern: Mapping[str, str]) -> PatternReach:
    return PatternReach(pattern["Regex"] if "Regex" in pattern else "".join(map(escaped, pattern["String"])))
