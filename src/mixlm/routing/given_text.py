"""A router's weights along a given text: those before each of its segments."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from mixlm.errors import UnsupportedError
from mixlm.routing.base import CheckedRoute, FixedRouter, PromptContext, Router, observed_by
from mixlm.routing.features import FEATURES, features
from mixlm.routing.gate_router import GateRouter
from mixlm.routing.observation import ObservedStates
from mixlm.routing.prompt import PromptRouter
from mixlm.tokenization.segments import Offsets
from mixlm.types import Floats, Ids


def weights_along(
    router: Router,
    text: bytes,
    starts: Offsets,
    passage_starts: Offsets,
    prompt_bits: Floats,
    observed: ObservedStates | None = None,
) -> Floats:
    """Return the weights that a router gives before each segment of a text: float64 (segments, members).

    Args:
        router: The router.
        text: One or more passages, each with its prompt in front.
        starts: Where each segment begins, int64 (segments,). The bytes between the beginning of a passage and its first
            segment are its prompt.
        passage_starts: Where the passage of each segment begins, int64 (segments,).
        prompt_bits: Bits per byte of that prompt under each member, float64 (segments, members).
        observed: What the router observes before each segment; None where nothing is known of that.

    Raises:
        UnsupportedError: The router reads the members' tokens, or observes a member, and these are not given.
    """
    observes = observed_by(router, prompt_bits.shape[1])
    if observes is not None and (observed is None or (observes.hidden and observed.hidden is None)):
        raise UnsupportedError(
            f"the router {type(router).__name__} observes a member, and these scores hold no observations of it",
            "score the text with mixlm score, or use a router of the text",
        )
    if isinstance(router, GateRouter):
        along = features_along(text, starts, passage_starts) if "text" in router.inputs.groups else None
        return router.weights_at(along, observed)
    weights = np.empty(prompt_bits.shape)
    for segments in segments_by_passage(passage_starts):
        passage_start = int(passage_starts[segments[0]])
        prompt = text[passage_start : int(starts[segments].min())]
        context = PromptContext(prompt, partial(np.copy, prompt_bits[segments[0]]))
        route = CheckedRoute(router, context, prompt_bits.shape[1])
        if isinstance(router, FixedRouter | PromptRouter):
            weights[segments] = route(_GivenTextView(b""))
            continue
        for segment in segments:
            before = _GivenTextView(text[passage_start + len(prompt) : int(starts[segment])])
            weights[segment] = route(before, None if observed is None else observed.at(int(segment)))
    return weights


def features_along(text: bytes, starts: Offsets, passage_starts: Offsets) -> Floats:
    """Return the features of the text before each segment, within its passage: float64 (segments, FEATURES)."""
    out = np.empty((len(starts), FEATURES))
    for segments in segments_by_passage(passage_starts):
        passage_start = int(passage_starts[segments[0]])
        out[segments] = features(text[passage_start : int(starts[segments].max())], starts[segments] - passage_start)
    return out


def segments_by_passage(passage_starts: Offsets) -> Iterator[Offsets]:
    """Yield the indices of each passage's segments, int64 (n,)."""
    order = np.argsort(passage_starts, kind="stable")
    changes = np.flatnonzero(np.diff(passage_starts[order])) + 1
    yield from np.split(order, changes)


class _GivenTextView:
    """A given text as a router's state: its bytes are known, the members' tokens are not."""

    def __init__(self, text: bytes) -> None:
        self._text = text

    def tail(self, length: int) -> bytes:
        return self._text[max(len(self._text) - length, 0) :]

    def ids(self, member: int) -> Ids:
        raise UnsupportedError("this router reads the members' tokens, which scores do not hold")

    def prompt_length(self, member: int) -> int:
        raise UnsupportedError("this router reads the members' tokens, which scores do not hold")
