"""The entropy of the marginal over responses, H(r), pushed up or down: Assumption 1 of arXiv 2507.18391 broken on
purpose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ibro_lightning.batches.cross_prompts import Probe
from ibro_lightning.batches.experience import Experience, MicroBatch, TokenStats
from ibro_lightning.batches.response_seeds import response_seeds
from ibro_lightning.errors import ConfigError, check_count, check_instance
from ibro_lightning.functional import HeadFunctional
from ibro_lightning.regularizers.base import EntropyRegularizer, StepContext
from ibro_lightning.regularizers.coefficients import Coefficient, TrackedNumber, as_coefficient, moving
from ibro_lightning.regularizers.method import Method
from ibro_lightning.regularizers.none import NoRegularizer
from ibro_lightning.seeding import derive_seed

Direction = Literal["raise", "lower"]
LARGEST_RATIO = 2.0
"""π/π_old of a whole response counts as this at most."""


class MarginalEntropy(EntropyRegularizer):
    """``L = L_base ∓ γ·Ĥ(r)``: raises, or lowers, the entropy of the marginal ``p(r) = mean_q π(r|q)`` over whole
    responses, which IBRO assumes to stay constant, beside any other method or none.

    **Gradient.** ``H(r) = −Σ_r p(r)·log p(r)``, and ``Σ_r ∇p(r) = 0``, so ``∇H(r) = E_{q, r~π(·|q)}[∇log π(r|q) ·
    (−log p(r) − b)]`` for any b that does not depend on r: a response that is unlikely over all prompts becomes
    likelier. In each optimizer step, ``prompts`` of its prompts (M), at random, and one response to each are the probe,
    ``p̂(r) = mean_q' π(r|q')`` is taken over its prompts, the response's own among them, under the policy before the
    step, and b is the mean of the probe's other responses. Only the probe's tokens carry the term. Their log π(r|q) is
    the present one; responses of a rollout's later steps are weighted by ``min(π/π_old, 2)`` of the whole response.

    **Bias.** For the M prompts alone, as equally likely prompts, estimate and gradient are unbiased in a rollout's
    first step. For the distribution that prompts are drawn from, Ĥ(r) is too small in expectation, and never above
    H(r|q) + log M (:func:`.information_plane`): where prompts can be told by their responses, ``−log p̂(r)`` is
    ``log M − log π(r|q)``, and the term moves H(r|q) alone. The prompts are those that are trained on: dynamic
    sampling, which keeps groups by what was right in them, chooses prompts and, within them, responses; so do an
    overlong filter and tokens without a log-prob, whose responses are left out.

    **Cost.** One scoring pass of M² sequences per optimizer step, whose own B rows cost about three passes: M²/3B more.
    Its memory is bounded by ``micro_batch_tokens``. The gradient is that of M responses, and as noisy.

    **Size.** H(r) is in nats per *response*: γ moves ``H(r|q)``, a part of H(r), as an entropy bonus of γ times the
    mean length does. The curve ``regularizer/marginal_entropy`` is Ĥ(r), the mean over the steps; it has no value in a
    step with one prompt, which has no term either.

    Args:
        gamma: γ ≥ 0, a number or a coefficient.
        direction: ``raise`` or ``lower`` H(r).
        prompts: M, of at least 2; a step with fewer takes what it has.
        base: the method that it is added to, with its own α; None: none.
    """

    method = Method(
        formula="∓γ·Ĥ(r), the entropy of the marginal over responses, from M prompts of the step, beside the term of "
        "`base`; `direction: lower` is +",
        source="–",
        certainty="ours",
        recipe="regularizer: {class_path: MarginalEntropy, init_args: {gamma: 0.001, direction: raise, prompts: 16, "
        "base: null}}",
    )

    def __init__(
        self,
        gamma: Coefficient | float = 0.001,
        direction: Direction = "raise",
        prompts: int = 16,
        base: EntropyRegularizer | None = None,
    ) -> None:
        check_instance("base", base, EntropyRegularizer, optional=True)
        base = NoRegularizer() if base is None else base
        if isinstance(base, MarginalEntropy):
            raise ConfigError("base", type(base).__name__, "it is added once: write another method, or null")
        if direction not in get_args(Direction):
            raise ConfigError("direction", direction, "write raise or lower")
        check_count("prompts", prompts, 2)
        super().__init__(base.coefficient)
        self.gamma, self.base, self.prompts = as_coefficient(gamma, "gamma", "entropy"), base, prompts
        self.direction, self.sign = direction, 1.0 if direction == "raise" else -1.0
        self.needs_entropy, self.shaping_needs_entropy = base.needs_entropy, base.shaping_needs_entropy
        self.shaping_needs_extra, self.prepare_needs_scores = base.shaping_needs_extra, base.prepare_needs_scores
        self.reads_old_entropy, self.min_group_size = base.reads_old_entropy, base.min_group_size

    @property
    def combined(self) -> tuple[EntropyRegularizer, ...]:
        return (self, *self.base.combined)

    @property
    def acts_in_first_step(self) -> bool:  # type: ignore[override]
        return bool(self.gamma.value) or self.base.acts_in_first_step

    @property
    def needs_rows_without_advantage(self) -> bool:
        return bool(self.gamma.value) or self.base.needs_rows_without_advantage

    @property
    def coefficients(self) -> Mapping[str, TrackedNumber]:
        return {**self.base.coefficients, **moving(gamma=self.gamma)}

    def prepare(self, step: Experience, context: StepContext) -> Experience:
        step = self.base.prepare(step, context)
        if not self.gamma.value:
            return step
        pull, entropy = self.pull(step, context)  # [B]
        if entropy is not None:
            step = replace(step, metrics={**step.metrics, "regularizer/marginal_entropy": entropy})
        assert step.weights is not None, "PolicyLoss.prepare sets the weights"
        # The loss multiplies by its weights; the term is a sum over tokens.
        of_tokens = torch.where(step.weights > 0, step.per_token(pull) / step.weights, 0.0)  # [N]
        return step.with_extra(marginal_pull=of_tokens.to(step.weights.dtype))

    def pull(self, step: Experience, context: StepContext) -> tuple[Tensor, float | None]:
        """``([B], Ĥ(r))``: what ∇log π(r|q) of each response is multiplied by in the gradient of Ĥ(r), float64, 0 for
        those that are not in the probe; None: there is no probe. Collective."""
        pull = torch.zeros(len(step), dtype=torch.float64, device=step.mask.device)  # [B]
        chosen = choose(step, self.prompts, context)
        if chosen is None:
            return pull, None
        _check_length(chosen.probe, context.max_length)
        rows, places = chosen.rows, chosen.places  # [m]
        matrix = chosen.probe.cross_logp(context.score, step.temperature, pull.device, context.ranks)  # [M, M]
        surprise = math.log(len(matrix)) - matrix.logsumexp(dim=1)  # [M] −log p̂(r)
        others = (surprise.sum() - surprise) / (len(matrix) - 1)  # [M] b
        ratio = torch.ones_like(rows, dtype=pull.dtype)  # [m] π/π_old; in a rollout's first step nothing has moved
        if step.old_logp is not None:
            old_logp = step.row_sums(torch.where(step.mask, step.old_logp, 0.0).double())  # [B]
            ratio = (matrix.diagonal()[places] - old_logp[rows]).exp().clamp(max=LARGEST_RATIO)
        pull[rows] = ratio * (surprise - others)[places] / len(matrix)
        return pull, surprise.mean().item()

    def functionals(self, context: StepContext) -> Mapping[str, HeadFunctional]:
        return self.base.functionals(context)

    def statistics(self, micro: MicroBatch, context: StepContext) -> Mapping[str, Tensor]:
        return self.base.statistics(micro, context)

    def objective(self, stats: TokenStats) -> Tensor:
        return self.base.objective(stats)

    def shape_policy_loss(self, loss: Tensor, stats: TokenStats) -> Tensor:
        """The base's, less γ times a term whose value is 0 and whose gradient is that of Ĥ(r)."""
        loss = self.base.shape_policy_loss(loss, stats)
        if not self.gamma.value:
            return loss
        return loss - self.sign * self.gamma.value * stats.extra["marginal_pull"] * (stats.logp - stats.logp.detach())

    def measure(self, stats: TokenStats) -> Mapping[str, Tensor]:
        return self.base.measure(stats)


