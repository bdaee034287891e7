"""KV buffers of sequences that ended: which are kept, and how much memory they take."""

from __future__ import annotations

import pytest
import torch

from mixlm.engines.transformers.kv_cache import KVBuffer, KVBufferPool, KVCache


def filled(pool: KVBufferPool, tokens: int) -> KVCache:
    cache = KVCache(pool)
    cache.append(0, torch.ones(2, tokens, 8), torch.ones(2, tokens, 8))
    cache.length = tokens
    return cache


def test_idle_buffers_are_kept_up_to_a_number_of_each_size_and_a_memory_of_all():
    per_token = 2 * 2 * 8 * 4
    pool = KVBufferPool(max_idle=2, max_idle_bytes=3 * 256 * per_token)
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
        patched.setattr(KVBuffer, "_zeros", fail)
        with pytest.raises(MemoryError):
            cache.reserve(300)
    assert cache.reserve(0) is first
    assert cache.reserve(300).size == 512
    assert bool((cache.reserve(0).layers[0][0][:, :250] == 1).all())
