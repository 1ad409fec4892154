"""From a rollout to optimizer steps, and from a step to micro-batches: loss, backward, clip, step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from ibro_lightning.batches import Rollout
from ibro_lightning.batches.experience import Experience, MicroBatch
from ibro_lightning.errors import check_at_least, check_count
from ibro_lightning.models import clip_gradients
from ibro_lightning.ranks import ALONE, Ranks, rank_zero_warn
from ibro_lightning.regularizers import StepContext
from ibro_lightning.seeding import derive_seed, run_seed, update_seed
from ibro_lightning.update.loop import Loop
from ibro_lightning.update.loss import PolicyLoss
from ibro_lightning.update.micro_batches import TokenBudget
from ibro_lightning.update.nonfinite import NonFiniteGuard, advantages_are_finite, nonfinite_cause
from ibro_lightning.update.steps import Steps, group_batches, mini_batches, rows_of, with_scores

SKIPPED = "/skipped_steps"
SHIFT = "update/policy_shift"
FAR = 0.5
"""Nats per token: an update that moves the policy further than this on average is reported."""
HARMLESS_RATE = 1e-6
"""The paper's learning rate; it bounds AdamW's steps, so that a single one does not move a policy far."""


class Loss(Protocol):
    """The loss of a network on a micro-batch: :class:`PolicyLoss`, or PPO's value loss."""

    @property
    def must_be_finite(self) -> Sequence[str]:
        """Names of metrics: a step in which one of these is not finite is skipped."""

    def rows_with_gradient(self, step: Experience, /) -> Tensor:
        """``[B]`` bool: the rows of an optimizer step whose loss may have a gradient other than 0."""

    def stats(self, micro: MicroBatch, context: StepContext, /) -> Any:
        """Run the network, with gradients."""

    def __call__(self, stats: Any, micro: MicroBatch, /) -> tuple[Tensor, dict[str, float]]:
        """A scalar to be minimised, and the micro-batch's share of the step's metrics."""