@dataclass(frozen=True)
class Chosen:
    """A step's probe, the same on all ranks, and which of its responses this rank trains on."""

    probe: Probe
    rows: Tensor
    """``[m]`` rows of the step."""
    places: Tensor
    """``[m]`` their places in the probe."""


def choose(step: Experience, prompts: int, context: StepContext) -> Chosen | None:
    """Up to so many different prompts of a step, on all ranks, at random, and one response to each, all of whose
    tokens take part in the loss. None if there are less than two. Collective. Neither the order of the rows nor the
    number of ranks matters."""
    complete = (step.lengths > 0) & (step.row_sums(step.mask) == step.lengths)  # [B]
    seeds, best = response_seeds(step, "marginal entropy", context.seed).tolist(), dict[int, int]()
    for row, first in enumerate(step.sequences.same_prompts()):
        if complete[row] and (first not in best or seeds[row] < seeds[best[first]]):
            best[first] = row
    rank, ids = context.ranks.rank, step.sequences.prompts.cpu().split(step.sequences.prompt_lengths.tolist())
    keys = {derive_seed(context.seed, "probe", repr(ids[row].tolist())): row for row in best.values()}
    responses = step.sequences.responses.cpu().split(step.lengths.tolist())
    own = [
        (key, seeds[row], rank, row, ids[row].tolist(), responses[row].tolist())
        for key, row in sorted(keys.items())[:prompts]
    ]
    everyone = sorted(candidate for share in context.ranks.gather(own) for candidate in share)
    merged = list({candidate[0]: candidate for candidate in reversed(everyone)}.values())[::-1][:prompts]
    if len(merged) < 2:
        return None
    mine = [(row, place) for place, (_, _, owner, row, _, _) in enumerate(merged) if owner == rank]
    rows, places = torch.tensor(mine, dtype=torch.long, device=step.mask.device).reshape(-1, 2).unbind(dim=1)
    return Chosen(Probe([candidate[4] for candidate in merged], [candidate[5] for candidate in merged]), rows, places)


def _check_length(probe: Probe, positions: int | None) -> None:
    longest = max(map(len, probe.prompts)) + max(map(len, probe.responses))
    if positions is not None and longest > positions:
        remedy = (
            f"a response after another response's prompt takes up to {longest} tokens, and the model has positions for "
            f"{positions}: lower data.sampling.max_tokens, or data.prompt_limits.max_tokens"
        )
        raise ConfigError("prompts", len(probe), remedy)
