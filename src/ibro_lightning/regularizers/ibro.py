"""IBRO itself, with the answer-conditioned entropy that IB regularisation approximates (arXiv 2507.18391)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor

from ibro_lightning.batches.experience import Experience, MicroBatch, TokenStats
from ibro_lightning.errors import ConfigError, check_at_least
from ibro_lightning.regularizers.base import EntropyRegularizer, StepContext
from ibro_lightning.regularizers.coefficients import Coefficient, TrackedNumber, as_coefficient, moving
from ibro_lightning.regularizers.hindsight import HindsightTemplate
from ibro_lightning.regularizers.method import Method

Form = Literal["weighted", "two-term"]


class IBRO(EntropyRegularizer):
    """Theorem 1's surrogate: minimise ``Σ_t β·H(o_t | o_<t, q, a) − H(o_t | o_<t, q)``.

    The answer-conditioned entropy ``Hᵃ_t`` is the policy's own on the same response after a prompt that shows the
    ground truth. ``weighted`` turns it into a weight of the token's entropy, ``λ_t = β·sg(Hᵃ_t / H_t) − 1``, and
    minimises ``λ_t·H_t``: one more scoring pass per optimizer step. *This closed form of λ_t is our reading; the paper
    defines λ_t through the answer-conditioned entropy and then replaces it by −A_t.* ``two-term`` is the surrogate
    itself, with gradients through both entropies: one more forward *and backward* pass, on prompts longer than those
    that ``micro_batch_tokens`` counts.

    Both entropies are exact, over the whole vocabulary, straight from the head: ``H_t`` from the pass of the loss,
    ``Hᵃ_t`` from the further one, which no functional of the head can save, since it needs the other prompt.

    Args:
        coef: α of ``L = L_PG − α·J``.
        beta: β ≥ 2, a number or a coefficient, of ``I(q; r) − β·I(r; a)``.
        form: see above.
        template: how the answer is shown, see :class:`HindsightTemplate`. A model that never saw such prompts may
            be *less* certain with the answer than without.
        max_ratio: upper bound of ``Hᵃ_t / H_t``, so that λ_t lies in [−1, β·max_ratio − 1]: the answer cannot raise
            entropy on average, but it may on a token, and ``H_t`` may be near 0. For ``weighted`` only.
    """

    method = Method(
        formula="+α·agg(λ·H), λ = β·Hᵃ/H − 1, Hᵃ behind a prompt that shows the answer; "
        "`form: two-term` is β·Hᵃ − H with both gradients",
        source="arXiv 2507.18391; the closed form of λ is our reading",
        certainty="paper",
        recipe="regularizer: {class_path: IBRO, init_args: {coef: 0.005, beta: 2.0, form: weighted}}",
    )
    prepare_needs_scores = True

    def __init__(
        self,
        coef: Coefficient | float = 0.005,
        beta: Coefficient | float = 2.0,
        form: Form = "weighted",
        template: str = "{prompt}\n\nThe correct answer is {answer}.",
        max_ratio: float = 1.0,
    ) -> None:
        super().__init__(coef)
        check_at_least("max_ratio", max_ratio, 0)
        if form not in get_args(Form):
            raise ConfigError("form", form, "write weighted or two-term")
        self.beta = as_coefficient(beta, "beta", "entropy")
        self.form, self.max_ratio, self.hindsight = form, max_ratio, HindsightTemplate(template)

    @property
    def coefficients(self) -> Mapping[str, TrackedNumber]:
        return {**super().coefficients, **moving(beta=self.beta)}

    def prepare(self, step: Experience, context: StepContext) -> Experience:
        if self.form == "two-term" or not self.coef:
            return step
        sequences = self.hindsight.sequences(step.prompts, step.sequences, context.tokenizer, context.max_length)
        _, entropy = context.score(sequences, step.temperature)
        return step.with_extra(hindsight_entropy=entropy)

    def statistics(self, micro: MicroBatch, context: StepContext) -> Mapping[str, Tensor]:
        if self.form == "weighted":
            return {}
        flat = micro.sequences.flatten()
        sequences = self.hindsight.sequences(micro.prompts, flat, context.tokenizer, context.max_length)
        _, entropy = context.policy(sequences.pad(), temperature=micro.temperature)
        assert entropy is not None
        return {"hindsight_entropy": entropy}

    def objective(self, stats: TokenStats) -> Tensor:
        assert stats.entropy is not None
        with_answer = stats.extra["hindsight_entropy"]
        if self.form == "two-term":
            return stats.entropy - self.beta.value * with_answer
        without = stats.entropy.detach().clamp(min=1e-6)
        lam = self.beta.value * (with_answer / without).clamp(max=self.max_ratio) - 1.0
        return -lam * stats.entropy
