"""How many times as fast one method is as another: medians over repeats of the ratio within a repeat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from mixlm.benchmark.timing import TimedRun
from mixlm.ensemble import Ensemble

_PLAIN = ("conventional", "mixture")


def speed_ratios(ensemble: Ensemble, samples: Mapping[str, Sequence[TimedRun]]) -> dict[str, float]:
    """Return ratios of speeds by name, "faster/slower".

    Each method of the whole ensemble over `conventional`, `mixture` and each "single NAME"; "drafted/greedy"; and of
    `mixture`, where it was measured: over the members' own speeds weighted by how often each is drawn
    ("mixture/single", also by bytes), and over what its own forwards would allow if nothing else cost time
    ("mixture/forwards"). samples: by label.
    """
    singles = [f"single {name}" for name in ensemble.names]
    found: dict[str, float] = {}
    if "mixture" in samples:
        found |= _of_mixture(ensemble, samples, singles)
    for label, taken in samples.items():
        if label in singles:
            continue
        bases = [one for one in _PLAIN if label not in (one, "conventional")]
        bases += ["greedy"] if label == "drafted" else []
        for base in [*bases, *singles]:
            if base in samples:
                found[f"{label}/{base}"] = speed_ratio(taken, samples[base])
    return found


def rival_ratios(samples: Mapping[str, Sequence[TimedRun]], rivals: Sequence[str]) -> dict[str, float]:
    """Return the speed of each method of the ensemble over each rival's, and of each member alone over its own rival's.

    samples: by label, the rivals' among them.
    """
    own = [label for label in samples if label not in rivals]
    return {
        f"{label}/{rival}": speed_ratio(samples[label], samples[rival])
        for rival in rivals
        for label in own
        if not label.startswith("single ") or label.removeprefix("single ") == rival.removeprefix("transformers ")
    }


def speed_ratio(taken: Sequence[TimedRun], base: Sequence[TimedRun]) -> float:
    """Return how many times as many tokens a second."""
    return median(one.speed / other.speed for one, other in zip(taken, base, strict=True))


def _of_mixture(
    ensemble: Ensemble, samples: Mapping[str, Sequence[TimedRun]], singles: Sequence[str]
) -> dict[str, float]:
    mixture = samples["mixture"]
    found: dict[str, float] = {}
    if "conventional" in samples:
        found["mixture/conventional"] = speed_ratio(mixture, samples["conventional"])
    if all(one in samples for one in singles):
        own = [samples[one] for one in singles]

        def weighted(cost: Callable[[TimedRun], float]) -> float:
            """Return the mixture's speed over the members' own, where `cost` is what a unit of text takes."""
            weights: list[float] = ensemble.weights.tolist()
            return median(
                sum(w * cost(member[at]) for w, member in zip(weights, own, strict=True)) / cost(mixed)
                for at, mixed in enumerate(mixture)
            )

        if ensemble.unit.name != "byte":  # a byte is not as long as the members' own tokens
            found["mixture/single"] = weighted(lambda one: one.seconds / one.tokens)
        found["mixture/single (bytes)"] = weighted(lambda one: one.seconds / max(one.bytes, 1))
    found["mixture/forwards"] = median(one.inside / one.seconds for one in mixture)
    return found
