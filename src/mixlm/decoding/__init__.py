"""Decoding strategies: how the next token of an ensemble is found. One file each; all sample the same law."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mixlm.decoding.base import Strategy
from mixlm.decoding.conventional import conventional, mix_then_truncate
from mixlm.decoding.gac import gac
from mixlm.decoding.greedy import greedy, greedy_alone
from mixlm.decoding.mixture import mixture
from mixlm.decoding.single import single
from mixlm.decoding.unite import unite
from mixlm.errors import UnsupportedError
from mixlm.sampling import Floats
from mixlm.settings import Settings

__all__ = ["strategy"]


def strategy(settings: Settings, weights: Floats, own: Sequence[Mapping[str, Any]]) -> Strategy:
    """Return the strategy that settings ask for. own: each member's own sampling options.

    `single` writes with the member of the largest weight, the first of them where several have it.
    """
    if settings.method == "single":
        heaviest = int(np.argmax(weights))
        return greedy_alone(heaviest) if settings.picks_most_likely(own[heaviest]) else single(heaviest)
    after = settings.after_mixing(own[0])
    if any(settings.after_mixing(one) != after for one in own):
        raise UnsupportedError(
            "members have sampling options of their own, and "
            f"{settings.rule or 'mix-then-truncate'} has one average to apply them to",
            "give the same options to all members",
        )
    if settings.rule is not None and after is not None:
        return {"gac": gac, "unite": unite}[settings.rule](after)
    if after is not None:
        return mix_then_truncate(after)
    return {"mixture": mixture, "conventional": conventional, "greedy": greedy}[settings.method]
