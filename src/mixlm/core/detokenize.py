"""Incremental detokenization: from tokens' bytes to whole characters, up to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import replace

from mixlm.tokenization.tool_calls import overlap
from mixlm.types import Token

_Decoder = codecs.getincrementaldecoder("utf-8")


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
        self._decoder = _Decoder("replace")
        self.stops = [stop for stop in stops if stop]
        self._pending: list[Token] = []
        self._states: list[tuple[bytes, int]] = []  # of the decoder before each of them
        self.found: str | None = None

    def push(self, token: Token, *, may_stop: bool = True) -> list[Token]:
        """Add a token, whose `text` is not filled in yet, and return the tokens that can be shown now.

        may_stop: whether a stop string may end here. What may begin one is held back in any case.
        """
        self._states.append(self._decoder.getstate())
        self._pending.append(replace(token, text=self._decoder.decode(token.data)))
        text = "".join(pending.text for pending in self._pending)
        stop_offsets = {stop: offset for stop in self.stops if (offset := text.find(stop)) >= 0}
        if stop_offsets and may_stop:
            self.found = min(stop_offsets, key=lambda stop: stop_offsets[stop])
            return self._release(stop_offsets[self.found], truncate=True)
        held_back = max((overlap(text, stop) for stop in self.stops), default=0)
        return self._release(len(text) - held_back)

    def flush(self) -> list[Token]:
        """Return the tokens still held back, at the end of a completion without a stop string."""
        out, self._pending, self._states = self._pending, [], []
        return out

    def _release(self, length: int, *, truncate: bool = False) -> list[Token]:
        """Return the tokens within the first `length` characters; `truncate` shortens the next and drops the rest."""
        out: list[Token] = []
        while self._pending and len(self._pending[0].text) <= length and (length > 0 or not truncate):
            token = self._pending.pop(0)
            del self._states[0]
            length -= len(token.text)
            out.append(token)
        if truncate and length > 0:
            token, count = self._pending[0], _byte_count(self._pending[0].data, self._states[0], length)
            out.append(replace(token, text=token.text[:length], data=token.data[:count]))
        if truncate:
            self._pending, self._states = [], []
        return out


def _byte_count(data: bytes, state: tuple[bytes, int], length: int) -> int:
    """Return how many bytes the first `length` characters take.

    Args:
        data: A token's bytes. The first character may have begun before them, and the last may be incomplete.
        state: Of the decoder before them.
        length: The number of characters, at least 1.
    """
    decoder = _Decoder("replace")
    decoder.setstate(state)
    for i in range(len(data)):
        length -= len(decoder.decode(data[i : i + 1]))
        if length <= 0:  # below 0 where this byte shows that those before it are no character
            return i + (length == 0)
    return len(data)
