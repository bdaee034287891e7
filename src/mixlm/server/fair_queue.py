"""Who is next. Replies wait in a line of their client's, and clients take turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Line(Generic[Item]):
    """Items by client. A client that asks for much waits for itself, and the others do not wait for it."""

    def __init__(self) -> None:
        self._clients: dict[str, deque[Item]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def push(self, client: str, item: Item) -> None:
        """Put an item at the end of its client's line."""
        self._clients.setdefault(client, deque()).append(item)

    def pop(self) -> Item:
        """Take the next item. Its client's turn comes again behind the others'. Raises IndexError when none waits."""
        if not self._clients:
            raise IndexError("nothing waits")
        client = next(iter(self._clients))
        items = self._clients.pop(client)
        item = items.popleft()
        if items:
            self._clients[client] = items
        return item

    def remove(self, unwanted: Callable[[Item], bool]) -> None:
        """Take out items."""
        for client, items in list(self._clients.items()):
            kept = deque(one for one in items if not unwanted(one))
            if kept:
                self._clients[client] = kept
            else:
                del self._clients[client]
