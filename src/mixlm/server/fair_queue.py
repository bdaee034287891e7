"""A queue in which clients take turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Round robin over clients, first in first out for each. A client with many items delays no other client."""

    def __init__(self) -> None:
        self._clients: dict[str, deque[Item]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def push(self, client: str, item: Item) -> None:
        """Append an item to its client's queue."""
        self._clients.setdefault(client, deque()).append(item)

    @property
    def clients(self) -> list[str]:
        """The clients that have items, in the order of their turns."""
        return list(self._clients)

    def push_first(self, client: str, item: Item) -> None:
        """Put an item in front of its client's others."""
        self._clients.setdefault(client, deque()).appendleft(item)

    def pop(self, client: str | None = None) -> Item:
        """Remove and return the next item; its client goes to the back. Raises IndexError when the queue is empty.

        client: whose item it is, whoever's turn it is.
        """
        if not self._clients:
            raise IndexError("the queue is empty")
        client = next(iter(self._clients)) if client is None else client
        items = self._clients.pop(client)
        item = items.popleft()
        if items:
            self._clients[client] = items
        return item

    def remove(self, predicate: Callable[[Item], bool]) -> None:
        """Remove every item for which the predicate holds."""
        for client, items in list(self._clients.items()):
            remaining = deque(item for item in items if not predicate(item))
            if remaining:
                self._clients[client] = remaining
            else:
                del self._clients[client]