class Updater:
    """Takes optimizer steps on rollouts.

    Args:
        loop: provides networks, optimizers and ranks.
        budget: tokens in memory at once; changes speed and memory, never the result.
        mini_batch_prompts: prompts (whole groups) per optimizer step; None takes the rollout in one step.
        update_epochs: passes over each rollout.
        max_grad_norm: gradients are scaled down to this norm; 0 or None leaves them as they are.
        max_nonfinite_steps: training stops after so many steps in a row that are not finite; 0 never stops.
    """

    def __init__(
        self,
        loop: Loop,
        budget: TokenBudget = TokenBudget(),
        *,
        mini_batch_prompts: int | None = None,
        update_epochs: int = 1,
        max_grad_norm: float | None = 1.0,
        max_nonfinite_steps: int = 5,
    ) -> None:
        max_grad_norm = 0.0 if max_grad_norm is None else max_grad_norm
        check_at_least("max_grad_norm", max_grad_norm, 0)
        check_count("update_epochs", update_epochs, 1)
        if mini_batch_prompts is not None:
            check_count("mini_batch_prompts", mini_batch_prompts, 1)
        self.loop, self.budget = loop, budget
        self.mini_batch_prompts, self.update_epochs = mini_batch_prompts, update_epochs
        self.max_grad_norm = max_grad_norm
        self.nonfinite = NonFiniteGuard(max_nonfinite_steps)
        self._warned_of_single_step = False

    def start_iteration(self, rollout: Rollout) -> bool:
        """False if no rank has anything to learn from the iteration's rollout."""
        self.nonfinite.start_iteration()
        on_time = self.loop.ranks.sum((~rollout.late).sum())
        return not rollout.skip_update and bool(on_time)

    def num_steps(self, num_groups: int) -> int:
        """The number of optimizer steps on a rollout of ``num_groups`` groups."""
        size = self.mini_batch_prompts
        return self.update_epochs * (1 if size is None else -(-num_groups // size))

    def first_step(self, rollout: Rollout) -> Tensor:
        """The groups of the first optimizer step on a rollout."""
        seed = update_seed(run_seed(), rollout.iteration, 0)
        return group_batches(rollout.num_groups, self.mini_batch_prompts, seed)[0]

    def steps(self, experience: Experience, loss: PolicyLoss, context: StepContext) -> Steps:
        """The optimizer steps on a rollout: whole groups in random order, with what ``loss`` prepares for them."""
        self._warn_of_single_step(experience, loss)
        return Steps(experience, self._parts(experience), loss, context)

    def _parts(self, experience: Experience) -> Iterator[tuple[Tensor, int]]:
        """Rows of each optimizer step, and the seed of its draws."""
        for epoch in range(self.update_epochs):
            seed = update_seed(run_seed(), experience.iteration, epoch)
            parts = mini_batches(experience.groups, self.mini_batch_prompts, seed, experience.num_groups)
            yield from ((rows, derive_seed(seed, index)) for index, rows in enumerate(parts))

    def _warn_of_single_step(self, experience: Experience, loss: PolicyLoss) -> None:
        """Once, if the regulariser acts from the second step on and there is none."""
        if loss.regularizer.acts_in_first_step or self._warned_of_single_step:
            return
        groups = experience.num_groups or int(experience.groups.max()) + 1
        if self.num_steps(groups) > 1:
            return
        self._warned_of_single_step = True
        rank_zero_warn(
            f"iteration {experience.iteration}: {type(loss.regularizer).__name__} has no effect in an update of one "
            f"optimizer step, before which the policy has not moved: set mini_batch_prompts below the {groups} prompts "
            "of a rollout, or update_epochs to 2 or more (warned of once)"
        )

    def update(
        self, step: Experience, loss: Loss, context: StepContext, network: str = "policy"
    ) -> tuple[Experience, dict[str, float]]:
        """Take one optimizer step of a network, in as many micro-batches as the token budget needs. Rows without a
        gradient only run forward.

        Returns:
            The step, with the scores of this forward pass if it had none; and its metrics over all ranks.
        """
        ranks = self.loop.ranks
        if not advantages_are_finite(step, ranks):
            self.nonfinite.record(network, "advantage", step)
            if step.old_logp is None:  # the policy has not moved yet
                logp, entropy = context.score(step.sequences, step.temperature)
                step = replace(step, old_logp=logp, old_entropy=entropy)
            return step, {f"{_prefix(network)}{SKIPPED}": 1.0}
        totals: dict[str, float] = defaultdict(float)
        scores: list[tuple[Tensor, Tensor, Tensor]] = []
        model = self.loop.networks[network]
        batches = self._micro_batches(step, loss, model)
        for number, (rows, counts, learns) in enumerate(batches, start=1):
            micro = step.micro_batch(rows)  # [b, t]
            with self.budget.advice("update", micro.sequences, model):
                with torch.set_grad_enabled(learns):
                    stats = loss.stats(micro, context)  # [b, t] with gradients
                    value, metrics = loss(stats, micro)  # a scalar
                with nullcontext() if number == len(batches) else self.loop.no_sync():
                    # Gradients are averaged over ranks; the loss's weights divide by the tokens of all ranks already.
                    if learns:
                        self.loop.backward(value * (ranks.size if counts else 0.0))
            if step.old_logp is None:
                scores.append((rows, stats.old_logp, stats.old_entropy))
            for name, share in metrics.items() if counts else ():
                totals[name] += share
        metrics = self._total_over_ranks(totals, step.sequences.device)
        losses = {name: metrics[name] for name in loss.must_be_finite if name in metrics}
        taken = self.clip_and_step(network, losses, step)
        measured = {**(step.metrics if network == "policy" else {}), **metrics, **taken}
        return with_scores(step, scores), measured

    def _micro_batches(self, step: Experience, loss: Loss, model: nn.Module) -> list[tuple[Tensor, bool, bool]]:
        """Rows of each micro-batch, whether they count, and whether they have a gradient; those without come first."""
        ranks, learns = self.loop.ranks, loss.rows_with_gradient(step)  # [B]
        # All ranks run backward equally often, and an optimizer treats parameters without a gradient otherwise.
        if ranks.size > 1 or not learns.any():
            learns = torch.ones_like(learns)
        batches = []
        for rows, with_gradient in (((~learns).nonzero(), False), (learns.nonzero(), True)):
            if len(rows := rows.squeeze(-1)):
                parts = self.budget.micro_batches(step.sequences.select(rows), ranks, model)
                batches += [(rows[part], counts, with_gradient) for part, counts in parts]
        return batches

    def clip_and_step(self, network: str, losses: Mapping[str, float], batch: Any = None) -> dict[str, float]:
        """Clip, step, schedule, zero. A step with a loss or a gradient that is not finite is skipped and counted.

        Args:
            network: its name in the loop.
            losses: of the step on all ranks.
            batch: what they were computed from, to be saved if too many steps are skipped.
        """
        if not (optimizers := optimizers_of(self.loop, network)):
            raise RuntimeError(f"no optimizer of the loop has parameters of the {network}: give it one that has")
        learning_rate = float(optimizers[0].param_groups[0]["lr"])  # read first: a schedule changes a tensor in place
        norm = clip_gradients(self.loop.networks[network].parameters(), self.max_grad_norm)
        cause = nonfinite_cause(norm, losses)
        self.nonfinite.record(network, cause, batch)
        if cause is None:
            for number, optimizer in enumerate(optimizers):
                self.loop.step(optimizer, counts=network == "policy" and not number)
            for schedule in self.loop.schedules:
                owner = getattr(schedule, "optimizer", None)
                if any(owner is optimizer for optimizer in optimizers) or (owner is None and network == "policy"):
                    schedule.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        prefix = _prefix(network)
        metrics = {f"{prefix}{SKIPPED}": float(cause is not None), f"{prefix}/lr": learning_rate}
        return {**metrics, f"{prefix}/grad_norm": norm.item()} if cause is None else metrics

    def policy_shift(
        self, steps: Sequence[Mapping[str, float]], experience: Experience, context: StepContext
    ) -> dict[str, float]:
        """How far the update has moved the policy: ``mean |log ratio|`` over tokens, in nats; warns if it is far.

        An eighth of the rollout's groups is scored again after the last step, unless the update was a single step with
        a learning rate too small to matter.

        Args:
            steps: the metrics of each step.
        """
        rates = [step["update/lr"] for step in steps if "update/grad_norm" in step]  # of the steps that were taken
        if not rates or (len(rates) == 1 and not self._may_move_far()):
            return {}
        # Whole groups: the result does not depend on the split into micro-batches or over ranks.
        count = experience.num_groups or int(experience.groups.max()) + 1
        part = rows_of(experience, (experience.groups < -(-count // 8)).nonzero().squeeze(-1))
        logp, _ = context.score(part.sequences, part.temperature, with_entropy=False)  # [n]
        assert part.old_logp is not None
        shift = context.ranks.mean((logp - part.old_logp).abs(), part.mask).item()
        if not shift <= FAR:  # NaN, too
            rank_zero_warn(
                f"iteration {experience.iteration}: one update has moved the policy by {shift:.2g} nats per token in "
                f"the mean, more than {FAR:g}: lower learning_rate ({max(rates):g}), raise warmup_steps, "
                "or take fewer steps per rollout (update_epochs, mini_batch_prompts)"
            )
        return {SHIFT: shift}

    def _may_move_far(self) -> bool:
        return not all(
            isinstance(optimizer, Adam | AdamW)
            and all(group["lr"] <= HARMLESS_RATE for group in optimizer.param_groups)
            for optimizer in optimizers_of(self.loop, "policy")
        )

    def _total_over_ranks(self, metrics: Mapping[str, float], device: torch.device) -> dict[str, float]:
        """Each metric summed over the ranks, which all have the same ones."""
        if self.loop.ranks.size == 1:
            return dict(metrics)
        shares = torch.tensor(list(metrics.values()), dtype=torch.float64, device=device)
        return dict(zip(metrics, self.loop.ranks.sum(shares).tolist(), strict=True))


def optimizers_of(loop: Loop, network: str) -> list[Optimizer]:
    """The loop's optimizers with parameters of a network."""
    own = {id(parameter) for parameter in loop.networks[network].parameters()}
    return [
        optimizer
        for optimizer in loop.optimizers
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])
    ]


def update_metrics(
    experience: Experience, steps: Sequence[Mapping[str, float]], ranks: Ranks = ALONE
) -> dict[str, float]:
    """The curves of an update: the mean of each metric over the steps that report it; skipped steps are summed.

    Args:
        experience: the rollout, as it was before the update.
    """
    scored_first = float(experience.old_logp is not None)
    if experience.other_rows is not None:
        has_tokens = (experience.lengths > 0) & (not experience.placeholder)  # [B]
        scored_first = ranks.mean(experience.other_rows.scored.float(), has_tokens).item()
    names = dict.fromkeys(name for step in steps for name in step)
    columns = {name: [step[name] for step in steps if name in step] for name in names}
    return {
        "update/skipped_rollouts": 0.0,
        "update/steps": float(len(steps)),
        "update/scored_first": scored_first,
        **{name: sum(v) if name.endswith(SKIPPED) else sum(v) / len(v) for name, v in columns.items()},
    }


def _prefix(network: str) -> str:
    """The prefix of a network's metrics."""
    return "update" if network == "policy" else network
