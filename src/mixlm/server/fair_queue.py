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

    @property
    def clients(self) -> list[str]:
        """The clients that have items, in the order of their turns."""
        return list(self._clients)

    def push(self, client: str, item: Item, *, first: bool = False) -> None:
        """Append an item to its client's queue, or put it in front of the client's others."""
        items = self._clients.setdefault(client, deque())
        (items.appendleft if first else items.append)(item)

    def pop(self, client: str | None = None) -> Item:
        """Remove and return the next item, of this client if one is given; its client goes to the back."""
        client = next(iter(self._clients)) if client is None else client
        items = self._clients.pop(client)
        item = items.popleft()
        if items:
            self._clients[client] = items
        return item

    def remove(self, predicate: Callable[[Item], bool]) -> None:
        """Remove every item for which the predicate holds."""
        kept = {client: deque(item for item in items if not predicate(item)) for client, items in self._clients.items()}
        self._clients = {client: items for client, items in kept.items() if items}
