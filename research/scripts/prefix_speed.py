"""What texts that are read once are worth: the prefix cache, and the state of recurrent models.

python -m research.scripts.prefix_speed [turn] [replies] [recurrent] [--repeats N] [--output FILE]

turn: the time to the first token of a second turn after 1,000 tokens, with a prefix cache and without. replies: the
first tokens of 16 completions of one prompt of 500 tokens: tokens that ran, over those of the prompt, and the time.
recurrent: a token after 2,000 others and one after 50, in models of dummy weights.

Each repeat of each case is a row of JSON, written when it is there; rows that the file has are not measured again, and
rows of another machine or dtype are refused. What is compared is measured in turn, in one process. The table at the end
has medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import mixlm
from mixlm.engines.transformers.load_trial import load_runner
from mixlm.engines.transformers.loaded_model import LoadedModel
from mixlm.engines.transformers.runner import HFSession
from mixlm.ensemble import Ensemble
from mixlm.resumable_log import ResumableLog
from research.scripts.measuring import measured_on

MEMBERS = {"smollm2-135m": ("smollm2-135m",), "demo pair": ("smollm2-135m", "gemma-3-270m")}
WORDS = ("the", "river", "and", "a", "light", "of", "every", "house", "in", "town", "went", "out", "when", "rain")
TURN_WORDS, PROMPT_WORDS, REPLIES, REPLY_TOKENS = 960, 480, 16, 32
SHORT, LONG, STEPS = 50, 2000, 16
_MAMBA = {"mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1}
_LINEAR = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_key_heads": 6}
# Layers as published, of Mamba 130M all and of Falcon-H1 0.5B 12 of its 36; Qwen3-Next is made small.
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50_280},
    "falcon_h1": {
        **_MAMBA,
        **{"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 32_784},
        **{"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "mamba_chunk_size": 128},
    },
    "qwen3_next": {
        **_LINEAR,
        **{"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 50_000},
        **{"num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 64, "linear_num_value_heads": 12},
        **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
        **{"shared_expert_intermediate_size": 256, "tie_word_embeddings": True},
    },
}

Row = dict[str, Any]


@cache
def ensembles(name: str) -> dict[str, Ensemble]:
    """Return the ensemble with a prefix cache and without."""
    sizes = {"with": 1024, "without": 0}
    return {kind: mixlm.load(*MEMBERS[name], engine="hf", prefix_cache=size) for kind, size in sizes.items()}


def words(count: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def forget(ensemble: Ensemble) -> None:
    for member in ensemble.members:
        member.engine.drop_prefixes()


def second_turn(name: str, repeat: int) -> Row:
    """Return the seconds to the first token of a second turn."""
    row: Row = {}
    for kind, ensemble in ensembles(name).items():
        forget(ensemble)
        turns = [{"role": "user", "content": words(TURN_WORDS, repeat)}]
        completion = ensemble.generate(turns, seed=repeat, max_tokens=REPLY_TOKENS, ignore_end=True)
        turns += [{"role": "assistant", "content": completion.text}, {"role": "user", "content": "And what came then?"}]
        start = time.perf_counter()
        stream = ensemble.stream(turns, seed=repeat, max_tokens=4, ignore_end=True)
        next(stream)
        row[kind] = time.perf_counter() - start
        usage = stream.finish().usage.members
        row[f"cached {kind}"] = {member: counts.cached_tokens for member, counts in usage.items()}
        row["prompt tokens"] = {member: counts.prompt_tokens for member, counts in usage.items()}
        stream.release()
    return {**row, "ratio": row["with"] / row["without"]}


def replies(name: str, repeat: int) -> Row:
    """Return what the first tokens of 16 completions of one prompt take."""
    row: Row = {}
    for kind, ensemble in ensembles(name).items():
        forget(ensemble)
        prompts = [words(PROMPT_WORDS, repeat)] * REPLIES
        start = time.perf_counter()
        completions = ensemble.generate(prompts, seed=repeat, max_tokens=1, ignore_end=True)
        row[kind] = time.perf_counter() - start
        usages = [completion.usage.members for completion in completions]
        row["prompt tokens"] = {member: counts.prompt_tokens for member, counts in usages[0].items()}
        for member, tokens in row["prompt tokens"].items():
            row[f"prefills {kind}, {member}"] = sum(usage[member].forward_tokens for usage in usages) / tokens
    return {**row, "ratio": row["with"] / row["without"]}


@cache
def recurrent_model(family: str, dtype: str) -> tuple[Any, dict[int, HFSession], Any]:
    """Return a runner of a model with dummy weights, sequences that have read a short and a long text, and the text."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **RECURRENT[family]))
    model = model.to(getattr(torch, dtype)).eval()
    runner = load_runner(LoadedModel(model, family))
    sessions = {length: HFSession(runner, 2 * LONG) for length in (SHORT, LONG)}
    ids = np.random.default_rng(0).integers(3, RECURRENT[family]["vocab_size"], 2 * LONG)
    for length, session in sessions.items():
        session.logits(ids[:length])
    return runner, sessions, ids


