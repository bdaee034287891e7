"""Decode passes of several sequences: attention in one call where that is possible, against one call a sequence.

python -m research.scripts.batch_attention [MODEL] [--at 16x2000,16x256,…] [--dtype NAME] [--rounds N]

16x2000 are 16 sequences after 2,000 tokens each, 16x2000m after 1,000 to 2,000. Their KV caches are filled with a
number, and a pass runs one token of each. Both ways run in turn, in one process, on one model: what differs is whether
KV buffers lie side by side. "attention" is the share of the passes' time, sequence by sequence.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import numpy as np
import torch

from mixlm.engines import EngineSpec, load
from mixlm.engines.batching import SequenceInput
from mixlm.engines.transformers.kv_cache import KVBufferPool, KVCache
from mixlm.engines.transformers.packed_sequences import PackedSequences
from mixlm.engines.transformers.runner import HFSession
from research.scripts.measuring import timed_calls

CASES = "1x256,4x256,16x256,64x256,4x2000,16x2000,16x2000m,16x4000"
SLOTS = {"by itself": 1, "together": 16}


def sequence(engine, pool: KVBufferPool, length: int, rounds: int) -> HFSession:
    """Return a session whose KV cache holds so many tokens."""
    session, config = engine.session(), engine.model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    like = torch.empty(config.num_key_value_heads, 1, size, dtype=engine.model.dtype)
    session.cache = KVCache(pool)
    with torch.inference_mode():
        buffer = session.cache.reserve(length + rounds)
        for layer in range(config.num_hidden_layers):
            for tensor in buffer.layer(layer, like, like):
                tensor[:, :length] = 0.5
    session.cache.length = length
    return session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--at", default=CASES)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    engine = load(EngineSpec(arguments.model, "", arguments.dtype, "cpu", engine="hf", prefix_cache=0))
    print(f"{arguments.model}, {engine.details['dtype']}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for case in arguments.at.split(","):
        count, _, behind = case.partition("x")
        length, rng = int(behind.rstrip("m")), np.random.default_rng(0)
        lengths = rng.integers(length // 2, length, int(count)) if behind.endswith("m") else [length] * int(count)
        times: dict[str, list[float]] = {name: [] for name in SLOTS}
        work: dict[str, list[float]] = {name: [] for name in SLOTS}
        shares = []
        pools = {name: KVBufferPool(slots=slots) for name, slots in SLOTS.items()}
        sessions = {
            name: [sequence(engine, pool, int(each), arguments.rounds) for each in lengths]
            for name, pool in pools.items()
        }
        for turn in range(arguments.rounds):
            for name, group in sessions.items():
                with timed_calls(PackedSequences, "attend") as attention:
                    worked, start = time.process_time(), time.perf_counter()
                    engine.runner.run([SequenceInput(session, np.array([5]), 1) for session in group])
                    seconds, worked = time.perf_counter() - start, time.process_time() - worked
                if turn:  # the first is for warming up
                    times[name].append(seconds)
                    work[name].append(worked)
                    if name == "by itself":
                        shares.append(sum(attention) / seconds)
        (alone, together), (own, shared) = ([1000 * median(each[name]) for name in SLOTS] for each in (times, work))
        print(
            f"{case:9} ms a pass: by itself {alone:.1f}, together {together:.1f}, {alone / together:.2f} times; "
            f"ms of processor time {own:.1f} and {shared:.1f}; attention {median(shares):.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
