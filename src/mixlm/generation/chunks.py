"""How many tokens of a long prompt one call runs: the size follows the time that calls take.

While others are generated, a chunk may add the time of two decode steps to a call, so that they wait for at most three.
Where none is, it bounds how long a new request, or a cancelled one, waits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Tokens: of the smallest and the largest chunk, and of the first one where nothing else is generated.
_MIN_CHUNK = 4
_MAX_CHUNK = 8192
_FIRST_CHUNK_ALONE = 64
# A chunk may add this much to a call: of the time of a decode step, and seconds where nothing else is generated.
_SHARE = 2.0
_SECONDS_ALONE = 0.25
# After so many calls with chunks, one without shows again what a decode step takes.
_MAX_CHUNKED_CALLS = 16


@dataclass(slots=True)
class ChunkSizes:
    """The chunks of one engine.

    beside, alone: tokens of a chunk while others are generated, and while none is. decode_seconds: time of a call
    without prefills, None where there was none. chunked_calls: how many calls had a chunk since the last of those.
    """

    beside: int = _MIN_CHUNK
    alone: int = _FIRST_CHUNK_ALONE
    decode_seconds: float | None = None
    chunked_calls: int = 0

    @property
    def needs_decode_step(self) -> bool:
        """Whether a call without chunks is due, to learn what a decode step takes by now."""
        return self.chunked_calls >= _MAX_CHUNKED_CALLS

    def record(self, seconds: float, prompt_tokens: int, chunk: int, *, alone: bool) -> None:
        """Learn from a call: a larger chunk where one added little, a smaller one where it added much.

        Short prompts, or one that runs as a whole, show nothing. chunk: how many tokens of prompts are a chunk of
        a long one, 0 for none. alone: whether nothing else was generated.
        """
        if not prompt_tokens:
            usual = self.decode_seconds or seconds
            weight = 0.5 if self.chunked_calls else 0.2
            self.decode_seconds = usual + weight * (min(seconds, 2 * usual) - usual)  # a hiccup counts little
            self.chunked_calls = 0
        elif chunk and alone:
            self.alone = _adapted(chunk, seconds * chunk / prompt_tokens, _SECONDS_ALONE)
        elif chunk and self.decode_seconds is not None:
            self.chunked_calls += 1
            added = (seconds - self.decode_seconds) * chunk / prompt_tokens
            self.beside = _adapted(chunk, added, _SHARE * self.decode_seconds)


def _adapted(chunk: int, added: float, limit: float) -> int:
    """Return the size of the next chunk: half way, by ratio, to the one that adds `limit`. A hiccup counts little.

    added: seconds that this chunk added to a call.
    """
    ratio = limit / max(added, limit / 4)
    return min(max(round(chunk * max(math.sqrt(ratio), 0.5)), _MIN_CHUNK), _MAX_CHUNK)
