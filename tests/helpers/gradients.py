"""What a network computes, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helpers.rollouts import TEMPERATURE
from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.models import Policy


def values_and_gradients(network: Any, seqs: Sequences) -> list[Tensor]:
    """Everything that a network says, and every parameter's gradient of a sum that weighs all of it differently."""
    said = network(seqs, temperature=TEMPERATURE) if isinstance(network, Policy) else (network(seqs),)
    generator = torch.Generator().manual_seed(4)
    total = sum((torch.randn(x.shape, generator=generator, dtype=torch.float64) * x).sum() for x in said)
    return [*(x.detach() for x in said), *torch.autograd.grad(total, list(network.parameters()))]
