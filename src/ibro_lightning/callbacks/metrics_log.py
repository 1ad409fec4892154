"""Curves: what the module returned, what the rollout shows, and how fast it all went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch

from ibro_lightning.types import Rollout

PHASES = ("sync", "verify", "generate", "reward", "prepare", "update")


class MetricsLog(pl.Callback):
    """Logs every metric of every iteration; :attr:`latest` keeps the last ones for other callbacks."""

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics = {name: float(value) for name, value in outputs.items()} if isinstance(outputs, Mapping) else {}
        if isinstance(batch, Rollout):
            metrics = {**rollout_metrics(batch), **metrics}
            metrics |= throughput(batch, metrics)
        self.latest = metrics
        iteration = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=iteration)
        # For checkpoints: their names carry the iteration, and any metric may choose the best one.
        pl_module.log_dict({**metrics, "iteration": float(iteration)}, logger=False, batch_size=1)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Evaluations sync the engine, too; what that check measured is with the first batch of each set."""
        measured = batch.metrics if isinstance(batch, Rollout) else {}
        measured = {f"val/{batch.name}/{name}": value for name, value in measured.items() if name.startswith("sync/")}
        for logger in trainer.loggers if measured else ():
            logger.log_metrics(measured, step=trainer.fit_loop.epoch_loop.total_batch_idx + 1)


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Statistics of *all* responses that were sampled, and (``train/``) of those that are trained on.

    Dynamic sampling keeps a biased part: its accuracy stays near one half while the policy's own rises. Lengths are
    response tokens, EOS included.
    """
    dropped = [(c, r) for group in rollout.dropped for c, r in zip(group.completions, group.results, strict=True)]
    completions = [*rollout.completions, *(completion for completion, _ in dropped)]
    parts = {
        name: torch.tensor([*values.tolist(), *(float(result.parts.get(name, 0.0)) for _, result in dropped)])
        for name, values in rollout.reward_parts.items()
    }
    rewards = torch.tensor([*rollout.rewards.tolist(), *(float(result.reward) for _, result in dropped)])
    lengths = torch.tensor([float(len(completion.token_ids)) for completion in completions])
    right = parts["accuracy"] > 0.5
    metrics = {
        "rollout/reward": rewards.mean(),
        "rollout/reward_std": rewards.std(correction=0),
        **{f"rollout/{name}": values.mean() for name, values in parts.items()},
        "rollout/length": lengths.mean(),
        "rollout/length_right": lengths[right].mean(),
        "rollout/length_wrong": lengths[~right].mean(),
        "rollout/truncated": torch.tensor([float(completion.truncated) for completion in completions]).mean(),
        "rollout/late": torch.tensor([float(completion.late) for completion in completions]).mean(),
    }
    if not rollout.skip_update:
        metrics |= {
            "train/responses": torch.tensor(float(len(rollout))),
            "train/reward": rollout.rewards.mean(),
            "train/accuracy": rollout.accuracy.mean(),
            "train/length": rollout.sequences.response_lengths.float().mean(),
        }
    # The mean over nothing (no right answer, say) is NaN: such a metric is left out.
    return {**{name: value.item() for name, value in metrics.items() if value.isfinite()}, **rollout.metrics}


def throughput(rollout: Rollout, metrics: Mapping[str, float]) -> dict[str, float]:
    """Tokens per second: of each phase on its own, and of the whole iteration; and each phase's share of the time.

    Sync, generation and rewards are measured in generated tokens, the update's phases in tokens trained on
    (prompt + response).
    """
    generated = metrics.get("rollout/generated_tokens", 0.0)
    trained = float(rollout.sequences.lengths.sum())
    seconds = {phase: metrics[f"time/{phase}_s"] for phase in PHASES if f"time/{phase}_s" in metrics}
    total = sum(seconds.values())
    if total == 0:
        return {}
    speeds = {
        f"tokens_per_second/{phase}": (trained if phase in ("prepare", "update") else generated) / spent
        for phase, spent in seconds.items()
        if spent > 0
    }
    shares = {f"time_share/{phase}": spent / total for phase, spent in seconds.items()}
    return {**speeds, **shares, "tokens_per_second/total": generated / total, "time/total_s": total}
