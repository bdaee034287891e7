"""What a router may look at beside the text: one member, which runs at every position before the coin is tossed.

The member's distribution at a state and its hidden state there are functions of the state alone, and so are weights
that depend on them: the mixture still samples from the average. A member that runs only where its coin falls, or the
member that wrote a token, is known in some continuations of a state and not in others, so neither can be observed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from mixlm.core.sampling import largest_indices, log_softmax
from mixlm.errors import ConfigError
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
        following: The member's token behind each state, int64 (states,), where that is known; -1 for an end.
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
        arrays = {name: getattr(self, name) for name in _BY_STATE}
        return replace(self, **{name: array[states] for name, array in arrays.items() if array is not None})

    @classmethod
    def concatenate(cls, parts: Sequence[ObservedStates]) -> ObservedStates:
        """Return several texts' observations of one member as one."""
        joined: dict[str, Any] = {}
        for name in _BY_STATE:
            arrays = [getattr(part, name) for part in parts]
            joined[name] = None if any(array is None for array in arrays) else np.concatenate(arrays)
        return cls(parts[0].name, **joined)

    def save(self, path: str | Path) -> None:
        """Write the observations as an npz file."""
        hidden = np.zeros((len(self), 0), dtype=np.float16) if self.hidden is None else self.hidden
        with open(path, "wb") as file:
            ids = self.ids.astype(np.int32)
            mass = np.zeros(0) if self.mass is None else self.mass
            np.savez(file, name=np.array(self.name), ids=ids, logprobs=self.logprobs, hidden=hidden, mass=mass)

    @classmethod
    def load(cls, path: str | Path) -> ObservedStates:
        """Read what `save` wrote. Raises ConfigError when the file cannot be read or holds something else."""
        try:
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                hidden, mass = file["hidden"], file["mass"]
                ids = file["ids"].astype(np.int64)
                states = cls(str(file["name"]), ids, file["logprobs"], hidden, mass if len(mass) == len(ids) else None)
        except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, BadZipFile) as error:
            raise ConfigError(f"the observations in {path} cannot be read: {error}") from error
        if not len(states.ids) == len(states.logprobs) == len(hidden):
            raise ConfigError(f"{path} holds no observations: its arrays do not fit each other")
        return states if hidden.shape[1] else replace(states, hidden=None)


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


def top_mass(row: LogitsRow, k: int) -> float:
    """Return the probability of the k most likely tokens of a row of logits together."""
    values = row.logprobs if isinstance(row, Candidates) else row
    largest = np.sort(values[largest_indices(values, k)])[-k:] if k else values
    if isinstance(row, Candidates):  # of log-probabilities
        return float(np.exp(largest).sum())
    top = values.max()
    return float(np.exp(largest - top).sum() / np.exp(values - top).sum())
