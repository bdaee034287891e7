"""Trials of short forward passes in fixed shapes, and of running ahead, when a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

import numpy as np

from mixlm.core.rng import Noise
from mixlm.core.sampling import Transform
from mixlm.engines.batching import SequenceInput
from mixlm.engines.requests import RunAheadHint
from mixlm.engines.transformers import self_test
from mixlm.engines.transformers.cuda_graphs import CudaGraphRunner
from mixlm.engines.transformers.device_topk import DeviceTopK
from mixlm.engines.transformers.model_loading import vocabulary_size
from mixlm.engines.transformers.run_ahead import DEPTH, DeviceSampler
from mixlm.engines.transformers.runner import HFSession, ModelRunner
from mixlm.types import Candidates, Logits, Sampling


def fixed_shapes(plain: ModelRunner, *, capture: bool) -> ModelRunner | None:
    """Return a runner with short passes in fixed shapes, if they give what the plain ones give.

    They are tried new, captured and replayed. Where that is right too, the runner runs ahead. capture: whether they are
    captured as CUDA graphs.
    """
    if not plain.batches or plain.frequencies is not None:
        return None
    ids = self_test.sample_ids(vocabulary_size(plain.model))
    expected = HFSession(plain).logits(ids, 4)
    fixed = copy(plain)
    fixed.graphs = CudaGraphRunner(plain.model, capture=capture)

    def trial() -> Iterator[tuple[Logits, Logits]]:
        session = HFSession(fixed)
        session.forward(ids[:7], 1)
        for position in range(7, len(ids) - 5):
            session.forward(ids[position : position + 1], 1)
        length = session.cache.length
        for _ in range(3):
            session.cache.length = length
            logits = session.forward(ids[length:], 4)
        yield from zip(logits, expected, strict=True)

    if self_test.failure(trial) is not None:
        return None
    ahead = copy(fixed)
    ahead.sampler, ahead.run_ahead_depth = DeviceSampler(fixed.device_top_k or DeviceTopK()), DEPTH
    return ahead if self_test.failure(lambda: _run_ahead_trial(ahead)) is None else fixed


def _run_ahead_trial(runner: ModelRunner) -> Iterator[tuple[Logits, Logits]]:
    """Run ahead: yield the logits and those of passes on request. ValueError where tokens are not the host's."""
    steps = 6
    transform, noise = Transform(Sampling(top_k=4), np.zeros(0, dtype=np.int64)), Noise(0)
    session, symbols = HFSession(runner), np.arange(vocabulary_size(runner.model))
    ids, rows = np.zeros(1, dtype=np.int64), []
    for step in range(steps):
        keys = tuple(noise.at(ahead).sample_key for ahead in range(step, min(step + DEPTH, steps - 1)))
        hint = RunAheadHint(keys, transform.sampling, symbols) if keys else None
        [[row]] = runner.run([SequenceInput(session, ids[-1:], 1, transform.top_k_filter, hint)])
        if not isinstance(row, Candidates):
            raise ValueError("the row was not filtered")
        rows.append(row)
        distribution = transform(row)
        ids = np.append(ids, distribution.ids[noise.at(step).sample(*distribution)])
    if session.stats.run_ahead != steps - 1:
        raise ValueError("the device sampled other tokens")
    expected = HFSession(runner).logits(ids[:-1], steps)
    for row, whole in zip(rows, expected, strict=True):
        yield row.logprobs, whole[row.ids]
