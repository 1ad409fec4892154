"""On-policy self-distillation: the policy with the answer shown is its own teacher (arXiv 2601.18734)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor

from ibro_lightning.batches.experience import TokenStats
from ibro_lightning.errors import ConfigError
from ibro_lightning.functional import HeadFunctional
from ibro_lightning.regularizers.base import EntropyRegularizer, StepContext
from ibro_lightning.regularizers.coefficients import Coefficient
from ibro_lightning.regularizers.hindsight import HindsightTemplate
from ibro_lightning.regularizers.method import Method

Direction = Literal["reverse", "forward"]


class SelfDistillation(EntropyRegularizer):
    """``J = −agg(KL_t)``, the exact KL divergence between the policy and itself behind a prompt that shows the answer,
    on the policy's own responses, over the whole vocabulary.

    The teacher has the present weights and no gradient: one more forward pass per micro-batch, on prompts longer than
    those that ``micro_batch_tokens`` counts. Where IBRO compares two entropies, this compares the distributions. The
    abstract alone was seen, in which this is the whole loss; as a term beside the policy gradient, with a coefficient,
    it is ours.

    Args:
        coef: α of ``L = L_PG − α·J``; 0.01 is ours.
        direction: ``reverse`` is KL(policy ‖ teacher), ``forward`` is KL(teacher ‖ policy).
        template: how the answer is shown, see :class:`.HindsightTemplate`.
    """

    method = Method(
        formula="+α·agg(KL(π ‖ π behind a prompt that shows the answer)), exact; `direction: forward` is the other KL",
        source="arXiv 2601.18734",
        certainty="abstract only",
        recipe="regularizer: {class_path: SelfDistillation, init_args: {coef: 0.01, direction: reverse}}",
    )
    needs_entropy = False
    reads_old_entropy = False

    def __init__(
        self,
        coef: Coefficient | float = 0.01,
        direction: Direction = "reverse",
        template: str = "{prompt}\n\nThe correct answer is {answer}.",
    ) -> None:
        super().__init__(coef)
        if direction not in get_args(Direction):
            raise ConfigError("direction", direction, "write reverse or forward")
        self.reverse, self.hindsight = direction == "reverse", HindsightTemplate(template)

    def functionals(self, context: StepContext) -> Mapping[str, HeadFunctional]:
        micro, kl_to = context.micro, getattr(context.policy, "kl_to", None)
        assert micro is not None, "PolicyLoss.stats gives the micro-batch"
        if kl_to is None:
            kind = type(context.policy).__name__
            raise ConfigError("policy", kind, "SelfDistillation asks it for kl_to, as models.Policy has it")
        flat = micro.sequences.flatten()
        shown = self.hindsight.sequences(micro.prompts, flat, context.tokenizer, context.max_length)
        return {"kl_to_hindsight": kl_to(shown.pad(), temperature=micro.temperature, reverse=self.reverse)}

    def objective(self, stats: TokenStats) -> Tensor:
        return -stats.extra["kl_to_hindsight"]
