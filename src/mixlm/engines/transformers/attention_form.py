"""What a layer's attention computes of queries, keys and values: scaled dot products, and the variants of models.

Scores may be capped as in Gemma 2 (`softcap`), and each head may have a learned sink that takes probability and adds
nothing, as in gpt-oss (Xiao et al., 2024, arXiv 2309.17453). PyTorch's fused kernels know neither.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention


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

        Args:
            query: (sequences, KV heads, query heads of each · queries, head dimension).
            keys: (sequences, KV heads, keys, head dimension).
            values: (sequences, KV heads, keys, head dimension).
            mask: which keys each row attends to, or what is added to its scores; None for all keys.

        Returns:
            (sequences, KV heads, query heads of each · queries, head dimension).
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
