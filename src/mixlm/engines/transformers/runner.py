"""Forward passes of a transformers model: of one sequence or of many at once, each behind a KV cache of its own."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mixlm.engines.base import Session, respond
from mixlm.engines.batching import SequenceInput, SequenceOutput, respond_batched
from mixlm.engines.requests import LogitsRequest, Request, Response, RunAheadHint
from mixlm.engines.tokenizer_setup import first_line
from mixlm.engines.transformers import self_test
from mixlm.engines.transformers.loaded_model import LoadedModel
from mixlm.engines.transformers.position_frequencies import PositionFrequencies
from mixlm.errors import MemoryLimitError, MixlmError, ModelLoadError, UnsupportedError
from mixlm.types import Candidates, Floats, Ids, Logits, LogitsRow

if TYPE_CHECKING:
    from mixlm.engines.transformers.cuda_graphs import CudaGraphRunner
    from mixlm.engines.transformers.device_topk import DeviceTopK
    from mixlm.engines.transformers.run_ahead import DeviceSampler, RunAhead

# Of one forward pass. A longer prompt is prefilled in chunks, so that the attention scores of all its positions never
# lie in memory at once; and no more tokens of all sequences together are run in one pass.
MAX_BATCH_TOKENS = 1024
# After a pass of several sequences, so many passes of one do not run ahead: other sequences would wait for that.
RUN_AHEAD_COOLDOWN = 16
# What torch, safetensors and the system say when memory is out, where the error has no type of its own.
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory")
# Kinds of layers whose keys and values may be kept: a trial tells of others up to its own length only.
_CACHED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_BATCHED_LAYERS = {"full_attention", "sliding_attention"}


class HFSession(Session):
    """One sequence. The KV cache keeps every position, also where the model attends to a window: text may roll back."""

    def __init__(self, runner: ModelRunner, context_length: int) -> None:
        super().__init__(context_length)
        self._runner = runner
        self.keeps_cache = runner.keeps_cache
        self.cache: Any = None
        self.run_ahead: RunAhead | None = None
        self._regime: Hashable = None  # of the cache

    @property
    def has_run_ahead(self) -> bool:
        """Whether forward passes ran that have not been requested yet."""
        return bool(self.run_ahead)

    def length_with(self, ids: Ids) -> int:
        """Return how many tokens it has once `ids` have run."""
        if self.cache is None:
            return len(ids)
        return len(ids) + int(self.cache.length if self._runner.batches else self.cache.get_seq_length())

    def drop_run_ahead(self) -> None:
        """Drop what ran ahead."""
        self.stats.wasted += len(self.run_ahead or ())
        self.run_ahead = None

    def cached_tokens(self, ids: Ids, last: int = 1) -> int:
        """Return how many tokens of `ids` are in the KV cache; none where the position frequencies are others."""
        return super().cached_tokens(ids, last) if self._runner.regime(len(ids)) == self._regime else 0

    def can_chunk(self, ids: Ids) -> bool:
        """Whether a prefix can be prefilled first; with frequencies that depend on the length, only a whole text."""
        return self.keeps_cache and self._runner.frequencies is None

    def rollback(self, ids: Ids, last: int = 1) -> int | None:
        """Cut the KV cache as `Session.rollback` does; all of it where the position frequencies are others."""
        if (regime := self._runner.regime(len(ids))) != self._regime:
            self.reset()
            self._regime = regime
        return super().rollback(ids, last)

    def logits(self, ids: Ids, last: int = 1) -> Logits:
        """Return the logits after each of the last prefixes, those of each regime of frequencies by themselves."""
        frequencies = self._runner.frequencies
        if frequencies is None or not 1 <= last <= len(ids):
            return super().logits(ids, last)
        parts = frequencies.parts(len(ids), last)
        return np.concatenate([super(HFSession, self).logits(ids[:end], count) for end, count in parts])

    def truncate(self, length: int) -> int:
        """Cut the KV cache to its first `length` tokens."""
        self.drop_run_ahead()
        if length == 0:
            self.cache = None
        elif self._runner.batches:
            self.cache.length = length
        else:
            self.cache.crop(length - self.cache.get_seq_length())
        return length

    def forward(self, ids: Ids, last: int) -> Logits:
        """Run `ids` behind the KV cache."""
        [logits] = self._runner.run_unfiltered([SequenceInput(self, ids, last)])
        return logits

    def log_normalizers(self, logits: Logits) -> Floats:
        """Return log Σ exp of each row, on all cores."""
        import torch

        sums: Floats = torch.from_numpy(logits).logsumexp(dim=1).double().numpy()
        return sums


class ModelRunner:
    """Runs the forward passes of a loaded model with one adapter, or with none.

    keeps_cache: passes run behind a KV cache; without one, since the model carries a recurrent state or does not then
    give what whole texts give, each runs the whole text. batches: it runs several sequences at once. frequencies: those
    that depend on a sequence's length. graphs: passes in fixed shapes, where they are used. device_top_k: selects
    logits on the device, where that is not the host. sampler: samples on the device, where sequences run ahead.

    Args:
        loaded: the model.
        name: of the model, for messages.
        graphs: "auto" uses fixed shapes on CUDA where the model can, "on" wherever it can, "off" nowhere.

    Raises:
        ModelLoadError: the model cannot run.
        UnsupportedError: its answers do not depend on the text before them alone; or `graphs` is "on" and it cannot
            run in fixed shapes.
    """

    def __init__(self, loaded: LoadedModel, name: str, graphs: str = "auto") -> None:
        self.loaded = loaded
        self.model = loaded.model
        self.adapter: str | None = None
        self.keeps_cache = False
        self.batches = False
        self.frequencies = PositionFrequencies.of(self.model)
        self.graphs: CudaGraphRunner | None = None
        self.device_top_k: DeviceTopK | None = None
        self.sampler: DeviceSampler | None = None
        self._cooldown = 0
        self._name = name
        self._parameters = inspect.signature(self.model.forward).parameters
        loaded.runners[None] = self
        cuda = self.model.device.type == "cuda"
        if cuda:
            from mixlm.engines.transformers.device_topk import DeviceTopK

            self.device_top_k = DeviceTopK()
        self._choose_path()
        if graphs == "on" or (graphs == "auto" and cuda):
            if self._enable_graphs(capture=cuda):
                self._enable_run_ahead()
            elif graphs == "on":
                raise UnsupportedError(f"{name} cannot run in fixed shapes", "leave graphs at auto, or set it to off")

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
        details = {} if self.batches else {"forwards": "one sequence" if self.keeps_cache else "one whole text"}
        if self.graphs is not None:
            details["short forwards"] = "captured graphs" if self.graphs.captures else "fixed shapes"
        return details

    def regime(self, length: int) -> Hashable:
        """Return what is equal for lengths of texts that the model counts positions of alike."""
        return None if self.frequencies is None else self.frequencies.regime(length)

    def with_adapter(self, adapter: str | None) -> ModelRunner:
        """Return the model's runner with an adapter that was added, or without one; one runner for each adapter."""
        if adapter == self.adapter:
            return self
        runner = copy(self)
        runner.adapter = adapter
        if self.graphs is not None:
            runner.graphs = self.graphs.uncaptured()  # captured passes apply the adapter they were captured with
        return self.loaded.runners.setdefault(adapter, runner)

    def respond(self, requests: Sequence[tuple[Session, Request]]) -> list[Response]:
        """Serve requests of several sessions together."""
        if self.frequencies is None:
            return respond_batched(requests, self.run, MAX_BATCH_TOKENS)
        responses: list[Response] = [None] * len(requests)
        groups: dict[Hashable, list[int]] = {}
        for index, (session, request) in enumerate(requests):
            length, last = len(request.ids), request.last if isinstance(request, LogitsRequest) else 1
            if self.regime(length) == self.regime(length - last + 1):
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

        with torch.inference_mode(), memory_errors(self._name), self.loaded.using(self.adapter):
            if self.frequencies is not None:
                self.frequencies.length = max(cast(HFSession, item.session).length_with(item.ids) for item in inputs)
            rest = []
            for item in inputs:
                prefill = max(len(item.ids) - max(MAX_BATCH_TOKENS, item.last), 0) if self.keeps_cache else 0
                for start in range(0, prefill, MAX_BATCH_TOKENS):
                    chunk = item.ids[start : min(start + MAX_BATCH_TOKENS, prefill)]
                    self._run_batch([SequenceInput(item.session, chunk, 1)])
                rest.append(item._replace(ids=item.ids[prefill:]))
            return self._run_batch(rest)

    def run_unfiltered(self, inputs: Sequence[SequenceInput]) -> list[Logits]:
        """Run inputs without filters: float32 (last, vocab) for each. Raises MemoryLimitError."""
        return [cast("Logits", output) for output in self.run(inputs)]

    def _run_batch(self, inputs: Sequence[SequenceInput]) -> list[SequenceOutput]:
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

        options: dict[str, Any] = {"use_cache": self.keeps_cache, "logits_to_keep": item.last}
        if self.keeps_cache:
            from transformers import DynamicCache

            session = cast(HFSession, item.session)
            # A cache made from the model's config would drop what leaves a window, and could not roll back into it.
            session.cache = DynamicCache() if session.cache is None else session.cache
            options["past_key_values"] = session.cache
        options = {name: value for name, value in options.items() if name in self._parameters}
        ids = torch.tensor(item.ids[None], device=self.model.device)
        return self.model(input_ids=ids, **options).logits[0, -item.last :]

    def _forward(self, inputs: Sequence[SequenceInput]) -> Any:
        """Run all inputs in one forward pass. Returns the requested logits, a tensor (rows, vocab)."""
        import torch

        from mixlm.engines.transformers.kv_cache import KVCache, PackedSequences

        sessions = [cast(HFSession, item.session) for item in inputs]
        for session in sessions:
            session.drop_run_ahead()
            session.cache = session.cache or KVCache(None if self.graphs is None else self.graphs.pool)
        counts = [len(item.ids) for item in inputs]
        if self.graphs is not None and len(inputs) == 1 and self.graphs.fits(sessions[0].cache, counts[0]):
            return self.graphs.run(sessions[0].cache, inputs[0].ids, inputs[0].last)
        # A copy: the callers' arrays are views of buffers that go on changing.
        device = self.model.device
        ids = torch.tensor(np.concatenate([item.ids for item in inputs])[None], device=device)
        batch = PackedSequences([session.cache for session in sessions], counts)
        ends = zip(inputs, np.cumsum(counts), strict=True)
        outputs = np.concatenate([np.arange(end - item.last, end) for item, end in ends])
        result = self.model(
            input_ids=ids,
            position_ids=torch.tensor(batch.positions()[None], device=device),
            logits_to_keep=torch.tensor(outputs, device=device),
            use_cache=False,
            attention_batch=batch,
        )
        batch.commit()
        return result.logits[0]

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

    def _choose_path(self) -> None:
        """Choose the fastest way to run the model that gives what forward passes of whole texts give."""
        from mixlm.engines.transformers.kv_cache import register

        config = self.model.config
        ids = self_test.sample_ids(self._vocab_size, self_test.trial_length(config))
        whole = self._whole_text_logits(ids)

        def trial() -> Iterator[tuple[Logits, Logits]]:
            a, b = self._test_session(), self._test_session()
            third, half, n = len(ids) // 3, len(ids) // 2, len(ids)
            for turn in (((a, third, 1), (b, 4, 1)), ((b, 5, 1), (a, n, 2)), ((a, 1, 1), (b, n, 3)), ((a, half, 1),)):
                requests = [(session, LogitsRequest(0, ids[:end], last)) for session, end, last in turn]
                outputs = self.respond(requests) if self.batches else [respond(*request) for request in requests]
                for (_, end, last), output in zip(turn, outputs, strict=True):
                    yield from zip(output, whole[end - last : end], strict=True)

        kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
        if "past_key_values" in self._parameters and kinds <= _CACHED_LAYERS:
            default = config._attn_implementation
            self.keeps_cache = True
            self.batches = kinds <= _BATCHED_LAYERS and register(self.model)
            if self.batches and self_test.passes(trial, *self_test.limit(self.model.dtype)):
                return
            self.batches = False
            self.model.set_attn_implementation(default)
            self.keeps_cache = self_test.passes(trial, *self_test.limit(self.model.dtype))
        if not self.keeps_cache:  # such models may work in blocks, or select some of the text
            selects = "index_topk" in self_test.special_lengths(config) and self.max_length > len(ids)
            self._whole_text_logits(ids, range(1 if selects else len(ids) - 9, len(ids)))

    def _whole_text_logits(self, ids: Ids, ends: Sequence[int] | None = None) -> Logits:
        """Return the logits after each prefix of a text, where the model gives them whatever follows.

        Args:
            ids: The text.
            ends: The lengths of prefixes that are tried alone; by default three.
        """
        ends = ends or (1, len(ids) // 2, len(ids) - 3)
        try:
            whole = self._test_session().logits(ids, len(ids))
            alone = [self._test_session().logits(ids[:end])[0] for end in ends]
        except MixlmError:
            raise
        except Exception as error:
            raise ModelLoadError(
                f"{self._name} ({self.model.config.model_type}) fails in its first forward pass: {first_line(error)}",
                "give a causal language model that transformers can run on text alone",
            ) from error
        tolerance, over = self_test.limit(self.model.dtype)
        distance = over([self_test.total_variation(row, whole[end - 1]) for row, end in zip(alone, ends, strict=True)])
        if not distance < (10 if over is max else 1) * tolerance:  # refused for more than what a slower way would mend
            raise UnsupportedError(
                f"{self._name} ({self.model.config.model_type}) gives another distribution after a text when more "
                f"tokens follow it (total variation {distance:.2g})",
                "name a causal language model: one whose tokens attend to those before them only",
            )
        return whole

    def _enable_graphs(self, *, capture: bool) -> bool:
        """Run short passes in fixed shapes where they give what the plain ones give: new, captured and replayed."""
        if not self.batches or self.frequencies is not None:
            return False
        from mixlm.engines.transformers.cuda_graphs import CudaGraphRunner

        ids = self_test.sample_ids(self._vocab_size)
        [expected] = self.run_unfiltered([SequenceInput(self._test_session(), ids, 4)])
        self.graphs = CudaGraphRunner(self.model, capture=capture)

        def trial() -> Iterator[tuple[Logits, Logits]]:
            session = self._test_session()
            self.run([SequenceInput(session, ids[:7], 1)])
            for position in range(7, len(ids) - 5):
                self.run([SequenceInput(session, ids[position : position + 1], 1)])
            length = session.cache.length
            for _ in range(3):
                session.cache.length = length
                [logits] = self.run_unfiltered([SequenceInput(session, ids[length:], 4)])
            yield from zip(logits, expected, strict=True)

        if self_test.passes(trial):
            return True
        self.graphs = None
        return False

    def _enable_run_ahead(self) -> None:
        """Run ahead where that gives what passes on request give, and where all tokens are sampled as on the host."""
        from mixlm.core.rng import Noise
        from mixlm.core.sampling import Transform
        from mixlm.engines.transformers.device_topk import DeviceTopK
        from mixlm.engines.transformers.run_ahead import DEPTH, DeviceSampler
        from mixlm.types import Sampling

        self.sampler = DeviceSampler(self.device_top_k or DeviceTopK())
        steps = 6

        def trial() -> Iterator[tuple[Logits, Logits]]:
            transform, noise = Transform(Sampling(top_k=4), np.zeros(0, dtype=np.int64)), Noise(0)
            session, symbols = self._test_session(), np.arange(self._vocab_size)
            ids, rows = np.zeros(1, dtype=np.int64), []
            for step in range(steps):
                keys = tuple(noise.at(ahead).sample_key for ahead in range(step, min(step + DEPTH, steps - 1)))
                hint = RunAheadHint(keys, transform.sampling, symbols) if keys else None
                [[row]] = self.run([SequenceInput(session, ids[-1:], 1, transform.top_k_filter, hint)])
                if not isinstance(row, Candidates):
                    raise ValueError("the row was not filtered")
                rows.append(row)
                distribution = transform(row)
                ids = np.append(ids, distribution.ids[noise.at(step).sample(*distribution)])
            if session.stats.run_ahead != steps - 1:
                raise ValueError("the device sampled other tokens")
            [expected] = self.run_unfiltered([SequenceInput(self._test_session(), ids[:-1], steps)])
            for row, whole in zip(rows, expected, strict=True):
                yield row.logprobs, whole[row.ids]

        if not self_test.passes(trial):
            self.sampler = None

    @property
    def _vocab_size(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    def _test_session(self) -> HFSession:
        return HFSession(self, 1 << 20)


@contextmanager
def memory_errors(name: str) -> Iterator[None]:
    """Turn torch's errors that mean that memory is out into MemoryLimitError. name: of the model."""
    import torch

    try:
        yield
    except MixlmError:
        raise
    except Exception as error:
        message = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in message for part in _NO_MEMORY):
            raise MemoryLimitError(
                f"the device has too little memory for {name}", "use --dtype bfloat16, or smaller members"
            ) from error
        raise
