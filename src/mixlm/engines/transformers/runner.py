"""Forward passes of a transformers model: of one sequence or of many at once, each behind a KV cache of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import copy
from enum import StrEnum
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mixlm.engines.base import Session, common_prefix, respond
from mixlm.engines.batching import SequenceInput, SequenceOutput, respond_batched
from mixlm.engines.requests import ForwardRequest, Response
from mixlm.engines.transformers import self_test
from mixlm.engines.transformers.loaded_model import LoadedModel
from mixlm.engines.transformers.prefix_cache import MIN_TOKENS, PrefixCache
from mixlm.engines.transformers.session import HFSession
from mixlm.errors import is_memory_error, memory_errors
from mixlm.types import Ids, Logits, LogitsRow

if TYPE_CHECKING:
    from mixlm.engines.transformers.cuda_graphs import CudaGraphRunner
    from mixlm.engines.transformers.device_topk import DeviceTopK
    from mixlm.engines.transformers.prefix_cache import SequenceCache
    from mixlm.engines.transformers.run_ahead import DeviceSampler
    from mixlm.engines.transformers.varlen import VarlenKernel

# Of one forward pass. A longer prompt is prefilled in chunks, so that the attention scores of all its positions never
# lie in memory at once; and no more tokens of all sequences together are run in one pass.
MAX_BATCH_TOKENS = 1024
# Of one pass of a prefill behind a recurrent state: so many tokens lie between texts that others may begin with.
_SNAPSHOT_TOKENS = 256
# After a pass of several sequences, so many passes of one do not run ahead: other sequences would wait for that.
RUN_AHEAD_COOLDOWN = 16
# Where a pass behind a state has one token, so many of them take about as long as one pass with so many tokens each.
_STEPS = 16
_SLOTS = 16  # KV buffers that lie side by side on a CPU
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")


class ForwardPath(StrEnum):
    """How forward passes of a model run; the first one that is right is chosen when it is loaded, see `load_trial`.

    PACKED: several sequences at once, attention over KV buffers in place. CROPPED: one sequence behind transformers'
    cache, which is cropped to roll back. SNAPSHOTS: the same behind a recurrent state, which is restored from a
    snapshot. STEPS: as SNAPSHOTS, with one token in a pass behind a state. WHOLE: the whole text in every pass.
    """

    PACKED = "several sequences"
    CROPPED = "one sequence"
    SNAPSHOTS = "one sequence, with snapshots"
    STEPS = "one sequence, token by token"
    WHOLE = "one whole text"


class ModelRunner:
    """Runs the forward passes of a loaded model with one adapter, or with none; `load_trial` makes it.

    Args:
        loaded: the model.
        name: of the model, for messages.
        path: how passes run.
        kernel: attends to several sequences in one call, where there is one.
        graphs: passes in fixed shapes, where they are used.
        sampler: samples on the device, where sequences run ahead.
        details: for reports, such as why the faster paths are not used.
    """

    def __init__(  # noqa: PLR0913 - one option each
        self,
        loaded: LoadedModel,
        name: str,
        path: ForwardPath,
        *,
        kernel: VarlenKernel | None = None,
        graphs: CudaGraphRunner | None = None,
        sampler: DeviceSampler | None = None,
        details: Mapping[str, str] | None = None,
    ) -> None:
        from mixlm.engines.transformers.kv_cache import KVBufferPool

        self.loaded = loaded
        self.model = loaded.model
        self.name = name
        self.adapter: str | None = None
        self.path = path
        self.frequencies = loaded.frequencies
        self.kernel = kernel
        self.graphs = graphs
        self.sampler = sampler
        self.prefixes: PrefixCache | None = None
        self.device_top_k: DeviceTopK | None = None
        self._details = dict(details or {})
        self._cooldown = 0
        self._parameters = inspect.signature(self.model.forward).parameters
        self._pool = KVBufferPool(slots=_SLOTS if _on_cpu(self.model) else 1)
        if self.model.device.type == "cuda":
            from mixlm.engines.transformers.device_topk import DeviceTopK

            self.device_top_k = DeviceTopK()

    @property
    def keeps_cache(self) -> bool:
        """Whether passes run behind a cache; else each runs the whole text."""
        return self.path is not ForwardPath.WHOLE

    @property
    def batches(self) -> bool:
        """Whether it runs several sequences at once."""
        return self.path is ForwardPath.PACKED

    @property
    def chunks(self) -> bool:
        """Whether a long text may be run in several passes."""
        return self.path not in (ForwardPath.WHOLE, ForwardPath.STEPS)

    @property
    def run_ahead_depth(self) -> int:
        """How many positions behind the requested one it runs ahead; 0 where it does not."""
        if self.sampler is None:
            return 0
        from mixlm.engines.transformers.run_ahead import DEPTH

        return DEPTH

    @property
    def max_length(self) -> int:
        """How many tokens a text may have so that the answers are certain to be equal: as many as attention selects."""
        selected = self_test.special_lengths(self.model.config).get("index_topk", 0)
        return selected if selected >= self_test.trial_length(self.model.config) else 1 << 20

    @property
    def details(self) -> dict[str, str]:
        """How it runs forward passes, for reports, where that is not as most models do."""
        details = {} if self.batches else {"forwards": self.path.value, **self._details}
        if self.prefixes is not None:
            details["prefix cache"] = f"up to {self.prefixes.max_bytes / (1 << 20):.4g} MiB"
        if self.kernel is not None:
            details["attention of batches"] = self.kernel.name
        if self.graphs is not None:
            details["short forwards"] = "captured graphs" if self.graphs.captures else "fixed shapes"
        return details

    @property
    def cache_name(self) -> str:
        """The name of transformers' cache in the arguments and results of the model's forward."""
        return next((name for name in _CACHE_NAMES if name in self._parameters), "")

    @property
    def selects_positions(self) -> bool:
        """Whether the model's forward can be told of which positions it returns the logits."""
        return "logits_to_keep" in self._parameters

    def new_cache(self) -> SequenceCache:
        """Return an empty cache for a sequence."""
        from mixlm.engines.transformers.kv_cache import KVCache

        if self.path in (ForwardPath.PACKED, ForwardPath.WHOLE):  # of whole texts, it stays empty
            return KVCache(self._pool if self.graphs is None else self.graphs.pool)
        from transformers import DynamicCache

        from mixlm.engines.transformers.snapshot_cache import SnapshotCache

        # A cache made from the model's config would drop what leaves a window, and could not be cropped into it.
        return SnapshotCache(DynamicCache() if self.path is ForwardPath.CROPPED else None)

    def begins_anew(self, cached: int, length: int) -> bool:
        """Whether one pass over a text of `length` tokens takes less time than one for each that is not cached."""
        return self.path is ForwardPath.STEPS and length - cached > max(_STEPS, length // _STEPS)

    def regime(self, length: int) -> Hashable:
        """Return what is equal for lengths of texts that the model counts positions of alike."""
        return None if self.frequencies is None else self.frequencies.regime(length)

    def with_prefix_cache(self, max_bytes: int | None = None) -> ModelRunner:
        """Return a runner like this one whose sequences share the beginnings of their texts among themselves.

        max_bytes: of what is kept of them, 0 for none; None for as many as here.
        """
        runner, kept = copy(self), self.prefixes
        size = max_bytes if max_bytes is not None else 0 if kept is None else kept.max_bytes
        runner.prefixes = PrefixCache(size) if size and self.keeps_cache else None
        return runner

    def with_adapter(self, adapter: str | None) -> ModelRunner:
        """Return the model's runner with an adapter that was added, or without one; one runner for each adapter."""
        if adapter == self.adapter:
            return self
        runner = copy(self)
        runner.adapter = adapter
        if self.graphs is not None:
            runner.graphs = self.graphs.uncaptured()  # captured passes apply the adapter they were captured with
        return self.loaded.runners.setdefault(adapter, runner)

    def respond(self, requests: Sequence[tuple[Session, ForwardRequest]]) -> list[Response]:
        """Serve requests of several sessions together; what their texts have in common is run once."""
        responses: list[Response] = [None] * len(requests)
        waiting = list(range(len(requests)))
        while waiting:
            current = self._without_common(requests, waiting)
            for index, response in zip(current, self._respond([requests[i] for i in current]), strict=True):
                responses[index] = response
            waiting = [index for index in waiting if index not in set(current)]
        return responses

    def _without_common(self, requests: Sequence[tuple[Session, ForwardRequest]], waiting: list[int]) -> list[int]:
        """Return the requests, by index, that run now: not those that find more in the prefix cache after these."""
        if self.prefixes is None or len(waiting) == 1:
            return waiting
        current: list[int] = []
        first: dict[int, bool] = {}  # by session: whether its requests run now
        leading: list[Ids] = []
        for index in waiting:
            session, request = requests[index]
            if id(session) not in first:
                wanted = request.ids[: -request.last]
                cached = session.cached_tokens(request.ids, request.last)
                missing = len(wanted) - cached >= MIN_TOKENS
                common = max((common_prefix(ids, wanted) for ids in leading), default=0) if missing else 0
                first[id(session)] = common - cached < MIN_TOKENS
                if missing and first[id(session)]:
                    leading.append(wanted)
            if first[id(session)]:
                current.append(index)
        return current

    def _respond(self, requests: Sequence[tuple[Session, ForwardRequest]]) -> list[Response]:
        if self.frequencies is None:
            return respond_batched(requests, self.run, MAX_BATCH_TOKENS)
        responses: list[Response] = [None] * len(requests)
        groups: dict[Hashable, list[int]] = {}
        for index, (session, request) in enumerate(requests):
            length = len(request.ids)
            if self.regime(length) == self.regime(length - request.last + 1):
                groups.setdefault(self.regime(length), []).append(index)
            else:
                responses[index] = respond(session, request)
        for group in groups.values():
            outputs = respond_batched([requests[index] for index in group], self.run, MAX_BATCH_TOKENS)
            for index, output in zip(group, outputs, strict=True):
                responses[index] = output
        return responses

    def run(self, inputs: Sequence[SequenceInput]) -> list[SequenceOutput]:
        """Run what sequences lack, long ones in chunks. Raises MemoryLimitError."""
        import torch

        with torch.inference_mode(), memory_errors(self.name), self.loaded.using(self.adapter):
            if self.frequencies is not None:
                self.frequencies.length = max(cast(HFSession, item.session).length_with(item.ids) for item in inputs)
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
        count, cache = len(item.ids), cast(HFSession, item.session).cache
        if self.prefixes is not None and cache.has_state and count - item.last >= MIN_TOKENS:
            # The next sequence with this text begins at a snapshot, and still has to run the requested positions.
            if self.path is ForwardPath.SNAPSHOTS:
                return count - item.last, _SNAPSHOT_TOKENS
            return (count - 1, count) if item.last == 1 and not cache.length else (0, 1)
        return (max(count - max(MAX_BATCH_TOKENS, item.last), 0) if self.chunks else 0), MAX_BATCH_TOKENS

    def run_unfiltered(self, inputs: Sequence[SequenceInput]) -> list[Logits]:
        """Run inputs without filters: float32 (last, vocab) for each. Raises MemoryLimitError."""
        return [cast("Logits", output) for output in self.run(inputs)]

    def _run_batch(self, inputs: Sequence[SequenceInput]) -> list[SequenceOutput]:
        if any(item.session.keeps_hidden for item in inputs):
            with self.loaded.hidden_states.recording(inputs):
                logits = self._forward(inputs) if self.batches else self._forward_alone(*inputs)
            return self._transfer(logits, inputs)
        if not self.batches:
            return self._transfer(self._forward_alone(*inputs), inputs)
        if len(inputs) > 1:
            self._cooldown = RUN_AHEAD_COOLDOWN
            return self._transfer(self._forward(inputs), inputs)
        self._cooldown = max(self._cooldown - 1, 0)
        [item] = inputs
        row = self._from_run_ahead(item)
        if row is None:
            logits = self._forward(inputs)
            row = self._start_run_ahead(item, logits)
            if row is None:
                if item.session.has_run_ahead:  # the row is needed whole, but later passes have overwritten the logits
                    cast(HFSession, item.session).cache.length -= 1
                    logits = self._forward([item._replace(ids=item.ids[-1:])])
                return self._transfer(logits, inputs)
        return [[row]]

    def _forward_alone(self, item: SequenceInput) -> Any:
        """Run one sequence of a model that cannot run several at once. Returns a tensor (last, vocab)."""
        import torch

        cache = cast(HFSession, item.session).cache  # a `SnapshotCache`, unless whole texts run
        steps = self.path is ForwardPath.STEPS and cache.length > 0
        rows = []
        for ids in np.split(item.ids, len(item.ids)) if steps else [item.ids]:
            options: dict[str, Any] = {"use_cache": self.keeps_cache, "logits_to_keep": min(item.last, len(ids))}
            if self.keeps_cache:
                options["position_ids"] = torch.arange(cache.length, cache.length + len(ids), device=self.model.device)[
                    None
                ]
            options = {name: value for name, value in options.items() if name in self._parameters}
            options["input_ids"] = torch.tensor(ids[None], device=self.model.device)

            def run(options: dict[str, Any] = options) -> Any:
                return self.model(**options, **({self.cache_name: cache.cache} if self.keeps_cache else {}))

            result = self._with_room(run, cache.undo if self.keeps_cache else None)
            if self.keeps_cache:
                cache.commit(getattr(result, self.cache_name), len(ids))
            rows.append(result.logits[0, -item.last :])
        return torch.cat(rows)[-item.last :]

    def _forward(self, inputs: Sequence[SequenceInput]) -> Any:
        """Run all inputs in one forward pass. Returns the requested logits, a tensor (rows, vocab)."""
        import torch

        from mixlm.engines.transformers.packed_sequences import PackedSequences

        sessions = [cast(HFSession, item.session) for item in inputs]
        for session in sessions:
            session.drop_run_ahead()
        counts = [len(item.ids) for item in inputs]
        alone = len(inputs) == 1 and not sessions[0].keeps_hidden  # a captured pass notes no hidden states
        if self.graphs is not None and alone and self.graphs.fits(sessions[0].cache, counts[0]):
            return self.graphs.run(sessions[0].cache, inputs[0].ids, inputs[0].last)
        # A copy: the callers' arrays are views of buffers that go on changing.
        device = self.model.device
        ids = torch.tensor(np.concatenate([item.ids for item in inputs])[None], device=device)
        batch = PackedSequences([session.cache for session in sessions], counts, self.kernel)
        ends = zip(inputs, np.cumsum(counts), strict=True)
        outputs = np.concatenate([np.arange(end - item.last, end) for item, end in ends])
        options = {
            "input_ids": ids,
            "position_ids": torch.tensor(batch.positions()[None], device=device),
            "logits_to_keep": torch.tensor(outputs, device=device),
            "use_cache": False,
        }

        def undo() -> None:  # what the failed pass wrote lies behind the KV caches' lengths
            nonlocal batch
            batch = PackedSequences(batch.caches, counts, self.kernel)

        result = self._with_room(lambda: self.model(**options, attention_batch=batch), undo)
        batch.commit()
        return result.logits[0]

    def _with_room(self, run: Callable[[], Any], undo: Callable[[], object] | None) -> Any:
        """Run a pass, and once more if memory runs out and some can be given up. undo: what the first one did."""
        try:
            return run()
        except Exception as error:
            if not self._makes_room(error):
                raise
        if undo is not None:
            undo()
        return run()

    def _makes_room(self, error: Exception) -> bool:
        """Give up what sequences can do without, if memory is out. Returns whether a pass may succeed now."""
        import torch

        from mixlm.engines.transformers.kv_cache import SlabError

        if isinstance(error, SlabError):
            self._pool.separate()
            return True
        if self.prefixes is None or not is_memory_error(error) or not self.prefixes.clear():
            return False
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def _from_run_ahead(self, item: SequenceInput) -> LogitsRow | None:
        """Return the output for an input that ran ahead, None if it did not."""
        session = cast(HFSession, item.session)
        ahead = session.run_ahead
        if not ahead or item.top_k_filter is not ahead.top_k_filter or len(item.ids) > 1:
            return None
        row = ahead.advance(int(item.ids[0]), item.run_ahead)
        session.stats.run_ahead += row is not None
        return row

    def _start_run_ahead(self, item: SequenceInput, logits: Any) -> LogitsRow | None:
        """Run ahead of an input, if it has a hint. Returns its output, None where nothing ran or the row is tied."""
        if self.sampler is None or item.run_ahead is None or item.top_k_filter is None or self._cooldown:
            return None
        from mixlm.engines.transformers.run_ahead import RunAhead

        session = cast(HFSession, item.session)
        assert self.graphs is not None
        if not RunAhead.is_possible(self.graphs, session.cache, item.top_k_filter, logits.shape[1]):
            return None
        session.run_ahead = RunAhead(
            self.graphs, self.sampler, session.cache, item.top_k_filter, session.context_length
        )
        return session.run_ahead.start(logits, item.run_ahead)

    def _transfer(self, logits: Any, inputs: Sequence[SequenceInput]) -> list[SequenceOutput]:
        """Transfer the logits of all inputs, a tensor (rows, vocab), to the host, or as much of them as is needed."""
        ends = np.cumsum([item.last for item in inputs]).tolist()
        if self.device_top_k is None or all(item.top_k_filter is None for item in inputs):
            whole: Logits = logits.float().cpu().numpy()
            return list(np.split(whole, ends[:-1]))
        rows = self.device_top_k.transfer(logits, [item.top_k_filter for item in inputs for _ in range(item.last)])
        outputs = [(item, rows[end - item.last : end]) for item, end in zip(inputs, ends, strict=True)]
        return [own if item.top_k_filter is not None else np.stack(cast("list[Logits]", own)) for item, own in outputs]


def _on_cpu(model: Any) -> bool:
    """Whether all of a model is on the CPU."""
    return {parameter.device.type for parameter in model.parameters()} == {"cpu"}
