"""The sequences of a pass attend in few calls as each does by itself, and kernels for GPUs get what they ask for."""

from __future__ import annotations

import errno
import inspect
import mmap
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_transformers_engine import build, load

from mixlm.engines.contract import assert_close, random_ids, uncached
from mixlm.engines.requests import LogitsRequest
from mixlm.engines.transformers import load_trial
from mixlm.engines.transformers.attention import AttentionForm, Lengths, VarlenKernel
from mixlm.engines.transformers.kv_cache import KVBufferPool, KVCache
from mixlm.engines.transformers.packed_sequences import PackedSequences
from mixlm.engines.transformers.runner import _BUFFERS_PER_SLAB

HEADS, GROUPS, SIZE, LAYERS = 2, 3, 8, 2


def reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: Lengths, form: AttentionForm
) -> torch.Tensor:
    """Attention sequence by sequence and head by head, as `VarlenKernel` says."""
    out = torch.empty(query.shape[0], query.shape[1], values.shape[2])
    ends = zip(*(each.tolist() for each in lengths[:2]), strict=True)
    (q0, k0), *ends = ends
    for q1, k1 in ends:
        for row in range(q0, q1):
            last = k1 - (q1 - row) + 1
            first = k0 if form.window is None else max(k0, last - form.window)
            for head in range(query.shape[1]):
                shared = head * keys.shape[1] // query.shape[1]
                scores = keys[first:last, shared] @ query[row, head] * (form.scale or query.shape[2] ** -0.5)
                if form.softcap is not None:
                    scores = form.softcap * torch.tanh(scores / form.softcap)
                if form.sinks is not None:
                    scores = torch.cat([scores, form.sinks[head : head + 1]])
                out[row, head] = scores.softmax(0)[: last - first] @ values[first:last, shared]
        q0, k0 = q1, k1
    return out


