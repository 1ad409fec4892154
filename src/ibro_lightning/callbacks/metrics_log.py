"""Curves of the module's metrics, the rollout's statistics, and the throughput."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ibro_lightning.batches import Rollout
from ibro_lightning.callbacks.needs import MetricsWatcher
from ibro_lightning.errors import check_count
from ibro_lightning.ranks import ALONE, Ranks
from ibro_lightning.runs.folder import evaluation_counts

LIGHTNINGS_DEFAULT = 50
"""A Trainer's default for ``log_every_n_steps``."""
PHASES = ("sync", "verify", "generate", "reward", "wait", "prepare", "update")
OVERLAPPED = ("generate", "reward")
"""Phases beside an update, where there is a phase ``wait``: for what they take longer than the update."""


class MetricsLog(pl.Callback):
    """Logs the metrics that the module returns, the rollout's statistics, and the throughput. Modules of this package
    add one if their Trainer has none.

    The x-axis is the iteration; ``trainer.callback_metrics`` has the latest values, for Lightning's ``EarlyStopping``
    and ``ModelCheckpoint``.

    Args:
        every_n_iterations: how often the loggers get a point; 0: never. None: the Trainer's ``log_every_n_steps``,
            where its default of 50, which is meant for batches of milliseconds, counts as 1.
    """

    def __init__(self, every_n_iterations: int | None = None) -> None:
        if every_n_iterations is not None:
            check_count("every_n_iterations", every_n_iterations, 0)
        self.every_n_iterations = every_n_iterations
        self._latest: dict[str, float] = {}
        self._iteration = 0
        self._measured: dict[str, float] = {}
        self._warned = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        logging: Any = trainer
        if self.every_n_iterations is not None:
            logging.log_every_n_steps = self.every_n_iterations
        elif logging.log_every_n_steps == LIGHTNINGS_DEFAULT:
            logging.log_every_n_steps = 1  # set on the Trainer, so that other callbacks log the same iterations

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._iteration = 0

    def measure(self, trainer: pl.Trainer, outputs: Any, batch: Any) -> dict[str, float]:
        """The metrics of the iteration that has just finished, computed once. Collective: all ranks must call it."""
        iteration = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if iteration != self._iteration:
            metrics = _numbers(outputs) if isinstance(outputs, Mapping) else {}
            if isinstance(batch, Rollout):
                ranks = Ranks.of(trainer.strategy)
                metrics = {**rollout_metrics(batch, ranks), **metrics}
                metrics |= throughput(batch, metrics, ranks)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, MetricsWatcher):
                    metrics |= callback.on_metrics(iteration, metrics)
            self._latest, self._iteration = metrics, iteration
        return self._latest

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics = self.measure(trainer, outputs, batch)
        if not metrics and not self._warned:
            self._warned = True
            name = type(pl_module).__name__
            rank_zero_warn(
                f"MetricsLog does nothing: it logs the numbers that training_step returns, and {name} has none"
            )
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        for logger in trainer.loggers if every and self._iteration % every == 0 else ():
            logger.log_metrics(metrics, step=self._iteration)
        # For checkpoints: their names contain the iteration, and any metric may select the best one.
        offer(trainer, {**metrics, "iteration": float(self._iteration)}, pl_module.device)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measured = {}

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the metrics of an evaluation's engine sync, which the first batch of each set has, and the share of
        lost verdicts, which the last one has."""
        if isinstance(batch, Rollout) and evaluation_counts(trainer):
            self._measured |= {
                f"val/{batch.name}/{name}": value
                for name, value in batch.metrics.items()
                if name.startswith(("sync/", "verifier/"))
            }

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not earlier: an abandoned evaluation is repeated by the resumed run, which would log this again.
        for logger in trainer.loggers if self._measured else ():
            logger.log_metrics(self._measured, step=trainer.fit_loop.epoch_loop.total_batch_idx + 1)
        self._measured = {}


def offer(trainer: pl.Trainer, metrics: Mapping[str, float], device: torch.device) -> None:
    """Put metrics into ``trainer.callback_metrics``, as Lightning's LearningRateMonitor does; by ``pl_module.log_dict``
    that would take longer for a hundred curves than to compute them."""
    values = torch.tensor(list(metrics.values()), dtype=torch.get_default_dtype()).to(device)
    # Clones: who saves one of them in a checkpoint does not save all.
    trainer.callback_metrics.update(zip(metrics, (value.clone() for value in values), strict=True))


def _numbers(outputs: Mapping[str, Any]) -> dict[str, float]:
    """The scalars among what a training step returns."""
    return {
        name: float(value)
        for name, value in outputs.items()
        if isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
    }


def rollout_metrics(rollout: Rollout, ranks: Ranks = ALONE) -> dict[str, float]:
    """Statistics of *all* sampled responses, and (``train/``) of those trained on; over all ranks.

    Dynamic sampling keeps a biased subset: its accuracy stays near one half while the policy's rises. Lengths are in
    response tokens, including EOS.
    """
    own = [] if rollout.placeholder else list(zip(rollout.completions, rollout.results, strict=True))
    dropped = [pair for group in rollout.dropped for pair in zip(group.completions, group.results, strict=True)]
    updates = len(own) if not rollout.skip_update else 0
    share = [
        ((result.reward, len(completion.token_ids), completion.truncated, completion.late, row < updates), result.parts)
        for row, (completion, result) in enumerate([*own, *dropped])
    ]
    responses = [response for share in ranks.gather(share) for response in share]
    numbers = torch.tensor([[float(number) for number in row] for row, _ in responses])
    rewards, lengths, truncated, late, trained = numbers.reshape(-1, 5).unbind(1)
    trained_on = trained > 0
    names = dict.fromkeys(name for _, parts in responses for name in parts)
    parts = {name: torch.tensor([float(given.get(name, 0.0)) for _, given in responses]) for name in names}
    metrics = {
        "rollout/reward": rewards.mean(),
        "rollout/reward_std": rewards.std(correction=0),
        **{f"rollout/{name}": values.mean() for name, values in parts.items()},
        "rollout/length": lengths.mean(),
        "rollout/truncated": truncated.mean(),
        "rollout/late": late.mean(),
    }
    if "accuracy" in parts:
        right = parts["accuracy"] > 0.5
        metrics |= {"rollout/length_right": lengths[right].mean(), "rollout/length_wrong": lengths[~right].mean()}
    if not rollout.skip_update:
        metrics |= {"train/responses": trained_on.sum(), "train/length": lengths[trained_on].mean()}
        metrics["train/reward"] = rewards[trained_on].mean()
        if "accuracy" in parts:
            metrics["train/accuracy"] = parts["accuracy"][trained_on].mean()
    # An empty mean (say, without a right answer) is NaN: such a metric is left out.
    return {**{name: float(value) for name, value in metrics.items() if value.isfinite()}, **rollout.metrics}


def throughput(rollout: Rollout, metrics: Mapping[str, float], ranks: Ranks = ALONE) -> dict[str, float]:
    """Tokens per second of each phase and of the whole iteration, and each phase's share of the time; with overlap, the
    shares add up to more than 1.

    Phases up to the rewards count generated tokens, ``prepare`` and ``update`` the tokens trained on (prompt +
    response).
    """
    generated = metrics.get("rollout/generated_tokens", 0.0)
    trained = sum(ranks.gather(0.0 if rollout.placeholder else float(rollout.sequences.lengths.sum())))
    seconds = {phase: metrics[f"time/{phase}_s"] for phase in PHASES if f"time/{phase}_s" in metrics}
    beside = OVERLAPPED if "wait" in seconds else ()
    total = sum(spent for phase, spent in seconds.items() if phase not in beside)
    if total == 0:
        return {}
    speeds = {
        f"tokens_per_second/{phase}": (trained if phase in ("prepare", "update") else generated) / spent
        for phase, spent in seconds.items()
        if spent > 0
    }
    shares = {f"time_share/{phase}": spent / total for phase, spent in seconds.items()}
    return {**speeds, **shares, "tokens_per_second/total": generated / total, "time/total_s": total}
