"""The sequences of a transformers model, and its forward passes: of one sequence or of many at once.

Each sequence has a KV cache of its own, and each pass runs the tokens that these lack.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Hashable, Sequence
from copy import copy
from enum import StrEnum
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from mixlm.engines.base import Session, common_prefix, respond
from mixlm.engines.batching import SequenceInput, SequenceOutput, respond_batched
from mixlm.engines.requests import Forward, ForwardRequest, Response
from mixlm.engines.transformers.attention import VarlenKernel
from mixlm.engines.transformers.kv_cache import KVBufferPool, KVCache, SlabError
from mixlm.engines.transformers.loaded_model import LoadedModel
from mixlm.engines.transformers.packed_sequences import PackedSequences
from mixlm.engines.transformers.prefix_cache import MIN_TOKENS, PrefixCache
from mixlm.errors import is_memory_error, memory_errors
from mixlm.types import Floats, Ids, Logits, LogitsRow

if TYPE_CHECKING:
    from mixlm.engines.transformers.cuda_graphs import CudaGraphRunner
    from mixlm.engines.transformers.device_topk import DeviceTopK
    from mixlm.engines.transformers.prefix_cache import SequenceCache
    from mixlm.engines.transformers.run_ahead import DeviceSampler, RunAhead

# Of one forward pass. A longer prompt is prefilled in chunks, so that the attention scores of all its positions never
# lie in memory at once; and no more tokens of all sequences together are run in one pass.
MAX_BATCH_TOKENS = 1024
# Of one pass of a prefill from a recurrent state: so many tokens lie between texts that others may begin with.
_SNAPSHOT_TOKENS = 256
# After a pass of several sequences, so many passes of one do not run ahead: other sequences would wait for that.
RUN_AHEAD_COOLDOWN = 16
# On `ForwardPath.STEPS`, up to this many missing tokens, or 1/_MAX_STEPS of the text if that is more, are run one by
# one; for more, one pass over the whole text is faster.
_MAX_STEPS = 16
_BUFFERS_PER_SLAB = 16  # KV buffers that lie side by side on a CPU
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")


class ForwardPath(StrEnum):
    """How forward passes of a model run; the first one that is right is chosen when it is loaded, see `load_trial`.

    PACKED: several sequences at once, attention over KV buffers in place. CROPPED: one sequence with transformers'
    cache, which is cropped to roll back. SNAPSHOTS: the same with a recurrent state, which is restored from a
    snapshot. STEPS: as SNAPSHOTS, with one token in a pass from a state. WHOLE: the whole text in every pass.
    """

    PACKED = "several sequences"
    CROPPED = "one sequence"
    SNAPSHOTS = "one sequence, with snapshots"
    STEPS = "one sequence, token by token"
    WHOLE = "one whole text"


class HFSession(Session):
    """One sequence. The KV cache keeps every position, also where the model attends to a window: text may roll back."""

    def __init__(self, runner: ModelRunner, context_length: int = 1 << 20) -> None:
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

    def drop_run_ahead(self) -> None:
        """Drop what ran ahead."""
        self.stats.wasted += len(self.run_ahead or ())
        self.run_ahead = None

    def cached_tokens(self, ids: Ids, last: int = 1) -> int:
        """Return how many tokens of `ids` are in its KV cache, or in those that other sequences left."""
        runner, wanted = self._runner, ids[: len(ids) - last]
        regime, cached = runner.regime(len(ids)), 0
        if regime == self._regime:
            cached = int(self.cache.nearest(super().cached_tokens(ids, last)))
        if runner.prefixes is not None and len(wanted) - cached >= MIN_TOKENS:
            shared = runner.prefixes.match((runner.adapter, regime), wanted, has_state=self.cache.has_state)
            cached = shared if shared - cached >= MIN_TOKENS else cached
        return cached if cached >= runner.least_cached(len(ids)) else 0

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
        if cached and cached < self._runner.least_cached(len(ids)):
            self.reset()
            return 0
        return cached

    def _load_prefix(self, ids: Ids, last: int) -> None:
        """Take what other sequences left of a text, where that is enough more than this one has."""
        runner = self._runner
        if runner.prefixes is None or not 1 <= last <= len(ids) <= self.context_length:
            return
        wanted = ids[: len(ids) - last]
        cached = int(self.cache.nearest(common_prefix(self._cached.ids, wanted)))
        if len(wanted) - cached < MIN_TOKENS:
            return
        cache, least = runner.new_cache(), max(cached + MIN_TOKENS, runner.least_cached(len(ids)))
        # A forward pass that runs out of memory in another thread frees some and tries again: it needs that itself.
        with runner.loaded.lock:
            length = runner.prefixes.load((runner.adapter, self._regime), wanted, cache, least)
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
        # At the end of the process the names of a module may be gone before its objects.
        if sys is None or sys.is_finalizing() or not hasattr(self, "cache"):
            return
        # A CUDA graph must not record the copies of a collected session.
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            # Whoever collects garbage may be using the texts that are kept: it must not wait for itself.
            self._insert_prefix(wait=False)

    def _insert_prefix(self, *, wait: bool = True) -> None:
        prefixes, cache = self._runner.prefixes, self.cache
        if prefixes is not None:
            for length in cache.lengths():
                if 0 < length <= self.num_cached:
                    prefixes.insert((self._runner.adapter, self._regime), self._cached.ids[:length], cache, wait=wait)

    def logits(self, ids: Ids, last: int = 1) -> Logits:
        """Return the logits after each of the last prefixes, those of each regime of frequencies by themselves."""
        if self._runner.frequencies is None or not 1 <= last <= len(ids):
            return super().logits(ids, last)
        rows, hidden = [], []
        for _, group in groupby(range(len(ids) - last + 1, len(ids) + 1), self._runner.regime):
            ends = list(group)
            rows.append(super().logits(ids[: ends[-1]], len(ends)))
            if self.hidden_states is not None:
                hidden.append(self.hidden_states[-len(ends) :])
        if hidden:
            self.hidden_states = np.concatenate(hidden)
        return np.concatenate(rows)

    def truncate(self, length: int) -> int:
        """Cut the KV cache to its first `length` tokens, or to the last snapshot before. Returns how many it kept."""
        self.drop_run_ahead()
        if length == 0:
            self.cache = self._runner.new_cache()
            return 0
        return int(self.cache.truncate(length))

    def forward(self, ids: Ids, last: int) -> Logits:
        """Run `ids` after the cached ones."""
        [logits] = self._runner.run([SequenceInput(self, ids, last)])
        return cast("Logits", logits)  # as without a filter

    def log_normalizers(self, logits: Logits) -> Floats:
        """Return log Σ exp of each row, on all cores."""
        sums: Floats = torch.from_numpy(logits).logsumexp(dim=1).double().numpy()
        return sums


class ModelRunner:
    """Runs the forward passes of a loaded model with one adapter, or with none; `load_trial` makes it.

    keeps_cache: whether passes run with a cache; else each runs the whole text. batches: whether several sequences
    run at once. chunks: whether a long text may be run in several passes. cache_name: of transformers' cache in the
    arguments and results of the model's forward, empty where it takes none. selects_positions: whether it can be told
    of which positions it returns the logits. path_details: for display, where passes do not run as most models' do.

    kernel: attends to several sequences in one call, where there is one. adapter: what is applied to the model. graphs:
    passes in fixed shapes, where they are used. sampler: samples on the device, where sequences run ahead;
    run_ahead_depth: by how many positions. prefixes: texts that are kept for other sequences.
    """

    def __init__(self, loaded: LoadedModel, path: ForwardPath, kernel: VarlenKernel | None = None) -> None:
        self.loaded = loaded
        self.model = loaded.model
        self.frequencies = loaded.frequencies
        self.path = path
        self.keeps_cache = path is not ForwardPath.WHOLE
        self.batches = path is ForwardPath.PACKED
        self.chunks = path not in (ForwardPath.WHOLE, ForwardPath.STEPS)
        self.kernel = kernel
        self.adapter: str | None = None
        self.graphs: CudaGraphRunner | None = None
        self.sampler: DeviceSampler | None = None
        self.run_ahead_depth = 0
        self.prefixes: PrefixCache | None = None
        self.path_details: dict[str, str] = {}
        self.device_top_k: DeviceTopK | None = None
        self._by_adapter: dict[str | None, ModelRunner] = {}
        self._cooldown = 0
        self._parameters = inspect.signature(self.model.forward).parameters
        self.cache_name = next((name for name in _CACHE_NAMES if name in self._parameters), "")
        self.selects_positions = "logits_to_keep" in self._parameters
        on_cpu = {parameter.device.type for parameter in self.model.parameters()} == {"cpu"}
        self._pool = KVBufferPool(slots=_BUFFERS_PER_SLAB if on_cpu else 1)
        if self.model.device.type == "cuda":
            from mixlm.engines.transformers.device_topk import DeviceTopK

            self.device_top_k = DeviceTopK()

    @property
    def details(self) -> dict[str, str]:
        """How it runs forward passes, for display, where that is not as most models do."""
        details = dict(self.path_details)
        if self.prefixes is not None:
            details["prefix cache"] = f"up to {self.prefixes.max_bytes / (1 << 20):.4g} MiB"
        if self.kernel is not None:
            details["attention of batches"] = self.kernel.name
        if self.graphs is not None:
            details["short forwards"] = "captured graphs" if self.graphs.captures else "fixed shapes"
        return details

    def new_cache(self) -> SequenceCache:
        """Return an empty cache for a sequence."""
        if self.path in (ForwardPath.PACKED, ForwardPath.WHOLE):  # of whole texts, it stays empty
            return KVCache(self._pool if self.graphs is None else self.graphs.pool)
        from transformers import DynamicCache

        from mixlm.engines.transformers.snapshot_cache import SnapshotCache

        # A cache made from the model's config would drop what leaves a window, and could not be cropped into it.
        return SnapshotCache(DynamicCache() if self.path is ForwardPath.CROPPED else None)

    def least_cached(self, length: int) -> int:
        """Return how many tokens of a text the cache must hold: with fewer, one pass over the whole takes less time."""
        return length - max(_MAX_STEPS, length // _MAX_STEPS) if self.path is ForwardPath.STEPS else 0

    def regime(self, length: int) -> Hashable:
        """Return what is equal for lengths of texts that the model counts positions of alike."""
        return None if self.frequencies is None else self.frequencies.regime(length)

    def replica(self) -> ModelRunner:
        """Return a runner like this one that shares no beginnings of texts with it."""
        runner = copy(self)
        runner._by_adapter = {}
        if self.prefixes is not None:
            runner.prefixes = PrefixCache(self.prefixes.max_bytes)
        return runner

    def with_adapter(self, adapter: str | None) -> ModelRunner:
        """Return the runner with an adapter that was added, or without one; there is one for each adapter."""
        runners = self._by_adapter
        runners[self.adapter] = self
        if adapter not in runners:
            runner = runners[adapter] = copy(self)
            runner.adapter = adapter
            if self.graphs is not None:  # captured passes apply the adapter they were captured with
                runner.graphs = type(self.graphs)(self.model, capture=self.graphs.captures)
        return runners[adapter]

    def respond(self, requests: Sequence[tuple[Session, ForwardRequest]]) -> list[Response]:
        """Serve requests of several sessions together; what their texts have in common is run once."""
        responses: list[Response] = [None] * len(requests)
        waiting = list(range(len(requests)))
        while waiting:
            current = self._without_common(requests, waiting)
            waiting = [index for index in waiting if index not in set(current)]
            groups: dict[tuple[Hashable, Hashable], list[int]] = {}
            for index in current:
                length, last = len(requests[index][1].ids), requests[index][1].last
                groups.setdefault((self.regime(length - last + 1), self.regime(length)), []).append(index)
            for (first_regime, regime), group in groups.items():
                batch = [requests[index] for index in group]
                if first_regime == regime:
                    outputs = respond_batched(batch, self.run, MAX_BATCH_TOKENS)
                else:  # in a pass for each regime
                    outputs = [respond(session, request) for session, request in batch]
                for index, output in zip(group, outputs, strict=True):
                    responses[index] = output
        return responses

    def _without_common(self, requests: Sequence[tuple[Session, ForwardRequest]], waiting: list[int]) -> list[int]:
        """Return the requests, by index, that run now: not those that find more in the prefix cache after these."""
        if self.prefixes is None or len(waiting) == 1:
            return waiting
        runs: dict[int, bool] = {}  # by session
        leading: list[Ids] = []
        for session, request in (requests[index] for index in waiting):
            if id(session) not in runs:
                wanted = request.ids[: -request.last]
                least = session.cached_tokens(request.ids, request.last) + MIN_TOKENS
                common = any(common_prefix(ids, wanted) >= least for ids in leading)
                runs[id(session)] = not common
                if len(wanted) >= least and not common:
                    leading.append(wanted)
        return [index for index in waiting if runs[id(requests[index][0])]]

    def run(self, inputs: Sequence[SequenceInput]) -> list[SequenceOutput]:
        """Run what sequences lack, long ones in chunks. Raises MemoryLimitError."""
        with torch.inference_mode(), memory_errors(self.loaded.name), self.loaded.using(self.adapter):
            if self.frequencies is not None:
                self.frequencies.length = max(_session(item).cache.length + len(item.ids) for item in inputs)
            rest = []
            for item in inputs:
                prefill, size = self._prefill(item)
                for start in range(0, prefill, size):
                    chunk = item.ids[start : min(start + size, prefill)]
                    self._run_batch([SequenceInput(item.session, chunk, 1)])
                rest.append(item._replace(ids=item.ids[prefill:]))
            return self._run_batch(rest)

    def _prefill(self, item: SequenceInput) -> tuple[int, int]:
        """Return how many tokens run before the rest of an input, and how many of them in one pass."""
        count, cache = len(item.ids), _session(item).cache
        if self.prefixes is not None and cache.has_state and count - item.last >= MIN_TOKENS:
            # The next sequence with this text begins at a snapshot, and still has to run the requested positions.
            if self.path is ForwardPath.SNAPSHOTS:
                return count - item.last, _SNAPSHOT_TOKENS
            return (count - 1, count) if item.last == 1 and not cache.length else (0, 1)
        return (max(count - max(MAX_BATCH_TOKENS, item.last), 0) if self.chunks else 0), MAX_BATCH_TOKENS

    def _run_batch(self, inputs: Sequence[SequenceInput]) -> list[SequenceOutput]:
        if any(item.session.keeps_hidden for item in inputs):
            with self.loaded.noting_hidden_states(inputs):
                logits = self._forward(inputs)
            return self._transfer(logits, inputs)
        if len(inputs) > 1:
            self._cooldown = RUN_AHEAD_COOLDOWN
            return self._transfer(self._forward(inputs), inputs)
        self._cooldown = max(self._cooldown - 1, 0)
        [item] = inputs
        if (row := self._from_run_ahead(item)) is not None:
            return [[row]]
        logits = self._forward(inputs)
        if (row := self._start_run_ahead(item, logits)) is not None:
            return [[row]]
        if item.session.has_run_ahead:  # the row is needed whole, but later passes have overwritten the logits
            _session(item).cache.length -= 1
            logits = self._forward([item._replace(ids=item.ids[-1:])])
        return self._transfer(logits, inputs)

    def _forward(self, inputs: Sequence[SequenceInput]) -> torch.Tensor:
        """Run all inputs in one forward pass. Returns the requested logits, (rows, vocab)."""
        if not self.batches:
            return self._forward_alone(*inputs)
        sessions = [_session(item) for item in inputs]
        for session in sessions:
            session.drop_run_ahead()
        caches, counts = [session.cache for session in sessions], [len(item.ids) for item in inputs]
        alone = len(inputs) == 1 and not sessions[0].keeps_hidden  # a captured pass notes no hidden states
        if self.graphs is not None and alone and self.graphs.fits(caches[0], counts[0]):
            return self.graphs.run(caches[0], inputs[0].ids, inputs[0].last)
        # A copy: the callers' arrays are views of buffers that go on changing.
        ids = torch.tensor(np.concatenate([item.ids for item in inputs])[None], device=self.model.device)
        ends = zip(inputs, np.cumsum(counts), strict=True)
        outputs = np.concatenate([np.arange(end - item.last, end) for item, end in ends])

        def run() -> Any:
            batch = PackedSequences(caches, counts, self.kernel)
            result = self.model(
                input_ids=ids,
                position_ids=torch.tensor(batch.positions()[None], device=self.model.device),
                logits_to_keep=torch.tensor(outputs, device=self.model.device),
                use_cache=False,
                attention_batch=batch,
            )
            batch.commit()  # what a failed pass wrote lies beyond the KV caches' lengths
            return result.logits[0]

        logits: torch.Tensor = self._with_room(run)
        return logits

    def _forward_alone(self, item: SequenceInput) -> torch.Tensor:
        """Run one sequence of a model that cannot run several at once. Returns its logits, (last, vocab)."""
        cache = _session(item).cache  # a `SnapshotCache`, unless whole texts run
        steps = self.path is ForwardPath.STEPS and cache.length > 0
        rows = []
        for part in np.split(item.ids, len(item.ids)) if steps else [item.ids]:
            ids, count = torch.tensor(part[None], device=self.model.device), len(part)
            options: dict[str, Any] = {"use_cache": self.keeps_cache, "logits_to_keep": min(item.last, count)}
            if self.keeps_cache:
                options["position_ids"] = torch.arange(cache.length, cache.length + count, device=ids.device)[None]
            options = {name: value for name, value in options.items() if name in self._parameters}

            def run(ids: torch.Tensor = ids, options: dict[str, Any] = options) -> Any:
                behind = {self.cache_name: cache.cache} if self.keeps_cache else {}
                return self.model(input_ids=ids, **options, **behind)

            result = self._with_room(run, cache.undo if self.keeps_cache else None)
            if self.keeps_cache:
                cache.commit(getattr(result, self.cache_name), count)
            rows.append(result.logits[0, -item.last :])
        return torch.cat(rows)[-item.last :]

    def _with_room(self, run: Callable[[], Any], undo: Callable[[], object] | None = None) -> Any:
        """Run a pass, and once more if memory runs out and some can be given up. undo: what the first one did."""
        try:
            return run()
        except SlabError:
            self._pool.separate()
        except Exception as error:
            if self.prefixes is None or not is_memory_error(error) or not self.prefixes.clear():
                raise
            torch.cuda.empty_cache()
        if undo is not None:
            undo()
        return run()

    def _from_run_ahead(self, item: SequenceInput) -> LogitsRow | None:
        """Return the output for an input that ran ahead, None if it did not."""
        session = _session(item)
        ahead = session.run_ahead
        if not ahead or item.top_k_filter is not ahead.top_k_filter or len(item.ids) > 1:
            return None
        row = ahead.advance(int(item.ids[0]), item.run_ahead)
        session.stats.run_ahead += row is not None
        return row

    def _start_run_ahead(self, item: SequenceInput, logits: torch.Tensor) -> LogitsRow | None:
        """Run ahead of an input, if it has a hint. Returns its output, None where nothing ran or the row is tied."""
        if self.sampler is None or item.run_ahead is None or item.top_k_filter is None or self._cooldown:
            return None
        from mixlm.engines.transformers.device_topk import is_worthwhile
        from mixlm.engines.transformers.run_ahead import RunAhead

        session, graphs = _session(item), self.graphs
        assert graphs is not None
        if not is_worthwhile(item.top_k_filter, logits.shape[1]) or not graphs.fits(session.cache, 1):
            return None
        session.run_ahead = RunAhead(graphs, self.sampler, session.cache, item.top_k_filter, session.context_length)
        return session.run_ahead.start(logits, item.run_ahead)

    def _transfer(self, logits: torch.Tensor, inputs: Sequence[SequenceInput]) -> list[SequenceOutput]:
        """Transfer the logits of all inputs, (rows, vocab), to the host, or as much of them as is needed."""
        ends = np.cumsum([item.last for item in inputs]).tolist()
        if self.device_top_k is None or all(item.top_k_filter is None for item in inputs):
            whole: Logits = logits.float().cpu().numpy()
            return list(np.split(whole, ends[:-1]))
        rows = self.device_top_k.transfer(logits, [item.top_k_filter for item in inputs for _ in range(item.last)])
        outputs = [(item, rows[end - item.last : end]) for item, end in zip(inputs, ends, strict=True)]
        return [own if item.top_k_filter is not None else np.stack(cast("list[Logits]", own)) for item, own in outputs]


def _session(item: SequenceInput) -> HFSession:
    return cast(HFSession, item.session)
