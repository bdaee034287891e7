"""The rules under test, with parameters."""

from __future__ import annotations

from typing import Any

from mixlm.core.combinations import Combination, combination
from mixlm.types import Sampling


def plain(**options: Any) -> Sampling:
    """Sampling options that are off unless given."""
    return Sampling(**{"temperature": 1.0, "top_k": 0, **options})


def _mean(**options: Any) -> Combination:
    return combination("mean-then-truncate").with_sampling(plain(**options))


RULES: dict[str, Combination] = {
    "average": combination("average"),
    "gac, T=.6": combination("gac").with_sampling(plain(temperature=0.6)),
    "geometric": combination("geometric"),
    "max": combination("max"),
    "min": combination("min"),
    "vote": combination("vote"),
    "contrastive": combination("contrastive"),
    "contrastive original": combination("contrastive", form="original", strength=1.0, alpha=0.3),
    "contrastive, T=.5": combination("contrastive").with_sampling(plain(temperature=0.5)),
    "contrastive of the expert": combination("contrastive", strength=0, alpha=0.2),
    "proxy": combination("proxy"),
    "proxy of the base": combination("proxy", strength=0),
    "guidance": combination("guidance"),
    "guidance between": combination("guidance", strength=0.4),
    "guidance of the prompt": combination("guidance", strength=1),
    "defer": combination("defer", strength=0.6),
    "defer by token": combination("defer", by="token", strength=0.3),
    "defer by entropy": combination("defer", by="entropy", strength=1.0),
    "defer by function": combination("defer", accept=lambda q: q**0.5),
    **{f"power {r}": combination("power", strength=r) for r in (1e-4, 0.2, 0.5, 0.9, 1, 1.3, 2, 5, -1, -3)},
    "mean, top-k 1": _mean(top_k=1),
    "mean, top-k 3": _mean(top_k=3),
    "mean, top-p .5": _mean(top_p=0.5),
    "mean, top-p .9": _mean(top_p=0.9),
    "mean, min-p .3": _mean(min_p=0.3),
    "mean, T=.5": combination("mean-then-temper").with_sampling(plain(temperature=0.5)),
    "mean, T=.7, top-k 3": _mean(temperature=0.7, top_k=3),
    "mean, T=.7, top-p .8": _mean(temperature=0.7, top_p=0.8),
    "mean, all": _mean(temperature=0.6, top_k=4, top_p=0.7, min_p=0.1),
    "mean, T=1.3": _mean(temperature=1.3),
    "mean, T=0": _mean(temperature=0.0),
    "union, k 2": combination("union-top-k", k=2),
    "union, k 10": combination("union-top-k"),
    "union, T=.6": combination("union-top-k").with_sampling(plain(top_k=2, temperature=0.6)),
    "union, top-p": combination("union-top-k").with_sampling(plain(top_k=3, top_p=0.7, min_p=0.1)),
    "union, T=0": combination("union-top-k").with_sampling(plain(top_k=3, temperature=0.0)),
}
