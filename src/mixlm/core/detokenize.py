"""Incremental detokenization: from tokens' bytes to whole characters, up to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import replace

from mixlm.types import Token


class StreamingDetokenizer:
    """Turns a sequence's tokens into text as they are generated.

    A character that spans several tokens belongs to the token that completes it, and bytes that are not UTF-8 become
    U+FFFD. A character still incomplete at the end of the completion is left out. Tokens that may begin a stop string
    are held back until that is decided.

    Attributes:
        stops: The stop strings from here on.
        found: The stop string that was found: the first in the text, and the first given of several there.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.stops = [stop for stop in stops if stop]
        self._pending: list[Token] = []
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.found is not None

    def push(self, token: Token) -> list[Token]:
        """Add a token, whose `text` is not filled in yet, and return the tokens that can be shown now."""
        self._pending.append(replace(token, text=self._decode(token.data)))
        text = "".join(pending.text for pending in self._pending)
        stop_offsets = {stop: offset for stop in self.stops if (offset := text.find(stop)) >= 0}
        if stop_offsets:
            self.found = min(stop_offsets, key=lambda stop: stop_offsets[stop])
            return self._release(stop_offsets[self.found], truncate=True)
        held_back = max((_overlap(text, stop) for stop in self.stops), default=0)
        return self._release(len(text) - held_back)

    def flush(self) -> list[Token]:
        """Return the tokens still held back, at the end of a completion without a stop string."""
        out, self._pending = self._pending, []
        return out

    def _release(self, length: int, *, truncate: bool = False) -> list[Token]:
        """Return the tokens within the first `length` characters; `truncate` shortens the next and drops the rest."""
        out: list[Token] = []
        while self._pending and len(self._pending[0].text) <= length and (length > 0 or not truncate):
            token = self._pending.pop(0)
            length -= len(token.text)
            out.append(token)
        if truncate and length > 0:
            token = self._pending[0]
            # Count from the end of the token's bytes: its first character may have begun in tokens before it.
            dropped = len(token.text[length:].encode())
            out.append(replace(token, text=token.text[:length], data=token.data[: len(token.data) - dropped]))
        if truncate:
            self._pending = []
        return out


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
