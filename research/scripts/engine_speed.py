"""Speed of the demo pair in two engines, on a machine that others use too: the best of several runs at each position.

Equal seeds give equal texts, so position by position the runs do the same; what is slower than the fastest of them is
the machine's other work. python -m research.scripts.engine_speed [tokens] [repeats]
"""

from __future__ import annotations

import sys
import time

import numpy as np

import mixlm
from mixlm.ensemble import Ensemble

PROMPT, MODELS = "Why is the sky blue?", ("smollm2-135m", "gemma-3-270m")


def seconds(ensemble: Ensemble, tokens: int, **options) -> list[float]:
    """Return the time of each token after the first."""
    stream = ensemble.stream(PROMPT, seed=1, max_tokens=tokens, ignore_end=True, **options)
    times = [time.perf_counter() for _ in stream]
    return np.diff(times).tolist()


def main() -> None:
    tokens, repeats = (int(number) for number in (*sys.argv[1:], 32, 5)[:2])
    pairs = {engine: mixlm.load(*MODELS, engine=engine) for engine in ("llamacpp", "hf")}
    runs: dict[tuple[str, str], list[list[float]]] = {}
    for _ in range(repeats):
        for engine, pair in pairs.items():
            runs.setdefault((engine, "mixture"), []).append(seconds(pair, tokens))
            for number, name in enumerate(MODELS):
                alone = Ensemble([pair.members[number]])
                runs.setdefault((engine, name), []).append(seconds(alone, tokens))
    for engine in pairs:
        best = {name: np.min(rounds, axis=0).mean() for (kind, name), rounds in runs.items() if kind == engine}
        single = sum(best[name] for name in MODELS) / len(MODELS)
        figures = " ".join(f"{name} {1 / value:.1f}" for name, value in best.items())
        print(f"{engine}: tokens/s {figures}; mixture / weighted single {single / best['mixture']:.2f}")


if __name__ == "__main__":
    main()
