"""KV caches of texts that ended, for sequences that begin with the same tokens.

A tree of segments (as in SGLang's RadixAttention, Zheng et al., 2024, arXiv 2312.07104): a node has some tokens with
their keys and values, and its children go on from there, so what texts have in common is kept once. What is loaded and
what is inserted is copied: a copy takes a fraction of a percent of the time that the tokens would take to run, and no
sequence can change another's. The least recently used ends of the tree go first when the memory is spent.

A tree belongs to one adapter of one model, and to one regime of position frequencies: nothing else tells equal tokens
apart. The state of a recurrent layer is that of one length, so there a text is taken up to the end of a node.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, TypeAlias

import torch

from mixlm.engines.base import common_prefix
from mixlm.engines.transformers.kv_cache import KVCache, Segment
from mixlm.errors import is_memory_error
from mixlm.types import Ids

if TYPE_CHECKING:
    from mixlm.engines.transformers.snapshot_cache import SnapshotCache

    SequenceCache: TypeAlias = KVCache | SnapshotCache  # what a sequence keeps between its forward passes

MIN_TOKENS = 16  # fewer are neither kept by themselves nor looked for


@dataclass(eq=False)
class _Node:
    """Some tokens after those of its parent. used: when it was last loaded or inserted, as a number that rises."""

    ids: Ids
    segment: Segment
    parent: _Node | None = None
    used: int = 0
    children: dict[int, _Node] = field(default_factory=dict)  # by their first token


class PrefixCache:
    """The texts that are kept for the sequences of one model. max_bytes: of their keys, values and states."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._roots: dict[Hashable, _Node] = {}
        self._clock = count()
        self._lock = threading.Lock()

    def match(self, key: Hashable, ids: Ids, *, has_state: bool) -> int:
        """Return how many tokens `load` would find of `ids`. key: of the tree; has_state: as of the cache."""
        with self._lock:
            return sum(part for _, part in self._path(key, ids, has_state))

    def load(self, key: Hashable, ids: Ids, cache: SequenceCache, least: int = 1) -> int:
        """Fill a new cache with the longest prefix of `ids` that is kept, if that has `least` tokens.

        Returns its length. Where it is 0, the cache is of no use: memory may have run out while it was filled.
        """
        with self._lock:
            path = self._path(key, ids, cache.has_state)
            length = sum(part for _, part in path)
            if length < least:
                return 0
            self._use(path)
            try:
                with torch.inference_mode():
                    cache.load([node.segment.cut(0, part) for node, part in path], length)
            except Exception as error:
                if not is_memory_error(error):
                    raise
                self._clear()
                return 0
            return length

    def insert(self, key: Hashable, ids: Ids, cache: SequenceCache, *, wait: bool = True) -> None:
        """Keep a text, the first tokens of a cache: what is not kept of it yet is copied from there.

        wait: for other threads that use the tree; else nothing is kept while one does.
        """
        if not self._lock.acquire(blocking=wait):
            return
        try:
            with torch.inference_mode():
                self._insert(key, ids, cache)
        except Exception as error:
            if not is_memory_error(error):
                raise
            self._clear()
        finally:
            self._lock.release()

    def clear(self) -> bool:
        """Forget all texts. Returns whether there were any."""
        with self._lock:
            return self._clear()

    def _clear(self) -> bool:
        had_any, self.nbytes = self.nbytes > 0, 0
        self._roots.clear()
        return had_any

    def _path(self, key: Hashable, ids: Ids, has_state: bool) -> list[tuple[_Node, int]]:
        """Return the nodes of the longest prefix that is kept, each with how many of its tokens belong to it."""
        path = self._walk(key, ids)
        while has_state and path and (path[-1][0].segment.state is None or path[-1][1] < len(path[-1][0].ids)):
            path.pop()
        return path

    def _walk(self, key: Hashable, ids: Ids) -> list[tuple[_Node, int]]:
        path: list[tuple[_Node, int]] = []
        node, done = self._roots.get(key), 0
        while node is not None and done < len(ids):
            node = node.children.get(int(ids[done]))
            if node is None:
                break
            part = common_prefix(node.ids, ids[done:])
            path.append((node, part))
            done += part
            if part < len(node.ids):
                break
        return path

    def _use(self, path: list[tuple[_Node, int]]) -> int:
        """Note that nodes are used now. Returns the time of it."""
        now = next(self._clock)
        for node, _ in path:
            node.used = now
        return now

    def _insert(self, key: Hashable, ids: Ids, cache: SequenceCache) -> None:
        path = self._walk(key, ids)
        now, done = self._use(path), sum(part for _, part in path)
        if done < len(ids):
            if len(ids) - done < MIN_TOKENS:
                return
            parent = (
                self._split(*path[-1]) if path else self._roots.setdefault(key, _Node(ids[:0].copy(), Segment(0, {})))
            )
            segment = cache.copy_segment(done, len(ids))
            if segment.nbytes > self.max_bytes:
                return
            parent.children[int(ids[done])] = _Node(ids[done:].copy(), segment, parent, now)
            self.nbytes += segment.nbytes
        elif cache.has_state:
            node = self._split(*path[-1])
            if node.segment.state is None:
                end = cache.copy_segment(done, done)
                node.segment = node.segment._replace(state=end.state, state_bytes=end.state_bytes)
                self.nbytes += end.state_bytes
        self._evict()

    def _split(self, node: _Node, part: int) -> _Node:
        """Divide a node after its first tokens. Returns the node of these: itself where there is nothing to divide."""
        if part == len(node.ids):
            return node
        assert node.parent is not None
        segment, ids = node.segment, node.ids
        head = _Node(ids[:part].copy(), segment.cut(0, part).copy(), node.parent, node.used)
        node.parent.children[int(ids[0])] = head
        node.ids, node.parent, node.segment = ids[part:].copy(), head, segment.cut(part, len(ids)).copy()
        head.children[int(ids[part])] = node
        return head

    def _evict(self) -> None:
        """Forget the least recently used ends of texts until the memory is enough."""
        while self.nbytes > self.max_bytes:
            leaves = (leaf for root in self._roots.values() for leaf in _leaf_nodes(root))
            node = min(leaves, key=lambda leaf: leaf.used)
            assert node.parent is not None
            del node.parent.children[int(node.ids[0])]
            self.nbytes -= node.segment.nbytes


def _leaf_nodes(node: _Node) -> Iterator[_Node]:
    nodes = list(node.children.values())
    while nodes:
        child = nodes.pop()
        if child.children:
            nodes += child.children.values()
        else:
            yield child
