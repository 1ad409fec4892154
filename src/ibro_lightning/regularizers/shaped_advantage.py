"""Entropy-shaped advantage: uncertain tokens get a larger one (arXiv 2506.14758)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ibro_lightning.batches.experience import Experience
from ibro_lightning.errors import ConfigError, is_number
from ibro_lightning.regularizers.base import PolicyLossMethod, StepContext
from ibro_lightning.regularizers.coefficients import Coefficient, TrackedNumber, as_coefficient, moving
from ibro_lightning.regularizers.method import Method


class EntropyShapedAdvantage(PolicyLossMethod):
    """``A_t + min(scale·H_t, |A_t|/kappa)``: changes no sign of an advantage for ``kappa > 1``, and no zero.

    ``H_t`` is the entropy under the policy that the rollout came from, without a gradient. The curves of
    ``advantage/…`` and ``ib/…`` show the advantage before it is shaped.

    Args:
        scale: a, a number or a coefficient; 0.4 in the paper.
        kappa: the addition is at most 1/kappa of the advantage; 2 in the paper.
    """

    method = Method(
        formula="A + min(scale·H, |A|/kappa)",
        source="arXiv 2506.14758",
        certainty="paper",
        recipe="regularizer: {class_path: EntropyShapedAdvantage, init_args: {scale: 0.4, kappa: 2.0}}",
    )
    prepare_needs_scores = True

    def __init__(self, scale: Coefficient | float = 0.4, kappa: float = 2.0) -> None:
        super().__init__()
        if not (is_number(kappa) and kappa >= 1):
            raise ConfigError("kappa", kappa, "write 1 or more: below, it would flip signs")
        self.scale, self.kappa = as_coefficient(scale, "scale", "entropy"), kappa

    @property
    def coefficients(self) -> Mapping[str, TrackedNumber]:
        return {**super().coefficients, **moving(scale=self.scale)}

    def prepare(self, step: Experience, context: StepContext) -> Experience:
        assert step.old_entropy is not None
        addition = torch.minimum(self.scale.value * step.old_entropy, step.advantages.abs() / self.kappa)
        addition = torch.where(step.mask, addition, 0.0)
        return replace(step.with_extra(advantage_addition=addition), advantages=step.advantages + addition)
