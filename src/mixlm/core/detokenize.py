"""From bytes to what a reader sees: whole characters, and no text behind a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import replace

from mixlm.types import Token


class TextStream:
    """Turns a sequence's tokens into text as they come.

    A token whose last character is incomplete carries the text it completes; the rest comes with the token that
    completes it, and bytes that are no UTF-8 come as U+FFFD. A character still incomplete when the reply ends stays
    out of the text. Tokens that may be the beginning of a stop string are held back until that is known.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._stops = [one for one in stops if one]
        self._held: list[Token] = []
        self.stopped = False

    def push(self, token: Token) -> list[Token]:
        """Add a token whose `text` is not known yet. Returns the tokens that can be shown now."""
        self._held.append(replace(token, text=self._decode(token.data)))
        text = "".join(one.text for one in self._held)
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found), cut=True)
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        return self._release(len(text) - keep)

    def flush(self) -> list[Token]:
        """Return what is still held back, at the end of a reply that met no stop string."""
        out, self._held = self._held, []
        return out

    def _release(self, length: int, *, cut: bool = False) -> list[Token]:
        """Give out the tokens that lie within the first `length` characters; with `cut`, shorten the next to fit."""
        out: list[Token] = []
        while self._held and len(self._held[0].text) <= length and (length > 0 or not cut):
            token = self._held.pop(0)
            length -= len(token.text)
            out.append(token)
        if cut and length > 0:
            first = self._held[0]
            # The token's own bytes: its text may begin with a character that tokens before it have begun.
            behind = len(first.text[length:].encode())
            out.append(replace(first, text=first.text[:length], data=first.data[: len(first.data) - behind]))
        if cut:
            self._held = []
        return out


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
