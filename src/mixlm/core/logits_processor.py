"""Functions of a user's that change one member's logits: the first step of its transform `A_i`.

Such a function gets the member's own tokens and logits, so it sees that member alone, and the ensemble stays exact as
long as it depends on nothing else: equal arguments, equal results.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mixlm.errors import ConfigError
from mixlm.option_spec import call_function, check_function
from mixlm.types import Ids, Logits, LogitsProcessor


def as_processor(processor: Any) -> LogitsProcessor:
    """Return a function as it is; a `LogitsProcessor` or `LogitsProcessorList` of transformers as one of arrays.

    Raises:
        ConfigError: It is no function of two arguments.
    """
    check_function(processor, ("ids", "logits"), "the logits processor")
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
        ConfigError: The function fails, or returns something else than logits of this shape, nan, or inf.
    """
    result = call_function(lambda: np.asarray(processor(ids.copy(), logits.copy())), "a logits processor")
    fits = result.shape == logits.shape and result.dtype.kind == "f"
    if not fits or np.isnan(result).any() or (result == np.inf).any():
        problem = f"{result.dtype}{result.shape}" if not fits else "nan" if np.isnan(result).any() else "inf"
        raise ConfigError(
            f"a logits processor returned {problem} for logits of the shape {logits.shape}",
            "it must return an array of floating-point numbers of that shape; -inf rules a token out",
        )
    return np.where(logits == -np.inf, -np.inf, result).astype(np.float32)


def _from_transformers(processor: Any, ids: Ids, logits: Logits) -> Logits:
    import torch

    changed: Logits = processor(torch.from_numpy(ids)[None], torch.from_numpy(logits)[None])[0].float().numpy()
    return changed
