"""KV buffers of sequences that ended: which are kept, and how much memory they take."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from mixlm.engines.transformers import kv_cache
from mixlm.engines.transformers.kv_cache import KVBuffer, KVBufferPool, KVCache, KVSlab


def filled(pool: KVBufferPool, tokens: int) -> KVCache:
    cache = KVCache(pool)
    cache.append(0, torch.ones(2, tokens, 8), torch.ones(2, tokens, 8))
    cache.length = tokens
    return cache


def test_idle_buffers_are_kept_up_to_a_number_of_each_size_and_a_memory_of_all(monkeypatch):
    per_token = 2 * 2 * 8 * 4
    monkeypatch.setattr(kv_cache, "_MAX_IDLE_BYTES", 3 * 256 * per_token)
    pool = KVBufferPool(max_idle=2)
    buffers: list[KVBuffer] = [pool.acquire(tokens) for tokens in (200, 256, 100, 300, 1000)]
    for buffer in buffers:
        buffer.layer(0, torch.ones(2, 1, 8), torch.ones(2, 1, 8))
        pool.release(buffer)
    assert [buffer.nbytes // per_token for buffer in buffers] == [256, 256, 256, 512, 1024]
    assert {pool.acquire(256), pool.acquire(256)} == {buffers[0], buffers[1]}  # the third is one too many
    assert pool.acquire(512) is not buffers[3]  # nor is there memory for it
    pool.release(buffers[3])
    assert pool.acquire(400) is buffers[3]  # now that the others are taken


def test_a_cache_that_grows_keeps_what_it_holds_also_where_memory_runs_out(monkeypatch):
    pool = KVBufferPool(max_idle=1)
    cache = filled(pool, 250)
    first = cache.reserve(0)

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(KVSlab, "_zeros", fail)
        with pytest.raises(MemoryError):
            cache.reserve(300)
    assert cache.reserve(0) is first
    assert cache.reserve(300).size == 512
    assert bool((cache.reserve(0).layers[0][0][:, :250] == 1).all())


def test_buffers_side_by_side_are_taken_from_the_first_slot_on_and_go_together():
    pool = KVBufferPool(slots=3)
    caches = [filled(pool, 20) for _ in range(4)]
    slots = [(cache.reserve(0).slab, cache.reserve(0).slot) for cache in caches]
    first, second = slots[0][0], slots[3][0]
    assert slots == [(first, 0), (first, 1), (first, 2), (second, 0)]
    del caches[1]
    again = filled(pool, 5)  # in the slab that more sequences use
    buffer = again.reserve(0)
    assert (buffer.slab, buffer.slot) == (first, 1)
    assert bool((buffer.layers[0][0][:, 5:] == 0).all())  # nothing of who had it before
    slab = weakref.ref(second)
    del caches, second, slots
    assert slab() is None
    assert first.used == 1


def test_a_slot_that_could_not_be_filled_is_free_again(monkeypatch):
    pool = KVBufferPool(slots=2)
    cache = filled(pool, 20)
    monkeypatch.setattr(KVBuffer, "fill", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.reserve(5000)
    assert cache.reserve(0).size == 4096
    first, second = pool.acquire(5000), pool.acquire(5000)
    assert (first.slot, second.slot, first.slab) == (0, 1, second.slab)


def test_buffers_side_by_side_take_memory_as_they_are_written():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    pool, before = KVBufferPool(slots=16), resident()
    cache = KVCache(pool)
    for length in range(0, 4096, 512):
        cache.append(0, torch.ones(8, 512, 64), torch.ones(8, 512, 64))
        cache.length = length + 512
        if length == 0:
            buffer = cache.reserve(0)
    assert cache.reserve(4096) is buffer  # nothing was copied
    written = 2 * 8 * 4096 * 64 * 4
    assert buffer.slab.layers[0][0].nbytes * 2 == 16 * written
    assert resident() - before < 3 * written
    other = KVCache(pool)
    other.append(0, torch.ones(8, 3, 64), torch.ones(8, 3, 64))
    before = resident()
    del cache  # its memory goes, though another sequence uses the slab
    assert before - resident() > 0.8 * written
    assert not buffer.layers[0][0].any()
    assert bool((other.reserve(0).layers[0][1][:, :3] == 1).all())
