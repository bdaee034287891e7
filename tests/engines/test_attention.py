"""Attention with capped scores and with sinks, against the functions of transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as of_gemma2
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as of_gpt_oss

from mixlm.engines.transformers.attention import AttentionForm, causal_mask

HEADS, GROUPS, QUERIES, KEYS, SIZE = 2, 3, 4, 9, 8


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", ["softcap", "sinks"])
def test_attention_is_that_of_transformers(kind: str, window: int | None, additive: bool) -> None:
    torch.manual_seed(0)
    query = 3 * torch.randn(2, HEADS * GROUPS, QUERIES, SIZE)
    keys, values = (torch.randn(2, HEADS, KEYS, SIZE) for _ in range(2))
    sinks = torch.randn(HEADS * GROUPS)
    allowed = causal_mask(torch.arange(KEYS - QUERIES, KEYS), KEYS, window)
    added = torch.zeros(QUERIES, KEYS).masked_fill(~allowed, -torch.inf)
    module: Any = SimpleNamespace(num_key_value_groups=GROUPS, training=False, sinks=sinks, head_dim=SIZE)
    if kind == "softcap":
        expected, _ = of_gemma2(module, query, keys, values, added[None, None], scaling=0.4, softcap=2.0)
        form = AttentionForm(window, 0.4, softcap=2.0)
    else:
        expected, _ = of_gpt_oss(module, query, keys, values, added[None, None], scaling=0.4)
        form = AttentionForm(window, 0.4, sinks=sinks)
    grouped = query.reshape(-1, HEADS, GROUPS * QUERIES, SIZE)
    mask = (added if additive else allowed).repeat(GROUPS, 1)
    actual = form.attend(grouped, keys, values, mask).view(-1, HEADS * GROUPS, QUERIES, SIZE).transpose(1, 2)
    torch.testing.assert_close(actual, expected)
    plain = AttentionForm(window, 0.4).attend(grouped, keys, values, mask)
    assert (plain.view(-1, HEADS * GROUPS, QUERIES, SIZE).transpose(1, 2) - actual).abs().max() > 0.01
