"""The evaluation of a policy module: the accuracy on each set, its curves, and what ``trainer.validate`` returns."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from ibro_lightning.batches import Rollout
from ibro_lightning.callbacks.metrics_log import offer
from ibro_lightning.evaluation.metrics import Evaluation, SampleAccuracy, evaluation_scalars
from ibro_lightning.runs.folder import evaluation_counts


class Evaluator:
    """Evaluates validation and test epochs, each batch of which is a rollout of one evaluation set.

    Args:
        module: provides the trainer, the loggers and the device.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        self.at_step: int | None = None
        """The number of optimizer steps before the latest evaluation; None before the first."""
        self._metrics: dict[str, SampleAccuracy] = {}
        self._scalars: dict[str, float] = {}
        self._returned: list[Any] = []

    def begin(self) -> None:
        self._metrics = {}

    def add(self, rollout: Rollout, process_group: Any) -> None:
        """Count a batch; ``process_group``: the ranks that share the evaluation set."""
        if rollout.name not in self._metrics:
            self._metrics[rollout.name] = SampleAccuracy(process_group).to(self._module.device)
        if len(rollout):  # with more ranks than prompts in a batch, some have none
            self._metrics[rollout.name].update(rollout)

    def finish(self, iteration: int) -> dict[str, Evaluation]:
        """The evaluation of each set in the epoch, which is also logged at ``iteration``."""
        trainer = self._module.trainer
        evaluations = {name: metric.compute() for name, metric in self._metrics.items()}
        whole = evaluation_counts(trainer)
        if whole:
            self.at_step = trainer.global_step
        self._scalars = evaluation_scalars(evaluations, "test" if trainer.testing else "val")
        # The curves have the iteration as their x-axis, and a point before training, which Lightning would not log.
        for logger in self._module.loggers if whole else ():
            logger.log_metrics(self._scalars, step=iteration)
        if not trainer.sanity_checking:
            offer(trainer, self._scalars, self._module.device)
        loop = trainer.test_loop if trainer.testing else trainer.validate_loop
        self._returned = list(loop._logged_outputs)
        return evaluations

    def complete_returned(self) -> None:
        """Add the scalars to what ``trainer.validate`` returns, which otherwise holds only what Lightning logs itself;
        called after Lightning has written that to the loggers."""
        for returned in self._returned:
            returned.update(self._scalars)
        self._returned = []
