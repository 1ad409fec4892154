"""Curves: what the module returned, what the rollout shows, and how fast it all went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from ibro_lightning.ranks import ALONE, Ranks
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
            ranks = Ranks.of(trainer.strategy)
            metrics = {**rollout_metrics(batch, ranks), **metrics}
            metrics |= throughput(batch, metrics, ranks)
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


class ResponseTable(NamedTuple):
    """What the curves need of sampled responses, ``[N]`` each: a few numbers that ranks tell each other."""

    rewards: Tensor
    lengths: Tensor
    cut: Tensor
    late: Tensor
    learnt: Tensor
    """Is the response trained on?"""
    parts: dict[str, Tensor]

    @classmethod
    def of(cls, rollout: Rollout) -> ResponseTable:
        """The responses of a rollout, those that are trained on first."""
        own = [] if rollout.stands_in else list(zip(rollout.completions, rollout.results, strict=True))
        dropped = [pair for group in rollout.dropped for pair in zip(group.completions, group.results, strict=True)]
        rows = [*own, *dropped]
        learnt = [not rollout.skip_update] * len(own) + [False] * len(dropped)
        return cls(
            rewards=torch.tensor([float(result.reward) for _, result in rows]),
            lengths=torch.tensor([float(len(completion.token_ids)) for completion, _ in rows]),
            cut=torch.tensor([float(completion.truncated) for completion, _ in rows]),
            late=torch.tensor([float(completion.late) for completion, _ in rows]),
            learnt=torch.tensor(learnt, dtype=torch.bool),
            parts={
                name: torch.tensor([float(result.parts.get(name, 0.0)) for _, result in rows])
                for name in rollout.reward_parts
            },
        )

    @classmethod
    def join(cls, tables: Sequence[ResponseTable]) -> ResponseTable:
        """Those of all ranks. A part that only other ranks' rewards have named is 0."""
        names = dict.fromkeys(name for table in tables for name in table.parts)
        parts = {
            name: torch.cat([table.parts.get(name, torch.zeros_like(table.rewards)) for table in tables])
            for name in names
        }
        return cls(
            rewards=torch.cat([table.rewards for table in tables]),
            lengths=torch.cat([table.lengths for table in tables]),
            cut=torch.cat([table.cut for table in tables]),
            late=torch.cat([table.late for table in tables]),
            learnt=torch.cat([table.learnt for table in tables]),
            parts=parts,
        )


def rollout_metrics(rollout: Rollout, ranks: Ranks = ALONE) -> dict[str, float]:
    """Statistics of *all* responses that were sampled, and (``train/``) of those that are trained on; on all ranks.

    Dynamic sampling keeps a biased part: its accuracy stays near one half while the policy's own rises. Lengths are
    response tokens, EOS included.
    """
    table = ResponseTable.join(ranks.gather(ResponseTable.of(rollout)))
    right, learnt = table.parts["accuracy"] > 0.5, table.learnt
    metrics = {
        "rollout/reward": table.rewards.mean(),
        "rollout/reward_std": table.rewards.std(correction=0),
        **{f"rollout/{name}": values.mean() for name, values in table.parts.items()},
        "rollout/length": table.lengths.mean(),
        "rollout/length_right": table.lengths[right].mean(),
        "rollout/length_wrong": table.lengths[~right].mean(),
        "rollout/truncated": table.cut.mean(),
        "rollout/late": table.late.mean(),
    }
    if not rollout.skip_update:
        metrics |= {
            "train/responses": learnt.sum(),
            "train/reward": table.rewards[learnt].mean(),
            "train/accuracy": table.parts["accuracy"][learnt].mean(),
            "train/length": table.lengths[learnt].mean(),
        }
    # The mean over nothing (no right answer, say) is NaN: such a metric is left out.
    return {**{name: float(value) for name, value in metrics.items() if value.isfinite()}, **rollout.metrics}


def throughput(rollout: Rollout, metrics: Mapping[str, float], ranks: Ranks = ALONE) -> dict[str, float]:
    """Tokens per second: of each phase on its own, and of the whole iteration; and each phase's share of the time.

    Sync, generation and rewards are measured in generated tokens, the update's phases in tokens trained on
    (prompt + response).
    """
    generated = metrics.get("rollout/generated_tokens", 0.0)
    trained = sum(ranks.gather(0.0 if rollout.stands_in else float(rollout.sequences.lengths.sum())))
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
