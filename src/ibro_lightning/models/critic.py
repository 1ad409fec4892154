"""PPO's critic: the policy's backbone with a scalar head."""

from __future__ import annotations

import torch
from torch import Tensor

from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.models.network import ResponseNetwork


class Critic(ResponseNetwork):
    """Estimates the return to come before every response token.

    A transformers token classifier with one label (``AutoModelForTokenClassification``, as
    :meth:`PolicySource.build_critic` makes it), so that it is saved and loaded as a Hugging Face folder.
    """

    def forward(self, sequences: Sequences) -> Tensor:
        """``[B, T + 1]`` values, in at least float32: column t is the value before response token t, and column
        ``response_lengths`` that after the last one; 0 beyond."""
        values = self.without_draws(
            lambda: self.response_states(self.model, sequences, "logits", after_last=True).squeeze(-1)
        )
        values = values if values.dtype == torch.float64 else values.float()
        columns = torch.arange(sequences.max_response_length + 1, device=values.device)
        exists = columns[None, :] <= sequences.response_lengths[:, None]
        return torch.zeros(exists.shape, dtype=values.dtype, device=values.device).masked_scatter(exists, values)
