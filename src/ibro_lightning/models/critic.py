"""PPO's critic: the policy's backbone with a scalar head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.models.randomness import StillNetwork, remove_dropout
from ibro_lightning.models.transformer import check_packing, response_states


class Critic(StillNetwork):
    """Estimates the return to come before every response token.

    A transformers token classifier with one label, so that it is saved and loaded as a Hugging Face folder.

    Args:
        model: ``AutoModelForTokenClassification`` with ``num_labels=1``, as :meth:`PolicySource.build_critic` makes it.
        packing: run micro-batches as one row without padding.
    """

    def __init__(self, model: Any, *, gradient_checkpointing: bool = False, packing: bool = False) -> None:
        super().__init__()
        self.model = model
        self.packing = packing
        remove_dropout(model)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.train()

    def forward(self, sequences: Sequences) -> Tensor:
        """``[B, T + 1]`` values, in at least float32: column t is the value before response token t, and column
        ``response_lengths`` that after the last one; 0 beyond."""
        values = self.without_draws(
            lambda: response_states(self.model, sequences, "logits", after_last=True, packing=self.packing).squeeze(-1)
        )
        values = values if values.dtype == torch.float64 else values.float()
        columns = torch.arange(sequences.max_response_length + 1, device=values.device)
        exists = columns[None, :] <= sequences.response_lengths[:, None]
        return torch.zeros(exists.shape, dtype=values.dtype, device=values.device).masked_scatter(exists, values)

    def check_packing(self) -> None:
        """Test packing, if it is on; raises ConfigError if sequences see each other."""
        if self.packing:
            check_packing(self.model, self.device)
