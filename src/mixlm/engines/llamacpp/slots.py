"""Slots of llama.cpp: each keeps the KV cache of the sequence that ran in it last."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from mixlm.engines.base import Session, common_prefix
from mixlm.types import Ids

_NO_IDS = np.zeros(0, dtype=np.int64)


class Slots:
    """Assigns slots to sessions; where there are too few, the least recently used session loses its slot."""

    def __init__(self, count: int) -> None:
        self._owners: OrderedDict[int, weakref.ref[Session] | None] = OrderedDict.fromkeys(range(count))
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
            is_own = self._owner(slot) is session
            self._owners[slot] = weakref.ref(session)
            self._owners.move_to_end(slot)
            self._busy.add(slot)
            if ids is not None:
                self._cached_ids[slot] = ids.copy()
            return slot, is_own

    def release(self, slot: int) -> None:
        """Let a slot be used again; its session still owns it."""
        with self._changed:
            self._busy.discard(slot)
            self._changed.notify_all()

    def _choose(self, session: Session, ids: Ids | None) -> int | None:
        """Return the session's own slot, else one without an owner, else the least recently used that is not busy."""
        idle = [slot for slot in self._owners if slot not in self._busy]
        for slot in idle:
            if self._owner(slot) is session:
                return slot
        ownerless = [slot for slot in idle if self._owner(slot) is None]
        if ownerless and ids is not None:
            return max(ownerless, key=lambda slot: common_prefix(self._cached_ids.get(slot, _NO_IDS), ids))
        return next(iter(ownerless or idle), None)

    def _owner(self, slot: int) -> Session | None:
        reference = self._owners[slot]
        return None if reference is None else reference()
