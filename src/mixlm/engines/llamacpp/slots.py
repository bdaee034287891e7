"""Slots of llama.cpp: each keeps the KV cache of the sequence that ran in it last."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from mixlm.engines.base import Session, common_prefix
from mixlm.types import Ids

# Tokens. A shorter text is prefilled again rather than waited for.
_SHORT = 64
_NO_IDS = np.zeros(0, dtype=np.int64)


class Slots:
    """Assigns slots to sessions; where there are too few, the session with the shortest text loses its slot."""

    def __init__(self, count: int) -> None:
        self.count = count
        # The session that has each slot, None where it is gone or there was none; the slot used longest ago first.
        self._owners: OrderedDict[int, Callable[[], Session | None]] = OrderedDict.fromkeys(range(count), lambda: None)
        self._busy: set[int] = set()
        self._cached_ids: dict[int, Ids] = {}
        self._changed = threading.Condition()

    @contextmanager
    def acquired(self, session: Session) -> Iterator[tuple[int, bool]]:
        """Wait for a slot and hold it in this context: see `acquire`."""
        with self._changed:
            while (acquired := self.acquire(session)) is None:
                self._changed.wait()
        try:
            yield acquired
        finally:
            self.release(acquired[0])

    def acquire(self, session: Session, ids: Ids | None = None) -> tuple[int, bool] | None:
        """Give a session a slot until `release`.

        Args:
            session: gets the slot that it owns, if any.
            ids: what it will run, int64. Of slots without an owner, it then gets the one with the longest common
                prefix.

        Returns:
            The slot, and whether the session owned it before; None while all slots are busy.
        """
        with self._changed:
            slot = self._choose(session, ids)
            if slot is None:
                return None
            is_own = self._owners[slot]() is session
            self._owners[slot] = weakref.ref(session)
            self._owners.move_to_end(slot)
            self._busy.add(slot)
            if ids is not None:
                self._cached_ids[slot] = ids.copy()
            return slot, is_own

    def owns(self, session: Session) -> bool:
        """Whether a session still has a slot."""
        with self._changed:
            return any(owner() is session for owner in self._owners.values())

    def release(self, slot: int) -> None:
        """Let a slot be used again; its session still owns it."""
        with self._changed:
            self._busy.discard(slot)
            self._changed.notify_all()

    def _choose(self, session: Session, ids: Ids | None) -> int | None:
        """Return the session's own slot, else one without an owner, else that of the shortest text, not busy.

        Of equally short ones it is the least recently used. A long text keeps its slot while that of a much shorter one
        is busy: its prefill would cost more than the wait.
        """
        idle = [slot for slot in self._owners if slot not in self._busy]
        for slot in idle:
            if self._owners[slot]() is session:
                return slot
        ownerless = [slot for slot in idle if self._owners[slot]() is None]
        if ownerless and ids is not None:
            return max(ownerless, key=lambda slot: common_prefix(self._cached_ids.get(slot, _NO_IDS), ids))
        if ownerless or not idle:
            return next(iter(ownerless), None)
        shortest = min(idle, key=self._length)
        limit = max(_SHORT, 2 * min(map(self._length, self._owners)))
        return shortest if self._length(shortest) <= limit else None

    def _length(self, slot: int) -> int:
        """Return how many tokens the owner of a slot would have to prefill again."""
        owner = self._owners[slot]()
        return 0 if owner is None else owner.num_cached
