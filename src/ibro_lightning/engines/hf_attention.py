"""Attention of one new token per row, in the embedded engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "ibro_lightning_grouped"
"""Name under which transformers finds :func:`grouped_attention`."""


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' ``sdpa``, computing the heads that share keys and values as queries of one head, without copies.

    Given a mask, ``sdpa`` first copies keys and values for each head.

    Args:
        query: ``[B, H, L, D]``; anything but one new token per row is left to ``sdpa``.
        key, value: ``[B, K, S, D]``, where ``K`` divides ``H``.
        attention_mask: ``[B, 1, 1, S]``, added to the scores.

    Returns:
        ``[B, L, H, D]``, and None for the weights.
    """
    own_bias = position_bias is not None or (attention_mask is not None and attention_mask.shape[1] != 1)
    if query.shape[2] != 1 or own_bias or (attention_mask is not None and attention_mask.dtype == torch.bool):
        bias = {} if position_bias is None else {"position_bias": position_bias}
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **bias, **others)
    batch, heads, _, size = query.shape
    shared = key.shape[1]
    queries = query.reshape(batch, shared, heads // shared, size)
    output = scaled_dot_product_attention(queries, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(batch, 1, heads, value.shape[3]), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
