"""One sequence on a transformers model: what its cache keeps when the text is rolled back."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import numpy as np

from mixlm.engines.base import Session, common_prefix
from mixlm.engines.batching import SequenceInput
from mixlm.engines.requests import Forward
from mixlm.engines.transformers.prefix_cache import MIN_TOKENS
from mixlm.types import Floats, Ids, Logits

if TYPE_CHECKING:
    from mixlm.engines.transformers.run_ahead import RunAhead
    from mixlm.engines.transformers.runner import ModelRunner


class HFSession(Session):
    """One sequence. The KV cache keeps every position, also where the model attends to a window: text may roll back."""

    def __init__(self, runner: ModelRunner, context_length: int) -> None:
        super().__init__(context_length)
        self._runner = runner
        self.keeps_cache = runner.keeps_cache
        self.run_ahead: RunAhead | None = None
        self._regime: Hashable = None  # of the cache
        self.cache: Any = runner.new_cache()  # a `SequenceCache`: `KVCache` where sequences are packed

    @property
    def has_run_ahead(self) -> bool:
        """Whether forward passes ran that have not been requested yet."""
        return bool(self.run_ahead)

    def length_with(self, ids: Ids) -> int:
        """Return how many tokens it has once `ids` have run."""
        return int(self.cache.length) + len(ids)

    def drop_run_ahead(self) -> None:
        """Drop what ran ahead."""
        self.stats.wasted += len(self.run_ahead or ())
        self.run_ahead = None

    def cached_tokens(self, ids: Ids, last: int = 1) -> int:
        """Return how many tokens of `ids` are in its KV cache, or in those that other sequences left."""
        regime, cached = self._runner.regime(len(ids)), 0
        if regime == self._regime:
            cached = int(self.cache.nearest(super().cached_tokens(ids, last)))
        prefixes = self._runner.prefixes
        if prefixes is not None and len(ids) - last - cached >= MIN_TOKENS:
            wanted = ids[: len(ids) - last]
            shared = prefixes.match((self._runner.adapter, regime), wanted, has_state=self.cache.has_state)
            cached = shared if shared - cached >= MIN_TOKENS else cached
        return 0 if self._runner.begins_anew(cached, len(ids)) else cached

    def can_chunk(self, ids: Ids) -> bool:
        """Whether a prefix can be prefilled first; with frequencies that depend on the length, only a whole text."""
        return self._runner.chunks and self._runner.frequencies is None

    def rollback(self, ids: Ids, last: int = 1) -> int | None:
        """Cut the KV cache as `Session.rollback` does; all of it where the position frequencies are others."""
        if (regime := self._runner.regime(len(ids))) != self._regime:
            self.reset()
            self._regime = regime
        self._load_prefix(ids, last)
        cached = super().rollback(ids, last)
        if cached and self._runner.begins_anew(cached, len(ids)):
            self.reset()
            return 0
        return cached

    def _load_prefix(self, ids: Ids, last: int) -> None:
        """Take what other sequences left of a text, where that is enough more than this one has."""
        prefixes = self._runner.prefixes
        if prefixes is None or not 1 <= last <= len(ids) <= self.context_length:
            return
        wanted = ids[: len(ids) - last]
        cached = int(self.cache.nearest(common_prefix(self._cached.ids, wanted)))
        if len(wanted) - cached < MIN_TOKENS:
            return

        def is_worthwhile(length: int) -> bool:
            return length - cached >= MIN_TOKENS and not self._runner.begins_anew(length, len(ids))

        cache = self._runner.new_cache()
        # A forward pass that runs out of memory in another thread frees some and tries again: it needs that itself.
        with self._runner.loaded.lock:
            length = prefixes.load((self._runner.adapter, self._regime), wanted, cache, is_worthwhile)
        if length:
            self.reset()
            self.cache = cache
            self._cached.replace_tail(0, wanted[:length])
            self.stats.cached_tokens += length - cached

    def record(self, ids: Ids, logits: Logits | None, forward: Forward) -> None:
        """Record a forward pass; what a long one has run is kept for other sequences at once."""
        super().record(ids, logits, forward)
        if forward.tokens >= MIN_TOKENS:
            self._insert_prefix()

    def close(self) -> None:
        """Free the KV cache; what it has run is kept for others."""
        self._insert_prefix()
        self.reset()

    def __del__(self) -> None:
        # Whoever collects garbage may be using the texts that are kept: it must not wait for itself.
        # At the end of the process the names of a module may be gone before its objects.
        if sys is None or sys.is_finalizing() or not hasattr(self, "cache"):
            return
        import torch

        # A CUDA graph must not record the copies of a collected session.
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            self._insert_prefix(wait=False)

    def _insert_prefix(self, *, wait: bool = True) -> None:
        prefixes, cache = self._runner.prefixes, self.cache
        if prefixes is not None:
            for length in cache.lengths():
                if 0 < length <= self.num_cached:
                    prefixes.insert((self._runner.adapter, self._regime), self._cached.ids[:length], cache, wait=wait)

    def logits(self, ids: Ids, last: int = 1) -> Logits:
        """Return the logits after each of the last prefixes, those of each regime of frequencies by themselves."""
        frequencies = self._runner.frequencies
        if frequencies is None or not 1 <= last <= len(ids):
            return super().logits(ids, last)
        rows, hidden = [], []
        for end, count in frequencies.parts(len(ids), last):
            rows.append(super().logits(ids[:end], count))
            if self.hidden_states is not None:
                hidden.append(self.hidden_states[-count:])
        if hidden:
            self.hidden_states = np.concatenate(hidden)
        return np.concatenate(rows)

    def truncate(self, length: int) -> int:
        """Cut the KV cache to its first `length` tokens."""
        self.drop_run_ahead()
        if length == 0:
            self.cache = self._runner.new_cache()
            return 0
        return int(self.cache.truncate(length))

    def forward(self, ids: Ids, last: int) -> Logits:
        """Run `ids` behind the KV cache."""
        [logits] = self._runner.run_unfiltered([SequenceInput(self, ids, last)])
        return logits

    def log_normalizers(self, logits: Logits) -> Floats:
        """Return log Σ exp of each row, on all cores."""
        import torch

        sums: Floats = torch.from_numpy(logits).logsumexp(dim=1).double().numpy()
        return sums
