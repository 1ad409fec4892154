"""Log-probs of given tokens, and the entropy of the distribution they come from."""

from __future__ import annotations

import torch
from torch import Tensor


def logprob_and_entropy(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, with_entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """``log π(target)`` and ``H(π)`` of ``π = softmax(logits / temperature)``, in nats, computed in at least float32.

    Args:
        logits: ``[..., V]``; ``targets``: ``[...]`` int64. Entries of −inf (a masked vocabulary) are allowed.
        temperature: the *sampling* temperature; scoring at any other is off by nats.
        with_entropy: when False the entropy is neither computed nor returned (None).

    Returns:
        ``(logp [...], entropy [...] or None)``, float32 (float64 for float64 logits), both differentiable.
    """
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    logp_all = logits.log_softmax(dim=-1)  # [..., V]
    logp = logp_all.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # [...]
    if not with_entropy:
        return logp, None
    # p·log p → 0 as p → 0; without the guard a masked token gives 0·(−inf) = nan.
    entropy = -(logp_all.exp() * logp_all.clamp(min=torch.finfo(logp_all.dtype).min)).sum(dim=-1)
    return logp, entropy
