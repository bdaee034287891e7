"""Attention of sequences of different lengths in one call: kernels for GPUs, of torch and of flash-attn.

Which one a model uses is tried when it is loaded, as everything else is (`load_trial`). Both take the keys of all
sequences in one row, so they are copied there; that takes two kernels for each sequence, where attention sequence by
sequence takes eight and runs on a fraction of the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mixlm.engines.transformers.attention import AttentionForm


class Lengths(NamedTuple):
    """Of the sequences: where the queries and keys of each begin and those of the last end, int32 (sequences + 1,)."""

    queries: torch.Tensor
    keys: torch.Tensor
    max_queries: int
    max_keys: int


class VarlenKernel(NamedTuple):
    """A kernel and its name, for reports.

    attend: takes queries, keys and values of all sequences, (tokens, heads, head dimension), and returns what the
        queries attend to in that form. The last query of a sequence attends to all of its keys, the one before it to
        all but one. Raises NotImplementedError for a form that it does not know.
    """

    name: str
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Lengths, AttentionForm], torch.Tensor]


def _torch_varlen(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: Lengths, form: AttentionForm
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if form.softcap is not None or form.sinks is not None:
        raise NotImplementedError("its attention caps scores, or has sinks")
    options: dict[str, Any] = {"scale": form.scale, "window_size": _window(form)}
    if query.shape[1] != keys.shape[1]:
        options["enable_gqa"] = True
    attended = varlen_attn(query, keys, values, *lengths, **options)
    assert isinstance(attended, torch.Tensor)
    return attended


def _flash_attn(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: Lengths, form: AttentionForm
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    if form.sinks is not None:
        raise NotImplementedError("its attention has sinks")
    attended: torch.Tensor = flash_attn_varlen_func(
        query,
        keys,
        values,
        *lengths,
        softmax_scale=form.scale,
        causal=True,
        window_size=_window(form),
        softcap=form.softcap or 0.0,
    )
    return attended


def _window(form: AttentionForm) -> tuple[int, int]:
    """Return how many keys before and behind its own a query attends to, -1 for all before it."""
    return (-1 if form.window is None else form.window - 1), 0


KERNELS = (VarlenKernel("torch.nn.attention.varlen", _torch_varlen), VarlenKernel("flash_attn", _flash_attn))
