"""What a router may look at beside the text: one member, which runs at every position before the coin is tossed.

The member's distribution at a state and its hidden state there are functions of the state alone, and so are weights
that depend on them: the mixture still samples from the average. A member that runs only where its coin falls, or the
member that wrote a token, is known in some continuations of a state and not in others, so neither can be observed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mixlm.core.sampling import largest_indices, log_softmax
from mixlm.routing.base import Observation, Observes
from mixlm.types import Candidates, Floats, HiddenStates, Ids, LogitsRow

_BY_STATE = ("ids", "logprobs", "hidden", "mass", "following")  # the arrays of `ObservedStates`


@dataclass(frozen=True)
class ObservedStates:
    """Observations of one member at many states of given texts.

    Attributes:
        name: The member's.
        ids: Its most likely tokens, int64 (states, top_k); see `Observation`.
        logprobs: float64 (states, top_k).
        hidden: float16 (states, width), or None.
        mass: Their probability together, float64 (states,), where that was kept; routers do not see it.
        following: The member's token after each state, int64 (states,), where that is known; -1 for an end.
    """

    name: str
    ids: Ids
    logprobs: Floats
    hidden: HiddenStates | None = None
    mass: Floats | None = None
    following: Ids | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, state: int) -> Observation:
        """Return the observation at one state."""
        return Observation(self.ids[state], self.logprobs[state], None if self.hidden is None else self.hidden[state])

    def select(self, states: npt.NDArray[Any]) -> ObservedStates:
        """Return the observations at some states, by mask or by index."""
        return replace(self, **{name: array[states] for name, array in self.arrays().items()})

    @classmethod
    def concatenate(cls, parts: Sequence[ObservedStates]) -> ObservedStates:
        """Return several texts' observations of one member as one."""
        arrays = [part.arrays() for part in parts]
        common = set.intersection(*map(set, arrays))
        return cls(parts[0].name, **{name: np.concatenate([own[name] for own in arrays]) for name in common})

    @classmethod
    def of(cls, name: str, observations: Sequence[Observation]) -> ObservedStates:
        """Return observations of a member, one or more, as one."""
        ids, logprobs, hidden = zip(*observations, strict=True)
        return cls(name, np.array(ids), np.array(logprobs), None if hidden[0] is None else np.array(hidden))

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays that there are, by name."""
        return {name: array for name in _BY_STATE if (array := getattr(self, name)) is not None}


def observation(row: LogitsRow, observes: Observes, hidden: HiddenStates | None = None) -> Observation:
    """Return what a router observes of a row of logits, and of a hidden state, (width,)."""
    ids, logprobs = top_tokens(row, observes.top_k)
    return Observation(ids, logprobs, hidden)


def top_tokens(row: LogitsRow, k: int) -> Candidates:
    """Return the ids and log-probabilities of an `Observation` from a row of logits."""
    if k == 0:  # of a router that looks at the hidden state alone
        return Candidates(np.zeros(0, dtype=np.int64), np.zeros(0))
    values = row.logprobs if isinstance(row, Candidates) else row
    largest = largest_indices(values, k)
    ids = row.ids[largest] if isinstance(row, Candidates) else largest
    logits = values[largest].astype(np.float64)
    order = np.lexsort((ids, -logits))[:k]
    ids, logits = ids[order], logits[order]
    if len(ids):
        logits = log_softmax(logits)
    missing = k - len(ids)
    if missing:
        ids, logits = np.append(ids, np.full(missing, -1)), np.append(logits, np.full(missing, -np.inf))
    return Candidates(ids.astype(np.int64), logits)
