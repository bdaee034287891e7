"""Loading a model: trials of the ways to run its forward passes, and the runner with the fastest one that is right.

Every way must give what forward passes of whole texts give; `self_test` says how nearly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from mixlm.engines.base import respond
from mixlm.engines.requests import LogitsRequest
from mixlm.engines.tokenizer_setup import error_summary
from mixlm.engines.transformers import self_test
from mixlm.engines.transformers.loaded_model import LoadedModel
from mixlm.engines.transformers.model_loading import vocabulary_size
from mixlm.engines.transformers.position_frequencies import unknown_frequencies
from mixlm.engines.transformers.runner import ForwardPath, ModelRunner
from mixlm.engines.transformers.session import HFSession
from mixlm.errors import MixlmError, ModelLoadError, UnsupportedError
from mixlm.types import Ids, Logits

if TYPE_CHECKING:
    from mixlm.engines.transformers.varlen import VarlenKernel

# Kinds of layers that each path is tried for: a trial tells of others up to its own length only.
_BATCHED_LAYERS = {"full_attention", "sliding_attention"}
_CROPPED_LAYERS = _BATCHED_LAYERS | {"chunked_attention"}
_RECURRENT_LAYERS = _BATCHED_LAYERS | {"linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "moe", "mlp"}

_WITHOUT_STATE = (ForwardPath.PACKED, ForwardPath.CROPPED)

Pairs = Iterator[tuple[Logits, Logits]]


def load_runner(loaded: LoadedModel, name: str, graphs: str = "auto", prefix_cache_bytes: int = 0) -> ModelRunner:
    """Return the runner of a model, without an adapter.

    Args:
        loaded: the model.
        name: of the model, for messages.
        graphs: "auto" uses fixed shapes on CUDA where the model can, "on" wherever it can, "off" nowhere.
        prefix_cache_bytes: of texts that are kept for other sequences, 0 for none.

    Raises:
        ModelLoadError: the model cannot run.
        UnsupportedError: its answers do not depend on the text before them alone; or `graphs` is "on" and it cannot
            run in fixed shapes.
    """
    runner = _LoadTrial(loaded, name).runner(graphs).with_prefix_cache(prefix_cache_bytes)
    loaded.runners[None] = runner
    return runner


def varlen_kernels(device: Any) -> list[VarlenKernel]:
    """Return the kernels that are installed for a device, in the order in which they are tried."""
    if device.type != "cuda":
        return []
    from mixlm.engines.transformers.varlen import KERNELS

    return [kernel for kernel in KERNELS if find_spec(kernel.name) is not None]


class _LoadTrial:
    """The trials of one model."""

    def __init__(self, loaded: LoadedModel, name: str) -> None:
        self._loaded = loaded
        self._model = loaded.model
        self._name = name
        self._vocab_size = vocabulary_size(self._model)
        self._tolerance, self._aggregate = self_test.tolerance_and_aggregate(self._model.dtype)

    def runner(self, graphs: str) -> ModelRunner:
        runner = self._choose_path()
        cuda = self._model.device.type == "cuda"
        if graphs == "on" or (graphs == "auto" and cuda):
            from mixlm.engines.transformers.graph_trial import fixed_shapes

            fixed = fixed_shapes(runner, self._name, capture=cuda)
            if fixed is None and graphs == "on":
                raise UnsupportedError(
                    f"{self._name} cannot run in fixed shapes", "leave graphs at auto, or set it to off"
                )
            runner = fixed or runner
        return runner

    def _choose_path(self) -> ModelRunner:
        """Return a runner on the fastest path that gives what forward passes of whole texts give."""
        config = self._model.config
        whole = ModelRunner(self._loaded, self._name, ForwardPath.WHOLE)
        if (rotary := unknown_frequencies(self._model, whole.max_length)) is not None:
            raise UnsupportedError(
                f"{self._name} ({config.model_type}) gives every position other frequencies when the text gets longer "
                f"({rotary}), in a way that mixlm does not know",
                "give its config.json the rope_type with which it was trained",
            )
        ids = self_test.sample_ids(self._vocab_size, self_test.trial_length(config))
        expected = self._whole_text_logits(whole, ids)
        details: dict[str, str] = {}
        for kernel in varlen_kernels(self._model.device):
            runner = ModelRunner(self._loaded, self._name, ForwardPath.PACKED, kernel=kernel)
            if self._failure(runner, ids, expected) is None:
                return runner
        for path in (ForwardPath.PACKED, ForwardPath.CROPPED, ForwardPath.SNAPSHOTS, ForwardPath.STEPS):
            runner = ModelRunner(self._loaded, self._name, path, details=details)
            larger = None if path in _WITHOUT_STATE else partial(self._tolerance_with_state, whole, ids, expected)
            reason = self._failure(runner, ids, expected, larger)
            if reason is None:
                return runner if path in _WITHOUT_STATE else self._with_snapshot_size(runner, ids, details)
            details.setdefault("not batched", reason)
        # Such models may work in blocks, or select some of the text.
        selects = "index_topk" in self_test.special_lengths(config) and whole.max_length > len(ids)
        self._whole_text_logits(whole, ids, range(1 if selects else len(ids) - 9, len(ids)))
        return ModelRunner(self._loaded, self._name, ForwardPath.WHOLE, details=details)

    def _with_snapshot_size(self, runner: ModelRunner, ids: Ids, details: dict[str, str]) -> ModelRunner:
        """Return a runner like this one that reports what a snapshot takes."""
        from mixlm.engines.transformers.snapshot_cache import MAX_SNAPSHOTS

        session = HFSession(runner, 1 << 20)
        session.logits(ids)
        size = session.cache.snapshot_bytes / (1 << 20)
        details["snapshots"] = f"up to {MAX_SNAPSHOTS} of {size:.3g} MiB for each sequence"
        return ModelRunner(self._loaded, self._name, runner.path, details=details)

    def _failure(
        self, runner: ModelRunner, ids: Ids, expected: Logits, larger: Callable[[], float] | None = None
    ) -> str | None:
        """Return why a path is not right for the model, None if it is. larger: as for `self_test.failure`."""
        from mixlm.engines.transformers.kv_cache import register

        config, path = self._model.config, runner.path
        kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
        tried = {ForwardPath.PACKED: _BATCHED_LAYERS, ForwardPath.CROPPED: _CROPPED_LAYERS}.get(path, _RECURRENT_LAYERS)
        if kinds - tried:
            return f"it has layers of the kind {', '.join(sorted(kinds - tried))}"
        if not runner.cache_name:
            return "its forward pass takes no cache"

        def trial() -> Pairs:
            a, b = (HFSession(runner, 1 << 20) for _ in range(2))
            third, half, n = len(ids) // 3, len(ids) // 2, len(ids)
            turns = [[(a, third, 1), (b, 4, 1)], [(b, 5, 1), (a, n, 2)], [(a, 1, 1), (b, n, 3)], [(a, half, 1)]]
            if path not in _WITHOUT_STATE:
                turns.append([(b, 7, 1)])  # from a snapshot
            for turn in turns:
                requests = [(session, LogitsRequest(0, ids[:end], last)) for session, end, last in turn]
                outputs = runner.respond(requests) if runner.batches else [respond(*request) for request in requests]
                for (_, end, last), output in zip(turn, outputs, strict=True):
                    yield from zip(output, expected[end - last : end], strict=True)

        if path is ForwardPath.PACKED and not runner.selects_positions:
            return "its forward pass cannot return the logits of some positions alone"

        attention = config._attn_implementation
        if path is ForwardPath.PACKED and not register(self._model):
            self._model.set_attn_implementation(attention)
            return "its attention is code of its own"
        failure = self_test.failure(trial, self._tolerance, self._aggregate, larger)
        if failure is not None and path is ForwardPath.PACKED:
            self._model.set_attn_implementation(attention)
        return failure

    def _tolerance_with_state(self, whole: ModelRunner, ids: Ids, expected: Logits) -> float:
        """Return the tolerance for paths that may have a recurrent state, which hands roundings on.

        In float32 it is larger where a change of the embeddings by one unit in the last place, which any other order of
        sums amounts to, changes the distributions about as much.
        """
        if self._aggregate is not max:
            return self._tolerance

        def rounded(_: Any, __: Any, embeddings: Any) -> Any:
            return embeddings.nextafter(embeddings.flip(-1))

        try:
            handle = self._model.get_input_embeddings().register_forward_hook(rounded)
            try:
                changed = HFSession(whole, 1 << 20).logits(ids, len(ids))
            finally:
                handle.remove()
        except Exception:  # of a model without such embeddings
            return self._tolerance
        return min(max(self._tolerance, 4 * self._distance(changed, expected)), self._refused_from)

    def _distance(self, a: Iterable[Logits], b: Iterable[Logits]) -> float:
        return self._aggregate([self_test.total_variation(*pair) for pair in zip(a, b, strict=True)])

    @property
    def _refused_from(self) -> float:
        """What no path mends: from this distance on a model is refused."""
        return (10 if self._aggregate is max else 1) * self_test.tolerance_and_aggregate(self._model.dtype)[0]

    def _whole_text_logits(self, runner: ModelRunner, ids: Ids, ends: Sequence[int] | None = None) -> Logits:
        """Return the logits after each prefix of a text, where the model gives them whatever follows.

        Args:
            runner: Runs whole texts.
            ids: The text.
            ends: The lengths of prefixes that are tried alone; by default three.
        """
        ends = ends or (1, len(ids) // 2, len(ids) - 3)
        try:
            whole = HFSession(runner, 1 << 20).logits(ids, len(ids))
            alone = [HFSession(runner, 1 << 20).logits(ids[:end])[0] for end in ends]
        except MixlmError:
            raise
        except Exception as error:
            raise ModelLoadError(
                f"{self._name} ({self._model.config.model_type}) fails in its first forward pass: "
                f"{error_summary(error)}",
                "give a causal language model that transformers can run on text alone",
            ) from error
        if not np.isfinite(whole.max(axis=1)).all():
            raise ModelLoadError(
                f"{self._name} ({self._model.config.model_type}) computes logits that are no numbers",
                "try --dtype float32; where that is no different, its weights are damaged",
            )
        distance = self._distance(alone, [whole[end - 1] for end in ends])
        if not distance < self._refused_from:
            raise UnsupportedError(
                f"{self._name} ({self._model.config.model_type}) gives another distribution after a text when more "
                f"tokens follow it (total variation {distance:.2g})",
                "name a causal language model: one whose tokens attend to those before them only",
            )
        return whole
