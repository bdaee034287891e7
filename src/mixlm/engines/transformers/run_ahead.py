"""Forwards that are run before they are asked for, on tokens that the device draws itself.

The next coins are numbers known beforehand, and so is the noise of each position. Where they fall on one member, its
device can draw a token from the logits that it has just computed, run that token, and so on, without waiting for the
host: each forward is started while the one before it runs. What is found for each position goes to the host by itself.

The host draws every token anew, and its draw is the one that counts: the device's logarithms may round otherwise, and
the text may be read otherwise, ended or taken back. A row that was run ahead is an answer to the ids that it was run on
and to no others. Where it is dropped, what it left in the cache lies behind the cache's length, and is written over.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from mixlm.core.rng import Noise
from mixlm.core.sampling import Transform
from mixlm.engines.base import RunAheadHint, Session
from mixlm.engines.batching import Part, Run
from mixlm.engines.transformers.cuda_graphs import CudaGraphRunner
from mixlm.engines.transformers.device_topk import DeviceTopK, applies, from_device
from mixlm.engines.transformers.kv_cache import KVCache
from mixlm.types import Candidates, Ids, Sampling, TopKFilter

# Forwards that wait for their questions: while one runs, the next one is queued behind it and the host draws from the
# one before. More would hide no more, and a guess in vain would cost as many.
DEPTH = 2
_TRIED = 6  # tokens


def _signed(number: int) -> int:
    """Return the 64 bits of a number as torch has them."""
    return number - (1 << 64) if number >> 63 else number


_GOLDEN, _FIRST, _SECOND = (_signed(one) for one in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class DeviceSampler:
    """Draws that repeat the host's where the logits are. What symbols are hashed from is kept as long as their cuts."""

    def __init__(self, largest: DeviceTopK) -> None:
        self.largest = largest
        self._starts: WeakKeyDictionary[TopKFilter, tuple[Ids, torch.Tensor]] = WeakKeyDictionary()

    def token(self, part: torch.Tensor, cut: TopKFilter, ahead: RunAheadHint, key: int) -> torch.Tensor:
        """Return the id that is probably drawn with a key, int64 (1,). part: `Largest.part` of a row, (2, count).

        Nothing in here waits for the device. Ids that share their symbol are not pooled, which hardly ever matters.
        """
        held = self._starts.get(cut)
        if held is None or held[0] is not ahead.symbols:
            starts = (torch.from_numpy(ahead.symbols) + 1) * _GOLDEN
            held = self._starts[cut] = ahead.symbols, starts.to(part.device)
        ids, logprobs = truncate_sorted(part[0].view(torch.float32), part[1].long(), cut.k, ahead.sampling)
        return ids[torch.argmax(logprobs + gumbel(held[1][ids], key), 0, keepdim=True)]


