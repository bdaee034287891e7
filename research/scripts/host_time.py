"""What a token takes on the host beside the forward: the model is taken out, and ready-made logits take its place.

"whole" hands over rows of the vocabulary, as a forward on the CPU does; "filtered" what top-k leaves, as one on a GPU
does. python -m research.scripts.host_time [tokens] [repeats]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np

from mixlm.benchmark.timing import EnsembleContestant
from mixlm.binding import LoadedMember
from mixlm.engines import EngineSpec
from mixlm.engines.batching import SequenceInput, SequenceOutput
from mixlm.engines.transformers.dummy_weights import SHAPES, DummyWeightsEngine
from mixlm.engines.transformers.runner import HFSession, ModelRunner
from mixlm.ensemble import Ensemble
from mixlm.types import Candidates

TINY: dict[str, Any] = {**SHAPES["qwen2.5-0.5b"], "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1}
METHODS, LENGTHS, TOP_K = ("mixture", "speculative"), (20, 1000, 7000), 20


def main() -> None:
    tokens, repeats = (int(number) for number in (*sys.argv[1:], 400, 5)[:2])
    engines = [DummyWeightsEngine(EngineSpec(f"shape:tiny#{i}", "", "bfloat16", "cpu"), TINY) for i in (1, 2)]
    pair = Ensemble([LoadedMember(engine, f"tiny-{i}") for i, engine in enumerate(engines)])
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(64, TINY["vocab_size"])).astype(np.float32)
    likely = np.sort(rng.choice(TINY["vocab_size"], TOP_K, replace=False))
    short = Candidates(likely, rows[0, likely])

    def taken_out(filtered: bool) -> Any:
        def run(_: ModelRunner, inputs: Sequence[SequenceInput]) -> list[SequenceOutput]:
            return [
                [short] * item.last if filtered and item.top_k_filter is not None else rows[: item.last]
                for item in inputs
            ]

        return patch.object(ModelRunner, "run", run)

    for method in METHODS:
        for words in LENGTHS:
            options = {"top_k": TOP_K, **({"draft": "tiny-0"} if method == "speculative" else {})}
            contestant = EnsembleContestant(pair, method, "the river " * (words // 2), options)
            times = []
            for filtered in (False, True):
                # The model has run nothing, so the cache stays empty; the session believes that it is there.
                with taken_out(filtered), patch.object(HFSession, "truncate", lambda _, length: length):
                    samples = [contestant.measure(repeat, tokens) for repeat in range(repeats + 1)][1:]
                times.append(1e6 * median(sample.seconds / sample.tokens for sample in samples))
            print(f"{method:12} prompt of {words:4} words: {times[0]:4.0f} us a token whole, {times[1]:4.0f} filtered")


if __name__ == "__main__":
    main()
