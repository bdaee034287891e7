"""A trained `a(u)` for the rule `defer`: how much of each token a member keeps, from its own distribution.

It is trained by `mixlm.fitting.deferral`. A file of it is two, as that of a gate of a router.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mixlm.core.sampling import largest_indices
from mixlm.errors import ConfigError
from mixlm.routing.base import TOP_K
from mixlm.routing.gate import Array, Gate, saved_form
from mixlm.routing.gate_router import LOGPROB_FLOOR, TOP_K_FEATURES, VERSION, top_k_features
from mixlm.types import Floats

KIND = "deferral"
FEATURES = TOP_K_FEATURES + 5


class DeferralGate:
    """A trained `a(u)`; a token outside the member's `TOP_K` likeliest is never kept.

    Attributes:
        gate: A gate between keeping and asking.
        names: The member that it decides for, and the one that is asked.
    """

    def __init__(self, gate: Gate, names: Sequence[str]) -> None:
        if gate.members != 2 or gate.linear.shape[1] != FEATURES or len(names) != 2:
            raise ConfigError(f"a gate of rule defer for {', '.join(names)} has a matrix of shape {gate.linear.shape}")
        self.gate = gate
        self.names = tuple(names)

    @property
    def digest(self) -> str:
        """What tells it from gates with other numbers."""
        return self.gate.digest

    def __call__(self, distribution: Floats) -> Floats:
        """Return `a`, float64, the shape of the distribution."""
        count = min(TOP_K, distribution.size)
        a = np.zeros(distribution.shape)
        if not count:
            return a
        likely = largest_indices(distribution, count)
        likely = likely[distribution[likely] >= np.finfo(float).tiny]
        order = likely[np.argsort(-distribution[likely], kind="stable")][:TOP_K]
        logprobs = np.full((1, TOP_K), -np.inf)
        logprobs[0, : len(order)] = np.log(distribution[order])
        a[order] = self.kept(logprobs)[0, : len(order)]
        return a

    def kept(self, logprobs: Floats) -> Floats:
        """Return `a` of a member's likeliest tokens, (states, TOP_K), by their log-probabilities, descending."""
        kept: Floats = self.gate.weights(deferral_features(logprobs))[..., 0]
        return kept

    def save(self, path: str | Path) -> None:
        """Write the JSON at a path, and the numbers beside it, with the suffix .safetensors."""
        self.gate.save(path, {"kind": KIND, "version": VERSION, "members": list(self.names)})

    @classmethod
    def load(cls, path: str | Path) -> DeferralGate:
        """Read what `save` wrote. Raises ConfigError if the file is not one."""
        with saved_form(path, "gate of rule defer", "train one with mixlm fit --rule defer --router") as form:
            if form["kind"] != KIND:
                raise ValueError(f"its kind is {form['kind']!r}")
            if form["version"] != VERSION:
                raise ValueError(f"it is of version {form['version']}, and this mixlm reads version {VERSION}")
            names = [str(name) for name in form["members"]]
            return cls(Gate.load(path, form, 2, FEATURES), names)


def deferral_features(logprobs: Floats) -> Array:
    """Return what is known of each likely token, float32 (states, TOP_K, FEATURES).

    Statistics of the member's distribution; the token's log-probability, that under the likeliest one's, and its rank.

    Args:
        logprobs: Of the likeliest tokens, descending, float64 (states, TOP_K); -inf where there are no more.
    """
    states, count = logprobs.shape
    out = np.zeros((states, count, FEATURES), dtype=np.float32)
    out[:, :, :TOP_K_FEATURES] = top_k_features(logprobs)[:, None]
    clipped = np.maximum(logprobs, LOGPROB_FLOOR)
    out[:, :, TOP_K_FEATURES] = clipped
    out[:, :, TOP_K_FEATURES + 1] = clipped - clipped[:, :1]
    out[:, :, TOP_K_FEATURES + 2] = np.arange(count) / count
    out[:, 0, TOP_K_FEATURES + 3] = 1.0
    out[:, 1:2, TOP_K_FEATURES + 4] = 1.0
    return out