def truncate_sorted(
    values: torch.Tensor, ids: torch.Tensor, k: int, options: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids, and logits over the temperature, float64, -inf for what the options cut: `sampling._order`.

    values, ids: the largest logits of a row in falling order, and whose they are, (count,), count >= k.
    """
    if options.top_p < 1:
        # Where the mass ends among equal ones, those of the smaller ids are in: so they stand on the host.
        ids, at = ids.sort()
        values, at = values[at].sort(descending=True, stable=True)
        ids = ids[at]
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


def gumbel(starts: torch.Tensor, key: int) -> torch.Tensor:
    """Return `Noise.gumbel` of the draw of a key, float64. starts: of each symbol, (symbol + 1) · golden, int64.

    One number in 2**54 is infinite, where the host takes the largest below that.
    """
    # int64 wraps as uint64 does; its shifts to the right drag the sign along, which the masks take away.
    x = starts + _signed(key)
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _FIRST
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _SECOND
    x = (x ^ (x >> 31 & (1 << 33) - 1)) >> 11 & (1 << 53) - 1
    u = x.double().add_(0.5).mul_(2.0**-53)
    return u.log_().neg_().log_().neg_()


class _Row(NamedTuple):
    """What a forward found, on its way to the host. token: int64 (1,), what it ran on. done: when both are there."""

    token: torch.Tensor
    part: torch.Tensor
    done: Any


class RunAhead:
    """How far one sequence is ahead of its questions: forwards that nobody has asked for yet, len(lead) of them.

    cache: its length counts what was asked for. cut: of all its rows. most: tokens that the sequence may have.
    """

    def __init__(
        self, steps: CudaGraphRunner, draws: DeviceSampler, cache: KVCache, cut: TopKFilter, most: int
    ) -> None:
        self.cut = cut
        self._steps, self._draws, self._cache, self._most = steps, draws, cache, most
        self._rows: deque[_Row] = deque()
        self._latest: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._rows)

    @staticmethod
    def can(steps: CudaGraphRunner, cache: KVCache, cut: TopKFilter, size: int) -> bool:
        """Whether a sequence can go ahead behind its cache; its rows have `size` logits."""
        return applies(cut, size) and steps.fit(cache, 1)

    def begin(self, logits: torch.Tensor, ahead: RunAheadHint) -> Candidates | None:
        """Go on behind the logits of the cache's last token, (1, vocab); return what the cut leaves, None for a tie."""
        first = self._found(torch.zeros(1, dtype=torch.int64), logits)
        self._go_on(ahead, 0)
        return self._kept(first)

    def after(self, token: int, ahead: RunAheadHint | None) -> Candidates | None:
        """Return what the cut leaves of the logits behind the cache's tokens and one more, and go on.

        None where something else was run, or where more is needed. What waits is then worth nothing.
        """
        row = self._rows[0]
        found = self._kept(row)
        if found is None or int(row.token[0]) != token:
            return None
        self._rows.popleft()
        self._cache.length += 1
        if ahead is not None:
            self._go_on(ahead, len(self._rows))
        return found

    def _go_on(self, ahead: RunAheadHint, run: int) -> None:
        """Start what is not run yet, of which `run` is. The first key is of the draw behind the cache's last token."""
        room = self._cache.reserve(0)
        for further, key in enumerate(ahead.keys[run:], self._cache.length + run):
            if further >= min(self._most, room.size):
                return
            assert self._latest is not None
            token = self._draws.token(self._latest, self.cut, ahead, key)
            self._rows.append(self._found(token, self._steps.run_on(room, token, further)))

    def _found(self, token: torch.Tensor, logits: torch.Tensor) -> _Row:
        """Send what was found on its way, before the next forward writes over the logits."""
        # Both are new tensors: what a step is fed from, and what it finds, may change before they are on the host.
        self._latest = self._draws.largest.part(logits, self.cut, [0]).view(2, -1)
        done: Any = None
        host = self._latest.to("cpu", non_blocking=True)
        token = token.to("cpu", non_blocking=True)
        if logits.device.type == "cuda":
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(logits.device))
        return _Row(token, host, done)

    def _kept(self, row: _Row) -> Candidates | None:
        if row.done is not None:
            row.done.synchronize()
        return from_device(row.part.numpy(), self.cut)


def written(run: Run, session: Session, size: int) -> tuple[Ids, list[Candidates]]:
    """Write a few tokens as one run, to try it: the ids that were run, int64 (n,), and what was found behind each.

    run: what runs the session's parts. size: of the vocabulary. Raises ValueError for rows that come whole.
    """
    transform, noise = Transform(Sampling(top_k=4), np.zeros(0, dtype=np.int64)), Noise(0)
    ids, rows = np.zeros(1, dtype=np.int64), []
    symbols = np.arange(size)
    for at in range(_TRIED):
        keys = tuple(noise.at(further).sample_key for further in range(at, min(at + DEPTH, _TRIED - 1)))
        ahead = RunAheadHint(keys, transform.sampling, symbols) if keys else None
        [[row]] = run([Part(session, ids[-1:], 1, transform.top_k_filter, ahead)])
        if not isinstance(row, Candidates):
            raise ValueError("nothing is cut of this row")
        rows.append(row)
        law = transform(row)
        ids = np.append(ids, law.ids[noise.at(at).sample(*law)])
    return ids[:-1], rows
