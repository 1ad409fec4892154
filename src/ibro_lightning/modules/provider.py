"""The interface between our datamodules and a LightningModule of the user's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.functional import logprob_and_entropy
from ibro_lightning.models import Policy
from ibro_lightning.models.hf_folder import full_weights
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.models.transformer import response_states, scatter_rows
from ibro_lightning.types import Dtype

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as Base
else:
    Base = object


class PolicyProviderMixin(Base):
    """Lets a LightningModule with a loss of its own train on :class:`~ibro_lightning.datamodules.RolloutDataModule`::

        class Mine(PolicyProviderMixin, pl.LightningModule):
            def __init__(self, model, tokenizer):
                super().__init__()
                self.policy, self.tokenizer = Policy(model), tokenizer

    Each training batch is a :class:`~ibro_lightning.batches.Rollout`. The members are those of
    :class:`~ibro_lightning.engines.base.PolicyProvider`, which a module may also define itself.
    """

    policy: Any
    """A :class:`~ibro_lightning.models.Policy`, or a transformers causal language model; whole on every process."""
    tokenizer: Any
    min_group_size = 1
    """The responses to one prompt that the loss needs: 2 if it compares them."""
    learns_off_policy = False
    """Whether the loss weighs tokens by π_old/π_sampler, as ``data.max_staleness`` needs."""

    @property
    def language_model(self) -> Any:
        """The transformers model."""
        return self.policy.model if isinstance(self.policy, Policy) else self.policy

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's EOS, then those of the model's generation config."""
        generation = getattr(self.language_model, "generation_config", None)
        others = getattr(generation, "eos_token_id", None) or ()
        return tuple(dict.fromkeys([self.tokenizer.eos_token_id, *([others] if isinstance(others, int) else others)]))

    def model_spec(self) -> ModelSpec:
        # Not self.device: datamodules are set up before the module moves to its device.
        return ModelSpec(self.language_model.config, self.eos_token_ids, self.trainer.strategy.root_device)

    def named_full_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from full_weights(self.language_model)

    @property
    def compute_dtype(self) -> Dtype:
        dtype = str(next(self.language_model.parameters()).dtype).removeprefix("torch.")
        return "bfloat16" if self.trainer.precision == "bf16-mixed" else dtype  # type: ignore[return-value]

    @torch.no_grad()
    def response_logp(self, sequences: Sequences, temperature: float) -> Tensor:
        """``[B, T]`` log-probs of the response tokens, without dropout."""
        sequences = sequences.to(self.device)
        # Called while a batch is generated, where Lightning has not set the precision.
        with self.trainer.precision_plugin.forward_context():
            if isinstance(self.policy, Policy):
                logp, _ = self.policy(sequences, temperature=temperature, with_entropy=False)
                return logp
            training = self.policy.training
            logits = response_states(self.policy.eval(), sequences, "logits")  # [N, V], N response tokens
            self.policy.train(training)
            targets = sequences.input_ids[sequences.is_response]
            logp, _ = logprob_and_entropy(logits, targets, temperature=temperature, with_entropy=False)
            return scatter_rows(logp, sequences.response_mask)
