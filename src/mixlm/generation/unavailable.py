"""Members that stopped answering during a generation: excluded, their weight given to the others, and retried later.

Without a member, the target distribution is the others' average, renormalised. That is done only where the user chose
it, and usage reports at how many positions.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from mixlm.engines.base import Engine
from mixlm.errors import EngineError
from mixlm.generation.member import Member
from mixlm.generation.sequence import without
from mixlm.types import Floats

_log = logging.getLogger("mixlm")
_FIRST_WAIT, _MAX_WAIT = 0.5, 30.0  # seconds
_lock = threading.Lock()
_checks: dict[int, Future[bool]] = {}  # those in progress, by `batch_key` of the engine


def check_alive(engine: Engine) -> Future[bool]:
    """Return the check, in a thread, of whether an engine can serve requests again: that in progress, or a new one."""
    with _lock:
        if engine.batch_key not in _checks:
            check: Future[bool] = Future()
            threading.Thread(target=_check, args=(engine, check), name="mixlm-alive", daemon=True).start()
            _checks[engine.batch_key] = check
        return _checks[engine.batch_key]


def _check(engine: Engine, check: Future[bool]) -> None:
    try:
        check.set_result(engine.alive())
    except Exception as error:
        check.set_exception(error)
    finally:
        with _lock:
            del _checks[engine.batch_key]


class UnavailableMembers:
    """The members of one sequence that do not answer; a container of their indices.

    positions: by member, the symbols that were written without it.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self._checks: dict[int, Future[bool]] = {}
        self._waits: dict[int, float] = {}
        self._retry_times: dict[int, float] = {}
        self.positions = [0] * len(members)

    def __contains__(self, member: object) -> bool:
        return member in self._retry_times

    def exclude(self, member: int, error: EngineError) -> None:
        """Exclude a member until it responds again. It is retried after ever longer times."""
        self._wait(member)
        _log.warning("%s is excluded from a generation: %s", self._members[member].name, error.message)

    def retry(self) -> None:
        """Take back members that answer again; called between positions.

        Whether one does is found out meanwhile, once for all sequences that ask at the same time.
        """
        now = time.monotonic()
        for member in [member for member, due in self._retry_times.items() if now >= due]:
            check = self._checks.get(member) or check_alive(self._members[member].engine)
            if not check.done():
                self._checks[member] = check
                continue
            self._checks.pop(member, None)
            if check.result():
                del self._retry_times[member]
                _log.warning("%s responds again", self._members[member].name)
            else:
                self._wait(member)

    def _wait(self, member: int) -> None:
        self._waits[member] = min(2 * self._waits.get(member, _FIRST_WAIT / 2), _MAX_WAIT)
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
        remaining = without(weights, [*self._retry_times])
        if remaining is None:
            raise EngineError("every member that has weight here has stopped answering", "check their servers")
        return remaining
