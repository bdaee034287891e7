"""Members that stopped answering during a generation: excluded, their weight given to the others, and retried later.

Without a member, the target distribution is the others' average, renormalised. That is done only where the user chose
it, and usage reports at how many positions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from mixlm.errors import EngineError
from mixlm.types import Floats

_log = logging.getLogger("mixlm")
_FIRST_WAIT, _MAX_WAIT = 0.5, 30.0  # seconds


class UnavailableMembers:
    """The members of one sequence that do not answer; a container of their indices.

    Args:
        alive: Returns for each member whether it would answer; may take a few seconds.
        names: The members' names.

    positions: by member, the symbols that were written without it.
    """

    def __init__(self, alive: Sequence[Callable[[], bool]], names: Sequence[str]) -> None:
        self._alive = alive
        self._names = names
        self._waits: dict[int, float] = {}
        self._retry_times: dict[int, float] = {}
        self.positions = [0] * len(names)

    def __contains__(self, member: object) -> bool:
        return member in self._retry_times

    def exclude(self, member: int, error: EngineError) -> None:
        """Exclude a member until it responds again. It is retried after ever longer times."""
        self._waits[member] = min(2 * self._waits.get(member, _FIRST_WAIT / 2), _MAX_WAIT)
        self._retry_times[member] = time.monotonic() + self._waits[member]
        _log.warning("%s is excluded from a generation: %s", self._names[member], error.message)

    def retry(self) -> None:
        """Take back members that answer again; called between positions."""
        now = time.monotonic()
        for member in [member for member, due in self._retry_times.items() if now >= due]:
            if self._alive[member]():
                del self._retry_times[member]
                _log.warning("%s responds again", self._names[member])
            else:
                self._waits[member] = min(2 * self._waits[member], _MAX_WAIT)
                self._retry_times[member] = time.monotonic() + self._waits[member]

    def count(self, symbols: int) -> None:
        """Record that so many symbols were written."""
        for member in self._retry_times:
            self.positions[member] += symbols

    def weights(self, weights: Floats) -> Floats:
        """Return weights (members,) without those of unavailable members, renormalised.

        Raises:
            EngineError: No member with weight is left.
        """
        if not self._retry_times:
            return weights
        remaining = weights.copy()
        remaining[list(self._retry_times)] = 0.0
        total = remaining.sum()
        if total <= 0:
            raise EngineError("every member that has weight here has stopped answering", "check their servers")
        remaining /= total
        return remaining