def recurrent(family: str, dtype: str) -> Callable[[str, int], Row]:
    def measured(name: str, repeat: int) -> Row:
        """Return the median seconds of a further token after a short and a long text, in turn."""
        runner, sessions, ids = recurrent_model(family, dtype)
        steps: dict[int, list[float]] = {length: [] for length in sessions}
        for _ in range(STEPS):
            for length, session in sessions.items():
                start = time.perf_counter()
                session.logits(ids[: session.num_cached + 1])
                steps[length].append(time.perf_counter() - start)
        short, long = (median(steps[length]) for length in (SHORT, LONG))
        return {
            "forwards": runner.path.value,
            "parameters": sum(parameter.numel() for parameter in runner.model.parameters()),
            f"after {SHORT}": short,
            f"after {LONG}": long,
            "ratio": long / short,
        }

    return measured


def cases(parts: list[str], dtype: str) -> Iterator[tuple[str, str, Callable[[str, int], Row]]]:
    """Yield each case's part, its name and what measures it."""
    for part in parts:
        if part == "recurrent":
            yield from ((part, family, recurrent(family, dtype)) for family in RECURRENT)
        else:
            yield from ((part, name, {"turn": second_turn, "replies": replies}[part]) for name in MEMBERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="turn, replies, recurrent; all of them by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="of recurrent models")
    parser.add_argument("--output", type=Path, default=Path("prefix_speed.jsonl"))
    arguments = parser.parse_args()
    parts = arguments.parts or ["turn", "replies", "recurrent"]
    if unknown := set(parts) - {"turn", "replies", "recurrent"}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}: there are turn, replies and recurrent")
    rows = ResumableLog(arguments.output, index="row", key="about", result="ratio")
    about = measured_on({"dtype": arguments.dtype})
    rows.check(about)
    for part, name, measure in cases(parts, arguments.dtype):
        names = [f"{part}, {name}, {repeat}" for repeat in range(arguments.repeats)]
        if any(rows.get(row, about) is None for row in names):
            measure(name, arguments.repeats)  # for warming up
        for repeat, row in enumerate(names):
            print(json.dumps(rows.get_or_make(row, about, partial(measure, name, repeat))), flush=True)
        if part == "recurrent":
            recurrent_model.cache_clear()
        gc.collect()
    for part, name, _ in cases(parts, arguments.dtype):
        own = [rows.records[f"{part}, {name}, {repeat}"] for repeat in range(arguments.repeats)]
        numbers = {key: median(row[key] for row in own) for key, value in own[0].items() if isinstance(value, float)}
        print(f"{part:10} {name:14} " + "  ".join(f"{key} {value:.4g}" for key, value in numbers.items()))


if __name__ == "__main__":
    main()
