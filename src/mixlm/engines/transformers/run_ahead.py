"""Forward passes that run before they are requested, on tokens that the device samples itself.

The coins of later positions are numbers known beforehand, and so is the noise of each position. Where they fall on one
member, its device can sample a token from the logits that it has just computed, run that token, and so on, without
waiting for the host: each pass starts while the one before it runs, and its logits are transferred in the background.

The host samples every token again, and its sample is the one that counts: the device's logarithms may round otherwise,
and the text may be encoded otherwise, end or be rolled back. A row that ran ahead is a response to the ids that it ran
on and to no others. Where it is dropped, its keys and values lie beyond the KV cache's length and are overwritten.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from mixlm.engines.requests import RunAheadHint
from mixlm.engines.transformers.cuda_graphs import CudaGraphRunner
from mixlm.engines.transformers.device_topk import DeviceTopK, from_device
from mixlm.engines.transformers.kv_cache import KVCache
from mixlm.types import Candidates, Ids, Sampling, TopKFilter

# Passes that wait for their requests: while one runs, the next is queued behind it and the host samples from the one
# before. More would hide no more latency, and a wrong token would waste as many passes.
DEPTH = 2


def _as_int64(number: int) -> int:
    """Return the signed integer with the 64 bits of a number, as torch has them."""
    return number - (1 << 64) if number >> 63 else number


_GOLDEN, _FIRST, _SECOND = map(_as_int64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class DeviceSampler:
    """Samples on the device what the host will sample. Hashes of symbols live as long as their filters."""

    def __init__(self, top_k: DeviceTopK) -> None:
        self.top_k = top_k
        self._hashes: WeakKeyDictionary[TopKFilter, tuple[Ids, torch.Tensor]] = WeakKeyDictionary()

    def sample(self, row: torch.Tensor, top_k_filter: TopKFilter, hint: RunAheadHint, key: int) -> torch.Tensor:
        """Return the id that the host will probably sample, int64 (1,), without waiting for the device.

        Ids that share their symbol are not pooled, which hardly ever matters.
        row: of `DeviceTopK.select` with the filter, (2, count). key: of the position's noise.
        """
        cached = self._hashes.get(top_k_filter)
        if cached is None or cached[0] is not hint.symbols:
            hashes = (torch.from_numpy(hint.symbols) + 1) * _GOLDEN
            cached = self._hashes[top_k_filter] = hint.symbols, hashes.to(row.device)
        ids, scores = truncate_sorted(row[0].view(torch.float32), row[1].long(), top_k_filter.k, hint.sampling)
        return ids[torch.argmax(scores + gumbel(cached[1][ids], key), 0, keepdim=True)]


def truncate_sorted(
    values: torch.Tensor, ids: torch.Tensor, k: int, options: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply temperature and truncation to the largest logits of a row, as `core.sampling` does on the host.

    values: logits in falling order, (count,) with count >= k. ids: whose they are. Returns ids, and logits over the
    temperature, float64, -inf for what the options exclude.
    """
    if options.top_p < 1:
        # Where the mass ends among equal logits, the smaller ids are in: so they are sorted on the host.
        ids, order = ids.sort()
        values, order = values[order].sort(descending=True, stable=True)
        ids = ids[order]
    x = values.double()
    x.masked_fill_(x < x[k - 1], -torch.inf)
    if options.temperature != 1:
        x /= options.temperature
    if options.top_p < 1:
        mass = x.softmax(0).cumsum(0)
        x[1:].masked_fill_(mass[:-1] >= options.top_p, -torch.inf)
    if options.min_p > 0:
        x.masked_fill_(x < x[0] + float(np.log(options.min_p)), -torch.inf)
    return ids, x


def gumbel(hashes: torch.Tensor, key: int) -> torch.Tensor:
    """Return the Gumbel noise of `Noise` for a sample key, float64. hashes: (symbol + 1) · golden, int64.

    One number in 2**54 is infinite, where the host takes the largest below that.
    """
    # int64 wraps as uint64 does; its right shifts copy the sign bit, which the masks remove.
    x = hashes + _as_int64(key)
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _FIRST
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _SECOND
    x = (x ^ (x >> 31 & (1 << 33) - 1)) >> 11 & (1 << 53) - 1
    u = x.double().add_(0.5).mul_(2.0**-53)
    return u.log_().neg_().log_().neg_()


class _PendingRow(NamedTuple):
    """A row on its way to the host. token: int64 (1,), what the pass ran on. done: CUDA event of both transfers."""

    token: torch.Tensor
    row: torch.Tensor
    done: Any


class RunAhead:
    """The passes of one sequence that have not been requested yet: `len()` of them.

    cache: the sequence's; its length counts what was requested. top_k_filter: of all its rows. max_tokens: that the
    sequence may have.
    """

    def __init__(
        self, graphs: CudaGraphRunner, sampler: DeviceSampler, cache: KVCache, top_k_filter: TopKFilter, max_tokens: int
    ) -> None:
        self.top_k_filter = top_k_filter
        self._graphs, self._sampler, self._cache, self._max_tokens = graphs, sampler, cache, max_tokens
        self._pending: deque[_PendingRow] = deque()
        self._last_row: torch.Tensor | None = None  # on the device

    def __len__(self) -> int:
        return len(self._pending)

    def start(self, logits: torch.Tensor, hint: RunAheadHint) -> Candidates | None:
        """Run ahead from the logits of the KV cache's last token, (1, vocab). Returns what is kept; None for a tie."""
        first = self._transfer(torch.zeros(1, dtype=torch.int64), logits)
        self._extend(hint, 0)
        return self._wait(first)

    def advance(self, token: int, hint: RunAheadHint | None) -> Candidates | None:
        """Return what the filter keeps of the logits after one more token, and run further ahead.

        None where another token ran, or where more of the row is needed. Then what is pending is worthless.
        """
        pending = self._pending[0]
        candidates = self._wait(pending)
        if candidates is None or int(pending.token[0]) != token:
            return None
        self._pending.popleft()
        self._cache.length += 1
        if hint is not None:
            self._extend(hint, len(self._pending))
        return candidates

    def _extend(self, hint: RunAheadHint, started: int) -> None:
        """Start the passes that are missing. The hint's first key samples the token after the cached ones."""
        buffer = self._cache.reserve(0)
        for length, key in enumerate(hint.keys[started:], self._cache.length + started):
            if length >= min(self._max_tokens, buffer.size):
                return
            assert self._last_row is not None
            token = self._sampler.sample(self._last_row, self.top_k_filter, hint, key)
            self._pending.append(self._transfer(token, self._graphs.run_token(buffer, token, length)))

    def _transfer(self, token: torch.Tensor, logits: torch.Tensor) -> _PendingRow:
        """Start the transfer of a token and its row, before the next pass overwrites the logits."""
        # Both are new tensors: the inputs and outputs of a pass may change before they are on the host.
        self._last_row = self._sampler.top_k.select(logits, self.top_k_filter, [0])[0]
        done: Any = None
        row = self._last_row.to("cpu", non_blocking=True)
        token = token.to("cpu", non_blocking=True)
        if logits.device.type == "cuda":
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(logits.device))
        return _PendingRow(token, row, done)

    def _wait(self, pending: _PendingRow) -> Candidates | None:
        if pending.done is not None:
            pending.done.synchronize()
        return from_device(pending.row.numpy(), self.top_k_filter)
