"""Whether captured forward passes give what eager ones give, for tiny models of four families.

On CUDA passes are captured; elsewhere `--rehearse` runs the same fixed shapes uncaptured. Prints a line a family, and
exits with 1 where one differs. python -m research.scripts.graphs_check [--rehearse]
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mixlm.engines.base import Session
from mixlm.engines.transformers.load_trial import load_runner
from mixlm.engines.transformers.loaded_model import LoadedModel
from mixlm.engines.transformers.runner import HFSession

SIZES = {
    **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048},
}
FAMILIES = ("qwen2", "llama", "mistral", "gemma3_text")


def session(family: str, graphs: str, device: str) -> tuple[Session, dict[str, str]]:
    """Return a new sequence on a model of a family, equal for equal families, and how it runs."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES), dtype=torch.float32)
    runner = load_runner(LoadedModel(model.to(device).eval(), family), graphs)
    return HFSession(runner, 2048), runner.details


def main() -> int:
    rehearse = "--rehearse" in sys.argv
    device, graphs = ("cpu", "on") if rehearse else ("cuda", "auto")
    torch.backends.cuda.matmul.allow_tf32 = False
    worst = 0.0
    for family in FAMILIES:
        fixed, details = session(family, graphs, device)
        eager, _ = session(family, "off", device)
        ids = np.random.default_rng(1).integers(2, 512, 300)
        largest = 0.0
        for end in [40, *range(41, 60), 64, 72, 104, 90, 91, 92, 300, 301 - 2]:
            difference = np.abs(fixed.logits(ids[:end])[0] - eager.logits(ids[:end])[0]).max()
            largest = max(largest, float(difference))
        kind = details.get("short forwards", "eager")
        print(f"{family:12} {kind:18} largest difference of a logit {largest:.2g}", flush=True)
        worst = max(worst, largest if kind != "eager" else np.inf)
    return int(not worst < 1e-3)


if __name__ == "__main__":
    sys.exit(main())
