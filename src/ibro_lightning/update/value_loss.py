"""The critic's loss of PPO (arXiv 1707.06347) on a micro-batch, a token mean over the whole optimizer step."""

from __future__ import annotations

from torch import Tensor

from ibro_lightning.batches.experience import Experience
from ibro_lightning.functional import clipped_value_loss, token_mean
from ibro_lightning.regularizers import StepContext
from ibro_lightning.update.loop import Loop


class ValueLoss:
    """``½·max((V − R)², (clip(V, V_old ± clip) − R)²)``, with V_old and the returns R in the experience's ``extra``.

    Args:
        loop: its ``critic`` gives values ``[B, T + 1]``.
        clip: how far a value may move from its old one before the loss stops rewarding it; None: no bound.
    """

    must_be_finite = ("critic/loss",)

    def __init__(self, loop: Loop, clip: float | None = 0.5) -> None:
        self.loop, self.clip = loop, clip

    def rows_with_gradient(self, step: Experience) -> Tensor:
        return step.mask.any(dim=1)

    def stats(self, micro: Experience, context: StepContext) -> Tensor:
        """The values ``[B, T]`` before each token, with gradients."""
        values: Tensor = self.loop.networks["critic"](micro.sequences)  # [B, T + 1]
        return values[:, :-1]

    def __call__(self, values: Tensor, micro: Experience) -> tuple[Tensor, dict[str, float]]:
        result = clipped_value_loss(values, micro.extra["values"], micro.extra["returns"], clip=self.clip)  # [B, T]
        loss = token_mean(result.loss, micro.mask, micro.num_tokens)  # [B, T] → scalar
        clipped = token_mean(result.clipped.float(), micro.mask, micro.num_tokens)
        return loss, {"critic/loss": loss.item(), "critic/clipped": clipped.item()}