FORMS = {
    "plain": AttentionForm(),
    "window": AttentionForm(window=7, scale=0.3),
    "softcap": AttentionForm(softcap=2.0),
    "sinks": AttentionForm(window=30, sinks=torch.linspace(-1, 1, HEADS * GROUPS)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_sequences_attend_together_as_each_does_by_itself(name, monkeypatch):
    form, rng, calls = FORMS[name], np.random.default_rng(1), []
    attend = AttentionForm.attend
    monkeypatch.setattr(AttentionForm, "attend", lambda *arguments: calls.append(1) or attend(*arguments))
    torch.manual_seed(0)
    pool = KVBufferPool(slots=4)
    caches = [KVCache(pool) for _ in range(6)]
    texts = [torch.zeros(2, LAYERS, 0, HEADS, SIZE) for _ in caches]  # keys and values of each
    fewer = 0
    for turn in range(12):
        chosen = rng.permutation(6)[: rng.integers(2, 7)].tolist()
        if turn % 3 == 2:  # one rolls back, another begins anew in a slot that was used
            length = texts[chosen[0]].shape[2] // 2
            caches[chosen[0]].truncate(length)
            texts[chosen[0]] = texts[chosen[0]][:, :, :length]
            caches[chosen[1]] = KVCache(pool)
            texts[chosen[1]] = texts[chosen[1]][:, :, :0]
        counts = rng.choice([1, 1, 1, 2, 5, 20], len(chosen)).tolist()
        new = torch.randn(2, LAYERS, sum(counts), HEADS, SIZE)
        for index, part in zip(chosen, new.split(counts, dim=2), strict=True):
            texts[index] = torch.cat([texts[index], part], dim=2)
        batch = PackedSequences([caches[index] for index in chosen], counts)
        lengths = [texts[index].shape[2] for index in chosen]
        ends = Lengths(*(torch.tensor(np.cumsum([0, *each])) for each in (counts, lengths)), max(counts), max(lengths))
        before = len(calls)
        for layer in range(LAYERS):
            query = torch.randn(sum(counts), HEADS * GROUPS, SIZE)
            key, value = new[:, layer]
            actual = batch.attend(layer, tuple(x.transpose(0, 1)[None] for x in (query, key, value)), form)[0]
            keys, values = (torch.cat([texts[index][i, layer] for index in chosen]) for i in (0, 1))
            torch.testing.assert_close(actual, reference(query, keys, values, ends, form))
        batch.commit()
        fewer += len(calls) - before < LAYERS * len(chosen)
    assert fewer > 6


def test_lengths_that_differ_much_and_long_parts_do_not_attend_together(monkeypatch):
    attended = []
    attend = AttentionForm.attend

    def noted(self, query, keys, *rest):
        attended.append(tuple(keys.shape[::2]))
        return attend(self, query, keys, *rest)

    monkeypatch.setattr(AttentionForm, "attend", noted)
    pool, counts = KVBufferPool(slots=8), [1, 1, 1, 1, 40, 1, 2]
    caches = [KVCache(pool) for _ in counts]
    for cache, length in zip(caches, [100, 120, 3000, 3100, 3000, 3000, 2000], strict=True):
        cache.reserve(1)
        cache.length = length
    token = torch.ones(1, HEADS, sum(counts), 64)  # a call takes as long as 512 keys
    PackedSequences(caches, counts).attend(0, (token, token, token), AttentionForm())
    assert sorted(attended) == [(1, 2002), (1, 3001), (1, 3040), (2, 121), (2, 3101)]


def test_where_there_are_no_addresses_for_more_buffers_each_is_for_itself(tmp_path, monkeypatch):
    engine = load(build(tmp_path / "m", "llama"))
    first = [engine.session() for _ in range(_BUFFERS_PER_SLAB)]  # the slab is full
    for session in first:
        session.logits(random_ids(engine, 5))
    reserve, calls = mmap.mmap, []

    def limited(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:  # for the second layer of the second slab
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return reserve(*arguments, **options)

    monkeypatch.setattr(mmap, "mmap", limited)
    assert_batches_are_right(engine)
    assert len(calls) == 4
    ids = random_ids(engine, 8)  # those of the first slab go on
    assert_close(first[3].logits(ids), uncached(engine, ids))
    assert first[3].stats.forwards[-1].cached == 5


def assert_batches_are_right(engine):
    """Three texts of unequal lengths, read in two batches, give what each gives alone and uncached."""
    texts = [random_ids(engine, length, length) for length in (9, 30, 17)]
    sessions = [engine.session() for _ in texts]
    for cut in (4, 0):
        requests = [
            (session, LogitsRequest(0, ids[: len(ids) - cut])) for session, ids in zip(sessions, texts, strict=True)
        ]
        for (_, request), rows in zip(requests, engine.respond(requests), strict=True):
            assert_close(rows, uncached(engine, request.ids))


def wrong(query, keys, values, lengths, form):
    return reference(query, keys, values, lengths, form._replace(window=2))


def fails(*_):
    raise NotImplementedError("not on this device")


@pytest.mark.slow
def test_a_kernel_for_several_sequences_is_used_where_it_is_right(tmp_path, monkeypatch):
    kernels = [VarlenKernel("absent", fails), VarlenKernel("wrong", wrong), VarlenKernel("right", reference)]
    folder = build(tmp_path / "m", "mistral")
    for installed, used in ((kernels, "right"), (kernels[:2], None)):
        monkeypatch.setattr(load_trial, "varlen_kernels", lambda _, installed=installed: installed)
        engine = load(folder)
        assert engine.runner.batches
        assert engine.details.get("attention of batches") == used
        assert_batches_are_right(engine)


@pytest.mark.parametrize("name", ["torch.nn.attention.varlen", "flash_attn"])
def test_kernels_get_what_they_ask_for(name, monkeypatch):
    """Against functions with the signatures of the libraries."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.signature(varlen.varlen_attn)

    def of_torch(*arguments, **options):
        call = signature.bind(*arguments, **options).arguments
        assert call["enable_gqa"]
        return by_lengths(call, call["scale"], call["window_size"], None)

    def of_flash_attn(*arguments, softmax_scale, causal, window_size, softcap):
        assert causal
        names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
        return by_lengths(dict(zip(names, arguments, strict=True)), softmax_scale, window_size, softcap)

    def by_lengths(call, scale, window, softcap):
        assert (call["max_q"], call["max_k"], call["cu_seq_q"].dtype) == (3, 9, torch.int32)
        assert window[1] == 0
        form = AttentionForm(None if window[0] < 0 else window[0] + 1, scale, softcap or None)
        return reference(*(call[part] for part in ("query", "key", "value")), lengths, form)

    monkeypatch.setattr(varlen, "varlen_attn", of_torch)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=of_flash_attn, __spec__=1))
    lengths = Lengths(torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([0, 9, 14], dtype=torch.int32), 3, 9)
    query, keys, values = (torch.randn(n, heads, SIZE) for n, heads in ((4, HEADS * GROUPS), (14, HEADS), (14, HEADS)))
    kernel = next(kernel for kernel in load_trial.varlen_kernels(torch.device("cuda")) if kernel.name == name)
    for form in (FORMS["plain"], FORMS["window"], FORMS["softcap"], FORMS["sinks"]):
        if form.sinks is not None or (form.softcap is not None and name != "flash_attn"):
            with pytest.raises(NotImplementedError):
                kernel.attend(query, keys, values, lengths, form)
        else:
            expected = reference(query, keys, values, lengths, form)
            torch.testing.assert_close(kernel.attend(query, keys, values, lengths, form), expected)


def test_there_is_no_such_kernel_for_a_cpu():
    assert load_trial.varlen_kernels(torch.device("cpu")) == []
