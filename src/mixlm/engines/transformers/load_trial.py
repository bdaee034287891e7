"""Loading a model: trials of the ways to run its forward passes, and the runner with the fastest one that is right.

Every way must give what forward passes of whole texts give; `self_test` says how nearly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from mixlm.engines.base import respond
from mixlm.engines.requests import LogitsRequest
from mixlm.engines.tokenizer_setup import error_summary
from mixlm.engines.transformers import attention, self_test
from mixlm.engines.transformers.loaded_model import LoadedModel
from mixlm.engines.transformers.model_loading import vocabulary_size
from mixlm.engines.transformers.position_frequencies import unknown_frequencies
from mixlm.engines.transformers.prefix_cache import PrefixCache
from mixlm.engines.transformers.runner import ForwardPath, HFSession, ModelRunner
from mixlm.errors import MixlmError, ModelLoadError, UnsupportedError
from mixlm.types import Logits

# Kinds of layers that each path is tried for: a trial tells of others up to its own length only.
_BATCHED_LAYERS = {"full_attention", "sliding_attention"}
_RECURRENT_LAYERS = _BATCHED_LAYERS | {"linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "moe", "mlp"}
_LAYERS = {
    ForwardPath.PACKED: _BATCHED_LAYERS,
    ForwardPath.CROPPED: _BATCHED_LAYERS | {"chunked_attention"},
    ForwardPath.SNAPSHOTS: _RECURRENT_LAYERS,
    ForwardPath.STEPS: _RECURRENT_LAYERS,
}
_WITHOUT_STATE = (ForwardPath.PACKED, ForwardPath.CROPPED)


def load_runner(loaded: LoadedModel, graphs: str = "auto", prefix_cache_bytes: int = 0) -> ModelRunner:
    """Return the runner of a model, without an adapter.

    graphs: "auto" uses fixed shapes on CUDA where the model can, "on" wherever it can, "off" nowhere.
    prefix_cache_bytes: of texts that are kept for other sequences, 0 for none.

    Raises:
        ModelLoadError: the model cannot run.
        UnsupportedError: its answers do not depend on the text before them alone; or `graphs` is "on" and it cannot
            run in fixed shapes.
    """
    runner = _LoadTrial(loaded).fastest()
    cuda = loaded.model.device.type == "cuda"
    if graphs == "on" or (graphs == "auto" and cuda):
        from mixlm.engines.transformers.graph_trial import fixed_shapes

        fixed = fixed_shapes(runner, capture=cuda)
        if fixed is None and graphs == "on":
            raise UnsupportedError(
                f"{loaded.name} cannot run in fixed shapes", "leave graphs at auto, or set it to off"
            )
        runner = fixed or runner
    if prefix_cache_bytes and runner.keeps_cache:
        runner.prefixes = PrefixCache(prefix_cache_bytes)
    return runner


def varlen_kernels(device: torch.device) -> list[attention.VarlenKernel]:
    """Return the kernels that are installed for a device, in the order in which they are tried."""
    return [kernel for kernel in attention.KERNELS if device.type == "cuda" and find_spec(kernel.name) is not None]


class _LoadTrial:
    """The trials of one model."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._model = loaded.model
        self._called = f"{loaded.name} ({loaded.model.config.model_type})"
        self._tolerance = self_test.Tolerance.of(self._model.dtype)
        # What no path mends: from this distance on a model is refused.
        self._refused_from = self._tolerance.largest * (10 if self._tolerance.aggregate is max else 1)
        self._ids = self_test.sample_ids(vocabulary_size(self._model), self_test.trial_length(self._model.config))
        self._whole = ModelRunner(loaded, ForwardPath.WHOLE)

    def fastest(self) -> ModelRunner:
        """Return a runner on the fastest path that gives what forward passes of whole texts give."""
        config, ids = self._model.config, self._ids
        longest = self_test.max_length(config)
        if (rotary := unknown_frequencies(self._model, longest)) is not None:
            raise UnsupportedError(
                f"{self._called} gives every position other frequencies when the text gets longer ({rotary}), in a way "
                "that mixlm does not know",
                "give its config.json the rope_type with which it was trained",
            )
        expected = self._whole_text_logits((1, len(ids) // 2, len(ids) - 3))
        for kernel in varlen_kernels(self._model.device):
            runner = ModelRunner(self._loaded, ForwardPath.PACKED, kernel)
            if self._failure(runner, expected) is None:
                return runner
        not_batched = ""
        for path in _LAYERS:
            runner = ModelRunner(self._loaded, path)
            reason = self._failure(runner, expected)
            if reason is None:
                break
            not_batched = not_batched or reason
        else:
            # Such models may work in blocks, or select some of the text.
            selects = "index_topk" in self_test.special_lengths(config) and longest > len(ids)
            self._whole_text_logits(range(1 if selects else len(ids) - 9, len(ids)))
            runner = self._whole
        if not runner.batches:
            runner.path_details = {"forwards": runner.path.value, "not batched": not_batched}
        if runner.path in (ForwardPath.SNAPSHOTS, ForwardPath.STEPS):
            from mixlm.engines.transformers.snapshot_cache import MAX_SNAPSHOTS

            session = HFSession(runner)
            session.logits(ids)
            size = session.cache.copy_segment(len(ids), len(ids)).state_bytes / (1 << 20)
            runner.path_details["snapshots"] = f"up to {MAX_SNAPSHOTS} of {size:.3g} MiB for each sequence"
        return runner

    def _failure(self, runner: ModelRunner, expected: Logits) -> str | None:
        """Return why a path is not right for the model, None if it is."""
        config, path, ids = self._model.config, runner.path, self._ids
        kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
        if untried := kinds - _LAYERS[path]:
            return f"it has layers of the kind {', '.join(sorted(untried))}"
        if not runner.cache_name:
            return "its forward pass takes no cache"

        def trial() -> Iterator[tuple[Logits, Logits]]:
            a, b = (HFSession(runner) for _ in range(2))
            third, half, n = len(ids) // 3, len(ids) // 2, len(ids)
            turns = [[(a, third, 1), (b, 4, 1)], [(b, 5, 1), (a, n, 2)], [(a, 1, 1), (b, n, 3)], [(a, half, 1)]]
            if path not in _WITHOUT_STATE:
                turns.append([(b, 7, 1)])  # from a snapshot
            for turn in turns:
                requests = [(session, LogitsRequest(0, ids[:end], last)) for session, end, last in turn]
                outputs = runner.respond(requests) if runner.batches else [respond(*request) for request in requests]
                for (_, end, last), output in zip(turn, outputs, strict=True):
                    yield from zip(output, expected[end - last : end], strict=True)

        if path not in _WITHOUT_STATE:
            return self_test.failure(trial, self._tolerance, lambda: self._tolerance_with_state(expected))
        if path is ForwardPath.CROPPED:
            return self_test.failure(trial, self._tolerance)
        if not runner.selects_positions:
            return "its forward pass cannot return the logits of some positions alone"
        own_attention = config._attn_implementation
        failure: str | None = "its attention is code of its own"
        if attention.register(self._model):
            failure = self_test.failure(trial, self._tolerance)
        if failure is not None:
            self._model.set_attn_implementation(own_attention)
        return failure

    def _tolerance_with_state(self, expected: Logits) -> float:
        """Return the tolerance for paths that may have a recurrent state, which hands roundings on.

        In float32 it is larger where a change of the embeddings by one unit in the last place, which any other order of
        sums amounts to, changes the distributions about as much.
        """
        largest = self._tolerance.largest
        if self._tolerance.aggregate is not max:
            return largest

        def rounded(_: Any, __: Any, embeddings: Any) -> Any:
            return embeddings.nextafter(embeddings.flip(-1))

        try:
            with self._model.get_input_embeddings().register_forward_hook(rounded):
                changed = HFSession(self._whole).logits(self._ids, len(self._ids))
        except Exception:  # of a model without such embeddings
            return largest
        distance = self._tolerance.distance(zip(changed, expected, strict=True))
        return min(max(largest, 4 * distance), self._refused_from)

    def _whole_text_logits(self, ends: Sequence[int]) -> Logits:
        """Return the logits after each prefix of a text, where the model gives them whatever follows.

        ends: the lengths of prefixes that are tried alone.
        """
        ids = self._ids
        try:
            whole = HFSession(self._whole).logits(ids, len(ids))
            alone = [HFSession(self._whole).logits(ids[:end])[0] for end in ends]
        except MixlmError:
            raise
        except Exception as error:
            raise ModelLoadError(
                f"{self._called} fails in its first forward pass: {error_summary(error)}",
                "give a causal language model that transformers can run on text alone",
            ) from error
        if not np.isfinite(whole.max(axis=1)).all():
            raise ModelLoadError(
                f"{self._called} computes logits that are no numbers",
                "try --dtype float32; where that is no different, its weights are damaged",
            )
        distance = self._tolerance.distance(zip(alone, (whole[end - 1] for end in ends), strict=True))
        if not distance < self._refused_from:
            raise UnsupportedError(
                f"{self._called} gives another distribution after a text when more tokens follow it (total variation "
                f"{distance:.2g})",
                "name a causal language model: one whose tokens attend to those before them only",
            )
        return whole
