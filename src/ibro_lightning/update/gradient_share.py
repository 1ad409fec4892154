"""How much of the policy's gradient comes from the regulariser."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from ibro_lightning.batches.experience import Experience, MicroBatch, TokenStats
from ibro_lightning.models.gradients import grad_norm
from ibro_lightning.regularizers import StepContext
from ibro_lightning.update.loss import PolicyLoss, weighted_sum
from ibro_lightning.update.updater import Updater


def regularizer_share(updater: Updater, step: Experience, loss: PolicyLoss, context: StepContext) -> float | None:
    """``‖∇ α·agg(J)‖ / ‖∇ L‖`` over the policy's parameters, where ``step`` is an optimizer step of its own; None
    without a term in the loss (α is 0). Collective. Two forward and backward passes; parameters, and gradients, which
    must be None before, are left as they were, and so is the state of the coefficients.

    The share may be above 1, where the two parts of the loss pull against each other. Gradients of few responses are
    mostly noise, of which the regulariser's has less: the share in a step on many is larger, as a rule.
    """
    if not loss.regularizer.coef:
        return None
    states = {name: coefficient.state_dict() for name, coefficient in loss.coefficients.items()}
    step = loss.prepare(step, context)

    def term(stats: TokenStats, micro: MicroBatch) -> Tensor:
        return loss.regularizer.coef * weighted_sum(loss.objective(stats), loss.without_mismatched(stats, micro))

    def whole(stats: TokenStats, micro: MicroBatch) -> Tensor:
        return loss(stats, micro)[0]

    parts = [_norm(updater, step, loss, context, value) for value in (term, whole)]
    for name, coefficient in loss.coefficients.items():
        coefficient.load_state_dict(states[name])
    return parts[0] / parts[1] if parts[1] else None


def _norm(
    updater: Updater,
    step: Experience,
    loss: PolicyLoss,
    context: StepContext,
    value: Callable[[TokenStats, MicroBatch], Tensor],
) -> float:
    """The norm of the gradient of ``value``, a micro-batch's share of the step's."""
    loop, policy = updater.loop, updater.loop.networks["policy"]
    batches = updater.budget.micro_batches(step.sequences, loop.ranks, policy)
    try:
        for number, (rows, counts) in enumerate(batches, start=1):
            micro = step.micro_batch(rows)  # [b, t]
            with updater.budget.advice("update", micro.sequences, policy), torch.enable_grad():
                share = value(loss.stats(micro, context), micro)  # a scalar
                with nullcontext() if number == len(batches) else loop.no_sync():
                    loop.backward(share * (loop.ranks.size if counts else 0.0))  # as in Updater.update
        return float(grad_norm(policy.parameters()))
    finally:
        for parameter in policy.parameters():
            parameter.grad = None
