"""The base of policy and critic: runs its model over the responses of a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ibro_lightning.batches.sequences import Sequences
from ibro_lightning.models.randomness import DeterministicNetwork, is_shadow
from ibro_lightning.models.sharing import known_obstacle, why_not_shared
from ibro_lightning.models.transformer import backbone_of, check_packing, flat_response_states, response_states
from ibro_lightning.ranks import rank_zero_info


class ResponseNetwork(DeterministicNetwork):
    """A network around ``self.model`` whose outputs are read where they predict response tokens.

    Args:
        model: of transformers.
        packing: run micro-batches as one row without padding; see :meth:`check_packing`.
        share_prompts: run micro-batches without padding and each distinct prompt once, if the model allows it; see
            :meth:`settle_sharing`. Not with ``packing``, which runs every sequence whole.
    """

    def __init__(
        self, model: Any, *, gradient_checkpointing: bool = False, packing: bool = False, share_prompts: bool = True
    ) -> None:
        super().__init__(model, gradient_checkpointing=gradient_checkpointing)
        self.packing = packing
        self._shares_prompts = None if share_prompts and not packing else False  # None: not tried yet

    def check_packing(self) -> None:
        """Test packing, if it is on; raises ConfigError if sequences see each other."""
        if self.packing:
            check_packing(self.model, self.device)

    @property
    def shares_prompts(self) -> bool:
        """Whether each distinct prompt of a batch is run once; tried when this is first asked."""
        if self._shares_prompts is None:
            self.settle_sharing()
        return bool(self._shares_prompts)

    def settle_sharing(self) -> None:
        """Try to share prompts, if that is asked for and has not been tried; say so in one line if it cannot be."""
        if self._shares_prompts is not None:
            return
        if is_shadow(self.model):  # without values, nothing can be compared
            self._shares_prompts = known_obstacle(self.model) is None
            return
        if self._evaluated is None and self.training:
            DeterministicNetwork.ensure_deterministic(self)  # draws would differ, too
        reason = why_not_shared(self.model, *self._tried(), self.device)
        self._shares_prompts = reason is None
        if reason is not None:
            name = type(self.model).__name__
            rank_zero_info(f"{name}: prompts are run once per response, not once per group: {reason}")

    def response_states(self, model: Any, sequences: Sequences, output: str, *, after_last: bool = False) -> Tensor:
        """An output of ``model``, which is ``self.model`` or a part of it; see :func:`.response_states`. Prompts are
        shared once it is settled that they can be, which is not tried within a forward pass: after a backward pass in
        it, a sharded network has given its gathered weights back."""
        if self._shares_prompts:
            return flat_response_states(model, sequences, output, after_last=after_last)
        return response_states(model, sequences, output, after_last=after_last, packing=self.packing)

    def _tried(self) -> tuple[Any, str]:
        """The part of the model that is compared, and its output: a head may be 0, as a critic's is at first."""
        backbone = backbone_of(self.model)
        return (self.model, "logits") if backbone is None else (backbone, "last_hidden_state")
