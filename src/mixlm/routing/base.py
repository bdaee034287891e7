"""What a router is, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mixlm.types import Floats
from mixlm.units.base import TextView


@dataclass(frozen=True, slots=True)
class PromptContext:
    """What is known before a reply begins.

    text: the prompt as its author wrote it, UTF-8. read: lets every member read its own prompt and returns how well
    each predicted it, in bits per byte of `text`, float64 (members,). Their caches hold the prompt afterwards.
    """

    text: bytes
    bits_per_byte: Callable[[], Floats]


Route = Callable[[TextView], Floats]


class Router(Protocol):
    """Weights for a state.

    They may depend on the prompt and on the text so far, and on nothing else: weights that look at a member's current
    distribution, or at who happened to run, would make the mixture follow another law than the average.
    """

    def begin(self, context: PromptContext) -> Route:
        """Return the function that gives one weight a member, float64 (members,), 0 or more, summing to 1."""
        ...
