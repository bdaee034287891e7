"""Members that stopped answering in the middle of a reply: left out, their weight given to others, asked again later.

What a reply loses with a member is part of its law from there on: it is the others' average, renormalised. That is done
only where the user chose it, and the reply's figures show at how many positions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from mixlm.errors import EngineError
from mixlm.types import Floats

_log = logging.getLogger("mixlm")
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0


class UnavailableMembers:
    """Which members of one reply do not answer. alive: tells of each whether it would; may take a few seconds.

    positions: symbols written without each of them.
    """

    def __init__(self, alive: Sequence[Callable[[], bool]], names: Sequence[str]) -> None:
        self._alive = alive
        self._names = names
        self._waits: dict[int, float] = {}
        self._next: dict[int, float] = {}
        self.positions = [0] * len(names)

    def __contains__(self, member: object) -> bool:
        return member in self._next

    def exclude(self, member: int, error: EngineError) -> None:
        """Leave a member out until it answers again. It is asked after ever longer times."""
        self._waits[member] = min(2 * self._waits.get(member, _FIRST_WAIT / 2), _LONGEST_WAIT)
        self._next[member] = time.monotonic() + self._waits[member]
        _log.warning("%s is left out of a reply: %s", self._names[member], error.message)

    def retry(self) -> None:
        """Take members back that answer again; called between positions."""
        for member in [one for one, due in self._next.items() if time.monotonic() >= due]:
            if self._alive[member]():
                del self._next[member]
                _log.warning("%s answers again", self._names[member])
            else:
                self._waits[member] = min(2 * self._waits[member], _LONGEST_WAIT)
                self._next[member] = time.monotonic() + self._waits[member]

    def count(self, written: int) -> None:
        """Note that so many symbols were written."""
        for member in self._next:
            self.positions[member] += written

    def weights(self, weights: Floats) -> Floats:
        """Return weights (members,) without the absent members', renormalised.

        Raises EngineError where nobody is left who could write.
        """
        if not self._next:
            return weights
        kept = weights.copy()
        kept[list(self._next)] = 0.0
        total = kept.sum()
        if total <= 0:
            raise EngineError("every member that could write here has stopped answering", "look at their servers")
        kept /= total
        return kept
