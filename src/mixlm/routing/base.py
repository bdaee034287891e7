"""The interface of routers, and what they may depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mixlm.types import Floats
from mixlm.units.base import TextView


@dataclass(frozen=True, slots=True)
class PromptContext:
    """What is known before a generation begins.

    Attributes:
        text: The prompt, without templates, UTF-8.
        bits_per_byte: Runs the prefill of every member and returns the bits per byte of `text` under each, float64
            (members,). Their KV caches hold the prompt afterwards.
    """

    text: bytes
    bits_per_byte: Callable[[], Floats]


Route = Callable[[TextView], Floats]


class Router(Protocol):
    """The weights for a state.

    They may depend on the prompt and the text so far, and on nothing else. If they depended on a member's current
    distribution, or on which members ran, the mixture would not sample from the average.
    """

    def begin(self, context: PromptContext) -> Route:
        """Return the function from a state to the weights, float64 (members,), non-negative and summing to 1."""
        ...
