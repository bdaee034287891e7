"""Functions of a user's that change one member's logits: the first step of its transform `A_i`.

Such a function gets the member's own tokens and logits, so it sees that member alone, and the ensemble stays exact as
long as it depends on nothing else: equal arguments, equal results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mixlm.errors import ConfigError
from mixlm.types import Ids, Logits

LogitsProcessor = Callable[[Ids, Logits], Logits]


def as_processor(processor: Any) -> LogitsProcessor:
    """Return a function as it is; a `LogitsProcessor` of transformers, or a list of them, as a function.

    Raises:
        ConfigError: It cannot be called.
    """
    if not callable(processor):
        raise ConfigError(
            f"the logits processor is {processor!r}, which cannot be called",
            "give a function of ids, int64 (n,), and logits, float32 (vocab,), that returns logits",
        )
    if any(base.__module__.startswith("transformers.") for base in type(processor).__mro__):
        return lambda ids, logits: _from_transformers(processor, ids, logits)
    function: LogitsProcessor = processor
    return function


def process_logits(processor: LogitsProcessor, ids: Ids, logits: Logits) -> Logits:
    """Return a member's logits as its processor changes them: float32 (vocab,), -inf where they were.

    Args:
        processor: The function.
        ids: The member's tokens, prompt included, int64 (n,).
        logits: The logits after them, float32 (vocab,); not changed.

    Raises:
        ConfigError: The function returns something else than logits of this shape, or nan.
    """
    result = np.asarray(processor(ids.copy(), logits.copy()))
    fits = result.shape == logits.shape and result.dtype.kind == "f"
    if not fits or np.isnan(result).any():
        problem = "nan" if fits else f"{result.dtype}{result.shape}"
        raise ConfigError(
            f"a logits processor returned {problem} for logits of the shape {logits.shape}",
            "it must return an array of floating-point numbers of that shape",
        )
    return np.where(logits == -np.inf, -np.inf, result).astype(np.float32)


def _from_transformers(processor: Any, ids: Ids, logits: Logits) -> Logits:
    import torch

    changed: Logits = processor(torch.from_numpy(ids)[None], torch.from_numpy(logits)[None])[0].float().numpy()
    return changed
