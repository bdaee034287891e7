"""Errors that mean that memory is out: one type for all that torch and the system raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mixlm.errors import MemoryLimitError, MixlmError

# What torch, safetensors and the system say when memory is out, where the error has no type of its own.
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory")


def is_memory_error(error: Exception) -> bool:
    """Whether an error means that memory is out."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return not isinstance(error, MixlmError) and any(part in str(error).lower() for part in _NO_MEMORY)


@contextmanager
def memory_errors(name: str) -> Iterator[None]:
    """Turn errors that mean that memory is out into MemoryLimitError. name: of the model."""
    try:
        yield
    except Exception as error:
        if is_memory_error(error):
            raise MemoryLimitError(
                f"the device has too little memory for {name}", "use --dtype bfloat16, or smaller members"
            ) from error
        raise
