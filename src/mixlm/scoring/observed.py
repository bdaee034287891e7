"""What a router observes of a member in front of each token of a given text, by one more pass of that member."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from mixlm.engines.base import Engine, Session
from mixlm.engines.topk_only import TopKOnlySession
from mixlm.routing.base import Observes
from mixlm.routing.observation import ObservedStates, top_mass, top_tokens
from mixlm.scoring import cache
from mixlm.scoring.passages import Passage
from mixlm.terminal import Progress
from mixlm.types import HiddenStates, Ids

_CHUNK = 128  # positions of one pass, whose logits lie in memory

EncodedPassage = tuple[Ids, npt.NDArray[np.int64]]  # all ids of a passage, and where the scored ones end in bytes


def observed_states(
    engine: Engine,
    observes: Observes,
    passages: Sequence[tuple[Passage, EncodedPassage]],
    *,
    name: str,
    model: str | None = None,
    progress: Progress | None = None,
) -> ObservedStates:
    """Return what is observed in front of each scored token of passages, and of an end that is scored.

    Args:
        engine: The observed member's.
        observes: What is observed.
        passages: Each with the member's ids.
        name: The member's.
        model: Its model's identity, to cache the result; None to cache nothing.
        progress: Called with what is done, the passages so far and their number.
    """
    path, states = None, None
    if model is not None:
        observing = ["observed with mass", engine.name, dict(engine.details), model, observes.top_k, observes.hidden]
        data = [
            part
            for passage, (ids, bounds) in passages
            for part in (ids.tobytes(), len(bounds).to_bytes(8, "little"), b"ends" if passage.scores_end else b"")
        ]
        path = cache.path_of(observing, data)
        states = cache.get(path, ObservedStates.load)
    if states is None:
        parts = []
        for passage, (ids, bounds) in passages:
            length, session = len(ids) - len(bounds), engine.session()
            parts.append(passage_states(session, observes, ids, length, name, end=passage.scores_end))
            if progress is not None:
                progress(f"observing {name}", len(parts), len(passages))
        states = ObservedStates.concatenate(parts)
        if path is not None:
            cache.put(states.save, path)
    following = [
        np.append(ids[len(ids) - len(bounds) :], [-1] * passage.scores_end) for passage, (ids, bounds) in passages
    ]
    return replace(states, following=np.concatenate(following).astype(np.int64))


def passage_states(
    session: Session, observes: Observes, ids: Ids, first: int, name: str, *, end: bool = False
) -> ObservedStates:
    """Return what is observed after each prefix of ids, from `first` tokens on; with `end` after all of them too."""
    if observes.hidden:
        session.keep_hidden()
    length = len(ids) - first + end
    tokens = np.empty((length, observes.top_k), dtype=np.int64)
    logprobs = np.empty((length, observes.top_k))
    mass = None if isinstance(session, TopKOnlySession) else np.empty(length)  # it takes whole rows of logits
    hidden: list[HiddenStates] = []
    for start in range(0, length, _CHUNK):
        count = min(_CHUNK, length - start)
        rows = session.logits(ids[: first + start + count - 1], last=count)
        for place, row in enumerate(rows, start):
            tokens[place], logprobs[place] = top_tokens(row, observes.top_k)
            if mass is not None:
                mass[place] = top_mass(row, observes.top_k)
        if observes.hidden and session.hidden_states is not None:
            hidden.append(session.hidden_states[-count:].copy())
    return ObservedStates(name, tokens, logprobs, np.concatenate(hidden) if hidden else None, mass)
