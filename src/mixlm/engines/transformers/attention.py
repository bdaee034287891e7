"""Attention of transformers models: scaled dot products, and the variants of models; the forward pass decides of what.

Scores may be capped as in Gemma 2 (`softcap`), and each head may have a learned sink that takes probability and adds
nothing, as in gpt-oss (Xiao et al., 2024, arXiv 2309.17453). PyTorch's fused kernels know neither.

transformers finds `attend` by name (its attention interface) and hands it the keyword arguments of the model's forward:
among them `attention_batch`, which knows the sequences of the pass. `packed_sequences` has any number of sequences of
any lengths, `cuda_graphs` one sequence in fixed shapes.

On GPUs, kernels of torch and of flash-attn attend to sequences of different lengths in one call. They take the keys of
all sequences in one row, so they are copied there; that takes two kernels for each sequence, where attention sequence
by sequence takes eight and runs on a fraction of the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION_NAME = "mixlm"
# What transformers' layers hand on: the fields of an `AttentionForm`, and what changes nothing here.
_FORM_OPTIONS = ("sliding_window", "scaling", "softcap", "s_aux")
_OTHER_OPTIONS = {
    *("dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions"),
    "output_router_logits",
}

QueryKeyValue = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # (1, heads, tokens, head dimension) each


class AttentionForm(NamedTuple):
    """The form of one layer's attention.

    window: how many tokens, itself included, a token attends to; None for all before it. scale: of the scores; None for
    torch's default. softcap: the bound of scores, None for none. sinks: a score for each query head, None for none.
    """

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend with the query heads that share a KV head stacked as further queries: nothing has to be repeated.

        query: (sequences, KV heads, query heads of each · queries, head dimension), as what is returned. keys, values:
        (sequences, KV heads, keys, head dimension). mask: which keys each row attends to, or what is added to its
        scores; None for all keys.
        """
        if self.softcap is None and self.sinks is None:
            return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self.scale)
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = (query @ keys.transpose(2, 3) * scale).float()
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
        if self.sinks is not None:
            sequences, heads, rows, _ = scores.shape
            column = self.sinks.float().view(heads, -1, 1).expand(-1, -1, rows * heads // self.sinks.numel())
            scores = torch.cat([scores, column.reshape(heads, rows, 1).expand(sequences, -1, -1, -1)], dim=3)
        weights = scores.softmax(dim=3)[..., : keys.shape[2]]
        return weights.to(values.dtype) @ values


def causal_mask(positions: torch.Tensor, keys: int, window: int | None) -> torch.Tensor:
    """Return which keys queries at these positions attend to: bool (queries, keys)."""
    distance = positions[:, None] - torch.arange(keys, device=positions.device)
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    attention_batch: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each sequence of a forward pass's `attention_batch`.

    Its method `attend(layer, (query, key, value), form)` gets those of all tokens of the pass and returns (1, tokens,
    query heads, head dimension). Raises NotImplementedError where a model needs more than an `AttentionForm`.
    """
    form = AttentionForm(*(options.pop(name, None) for name in _FORM_OPTIONS))
    if unsupported := [name for name, option in options.items() if name not in _OTHER_OPTIONS and option is not None]:
        raise NotImplementedError(f"attention with {', '.join(unsupported)}")
    if attention_batch is None:
        raise NotImplementedError("its layers do not hand on what its forward pass is given")
    return attention_batch.attend(module.layer_idx, (query, key, value), form), None


def register(model: Any) -> bool:
    """Let a model attend with `attend`. Returns whether it can."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attend)
    try:
        model.set_attn_implementation(ATTENTION_NAME)
    except Exception:  # each family refuses in its own way
        return False
    return bool(model.config._attn_implementation == ATTENTION_NAME)


class Lengths(NamedTuple):
    """Of the sequences: where the queries and keys of each begin and those of the last end, int32 (sequences + 1,)."""

    queries: torch.Tensor
    keys: torch.Tensor
    max_queries: int
    max_keys: int


class VarlenKernel(NamedTuple):
    """A kernel and its name, for display.

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
    """Return how many keys before and after its own a query attends to, -1 for all before it."""
    return (-1 if form.window is None else form.window - 1), 0


KERNELS = (VarlenKernel("torch.nn.attention.varlen", _torch_varlen), VarlenKernel("flash_attn", _flash_attn))
