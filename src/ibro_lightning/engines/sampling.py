"""Sampling of the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from ibro_lightning.seeding import counter_uniforms
from ibro_lightning.types import SamplingParams


def sample_tokens(logits: Tensor, sampling: SamplingParams, seeds: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor]:
    """One token per row, with its log-prob under the sampling distribution: ``(tokens [B] int64, logp [B] float32)``.

    Uses inverse-CDF sampling with a uniform number that depends only on the row's seed and ``step``, so that samples do
    not depend on the composition of the batch. Greedy decoding reports log-probs at temperature 1.

    Args:
        logits: ``[B, V]``; seeds: ``[B]`` int64.
        step: index of the token in the response; ``[B]`` int64 if the rows are at different ones.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        logp = logits.log_softmax(dim=-1)
        tokens = logp.argmax(dim=-1)
    else:
        scaled = logits if sampling.temperature == 1 else logits / sampling.temperature
        logp = scaled.log_softmax(dim=-1)
        if sampling.truncates_distribution:
            logp = _truncate(logp, sampling).log_softmax(dim=-1)
        # float64, because in float32 the cumulative sum over a large vocabulary loses the tail. In place, because
        # fresh memory for several such tensors takes longer than computing them.
        cumulative = logp.double().exp_().cumsum_(dim=-1)
        draws = counter_uniforms(seeds, step) * cumulative[:, -1]
        # The first token whose cumulative probability exceeds the draw, hence never one of probability 0.
        tokens = torch.searchsorted(cumulative, draws[:, None], right=True).squeeze(-1)
    return tokens, logp.gather(-1, tokens[:, None]).squeeze(-1)


def _truncate(logp: Tensor, sampling: SamplingParams) -> Tensor:
    """``[B, V]`` log-probs with tokens excluded by top_k, top_p and min_p, in that order, set to −inf."""
    excluded = -torch.inf
    if 0 < sampling.top_k < logp.shape[-1]:
        kth = logp.topk(sampling.top_k, dim=-1).values[:, -1:]
        logp = logp.masked_fill(logp < kth, excluded).log_softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = logp.sort(dim=-1, descending=True, stable=True)
        before = ordered.double().exp().cumsum(dim=-1) - ordered.double().exp()
        drop = (before >= sampling.top_p).scatter(-1, order, before >= sampling.top_p)
        logp = logp.masked_fill(drop, excluded).log_softmax(dim=-1)
    if sampling.min_p > 0:
        floor = logp.max(dim=-1, keepdim=True).values + torch.log(torch.tensor(sampling.min_p))
        logp = logp.masked_fill(logp < floor, excluded)
    return logp
