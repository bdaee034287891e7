"""Places for sequences in llama.cpp: each keeps the cache of what was run in it last."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from mixlm.engines.base import Session, common_prefix
from mixlm.types import Ids


class Slots:
    """Which session holds which slot. The session that has rested longest gives way when there are too few."""

    def __init__(self, count: int) -> None:
        self._owners: OrderedDict[int, weakref.ref[Session] | None] = OrderedDict.fromkeys(range(count))
        self._busy: set[int] = set()
        self._left: dict[int, Ids] = {}
        self._changed = threading.Condition()

    @contextmanager
    def held(self, session: Session) -> Iterator[tuple[int, bool]]:
        """Give a session a slot while it runs, its own where it has one. Also tells whether it had it already."""
        with self._changed:
            while (found := self.take(session)) is None:
                self._changed.wait()
        try:
            yield found
        finally:
            self.free(found[0])

    def take(self, session: Session, ids: Ids | None = None) -> tuple[int, bool] | None:
        """Give a session a slot until it is freed, as `held` does; None while all are busy.

        ids: what it will run. Of slots that no session holds, it then gets the one where most of that was run before.
        """
        with self._changed:
            slot = self._choose(session, ids)
            if slot is None:
                return None
            kept = self._owner(slot) is session
            self._owners[slot] = weakref.ref(session)
            self._owners.move_to_end(slot)
            self._busy.add(slot)
            if ids is not None:
                self._left[slot] = ids.copy()
            return slot, kept

    def free(self, slot: int) -> None:
        """Let a slot be used again; its session still holds it."""
        with self._changed:
            self._busy.discard(slot)
            self._changed.notify_all()

    def _choose(self, session: Session, ids: Ids | None) -> int | None:
        """Return its own slot, else a free one, else the one that has rested longest; None while all are busy."""
        idle = [slot for slot in self._owners if slot not in self._busy]
        for slot in idle:
            if self._owner(slot) is session:
                return slot
        ownerless = [slot for slot in idle if self._owner(slot) is None]
        if ownerless and ids is not None:
            return max(ownerless, key=lambda slot: common_prefix(self._left.get(slot, _NOTHING), ids))
        return next(iter(ownerless or idle), None)

    def _owner(self, slot: int) -> Session | None:
        held = self._owners[slot]
        return None if held is None else held()


_NOTHING = np.zeros(0, dtype=np.int64)
