"""Curves: what the module returned, what the rollout shows, and how fast it all went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ibro_lightning.types import Rollout

PHASES = ("sync", "generate", "reward", "prepare", "update")


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
        pl_module.log_dict(metrics, batch_size=1)


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Rewards and lengths (response tokens, EOS included) of the rows that are trained on, and how they were generated.

    ``rollout/accuracy`` (from the datamodule) counts every sampled response; dynamic sampling keeps a biased part of
    them.
    """
    lengths, right = rollout.sequences.response_lengths.float(), rollout.accuracy > 0.5
    metrics = {
        "rollout/reward": rollout.rewards.mean(),
        "rollout/reward_std": rollout.rewards.std(correction=0),
        "rollout/length": lengths.mean(),
        "rollout/length_right": _mean_where(lengths, right),
        "rollout/length_wrong": _mean_where(lengths, ~right),
        "rollout/truncated": rollout.truncated.float().mean(),
        "rollout/responses": torch.tensor(float(len(rollout))),
        **{f"reward/{name}": values.mean() for name, values in rollout.reward_parts.items()},
    }
    values = {name: value.item() for name, value in metrics.items() if value.isfinite()}
    return {**values, **rollout.metrics}


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


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """NaN where nothing is selected; such a metric is left out."""
    return values[where].mean()
