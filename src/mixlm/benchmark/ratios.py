"""Speed ratios between methods: medians over repeats of the ratio within a repeat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from mixlm.benchmark.timing import TimedRun
from mixlm.ensemble import Ensemble

_PLAIN = ("conventional", "mixture")


def speed_ratios(ensemble: Ensemble, runs: Mapping[str, Sequence[TimedRun]]) -> dict[str, float]:
    """Return speed ratios by name, such as "mixture/conventional". runs: by label.

    Each method of the whole ensemble is compared with `conventional`, `mixture` and each "single NAME", and drafted
    with greedy. `mixture` is also compared with the members' own speeds, weighted by how often each is sampled
    ("mixture/single", also by bytes), and with the speed that its forwards alone would allow ("mixture/forwards").
    """
    singles = [f"single {name}" for name in ensemble.names]
    ratios: dict[str, float] = {}
    if "mixture" in runs:
        ratios |= _of_mixture(ensemble, runs, singles)
    for label, repeats in runs.items():
        if label in singles:
            continue
        bases = [plain for plain in _PLAIN if label not in (plain, "conventional")]
        bases += ["greedy"] if label == "drafted" else []
        for base in [*bases, *singles]:
            if base in runs:
                ratios[f"{label}/{base}"] = speed_ratio(repeats, runs[base])
    return ratios


def rival_ratios(runs: Mapping[str, Sequence[TimedRun]], rivals: Sequence[str]) -> dict[str, float]:
    """Return the ratio of each method to each rival, and of each member alone to its own rival.

    runs: by label, the rivals' included.
    """
    methods = [label for label in runs if label not in rivals]
    return {
        f"{label}/{rival}": speed_ratio(runs[label], runs[rival])
        for rival in rivals
        for label in methods
        if not label.startswith("single ") or label.removeprefix("single ") == rival.removeprefix("transformers ")
    }


def speed_ratio(runs: Sequence[TimedRun], base_runs: Sequence[TimedRun]) -> float:
    """Return the median ratio of tokens per second."""
    return median(run.speed / base_run.speed for run, base_run in zip(runs, base_runs, strict=True))


def _of_mixture(ensemble: Ensemble, runs: Mapping[str, Sequence[TimedRun]], singles: Sequence[str]) -> dict[str, float]:
    mixture = runs["mixture"]
    ratios: dict[str, float] = {}
    if "conventional" in runs:
        ratios["mixture/conventional"] = speed_ratio(mixture, runs["conventional"])
    if all(single in runs for single in singles):
        members = [runs[single] for single in singles]

        def weighted(cost: Callable[[TimedRun], float]) -> float:
            """Return the mixture's speed over the members' weighted speeds. cost: seconds per unit of text."""
            weights: list[float] = ensemble.weights.tolist()
            return median(
                sum(w * cost(member[i]) for w, member in zip(weights, members, strict=True)) / cost(mixed)
                for i, mixed in enumerate(mixture)
            )

        if not ensemble.unit.traits.counts_bytes:  # a byte is not as long as the members' own tokens
            ratios["mixture/single"] = weighted(lambda run: run.seconds / run.tokens)
        ratios["mixture/single (bytes)"] = weighted(lambda run: run.seconds / max(run.bytes, 1))
    ratios["mixture/forwards"] = median(run.inside / run.seconds for run in mixture)
    return ratios
