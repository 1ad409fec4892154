"""TensorBoard's HPARAMS tab, and the curves that count on one page."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard.summary import custom_scalars, hparams

from ibro_lightning.runs.folder import is_fast_dev_run
from ibro_lightning.seeding import run_seed

CURVES = {
    "entropy (nats)": ["policy/entropy"],
    "length (tokens)": ["rollout/length"],
    "advantage and entropy": ["ib/cov_advantage_entropy", "ib/mean_advantage_times_mean_entropy"],
}


class TensorBoardOverview(pl.Callback):
    """Fills TensorBoard's HPARAMS tab (recipe, method, coefficient, seed, … → the accuracy on each evaluation set), and
    its custom scalars with four charts: accuracy, entropy, length, and the two parts of what IB adds.

    Does nothing for other loggers.

    Args:
        recipe: the run's name in the table; the command line writes that of its ``--config``.
    """

    def __init__(self, recipe: str = "") -> None:
        self.recipe = recipe
        self._written = False

    def state_dict(self) -> dict[str, Any]:
        return {"written": self._written}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._written = state_dict["written"]  # a resumed run continues the files that have it

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not loggers or self._written or is_fast_dev_run(trainer):
            return
        self._written = True
        accuracies = accuracy_curves(trainer)
        settings = {"recipe": self.recipe, **settings_of(pl_module, trainer)}
        charts = {"accuracy": ["Multiline", accuracies]} | {name: ["Multiline", tags] for name, tags in CURVES.items()}
        for logger in loggers:
            writer = logger.experiment._get_file_writer()
            # The tab reads the metrics' latest points from the curves themselves.
            for summary in hparams(settings, dict.fromkeys(accuracies, 0.0)):
                writer.add_summary(summary)
            writer.add_summary(custom_scalars({"overview": charts}))


def accuracy_curves(trainer: pl.Trainer) -> list[str]:
    """The names of the curves of avg@k on each evaluation set, or of the training rollouts' accuracy without any."""
    sets = getattr(trainer.datamodule, "eval_sets", None) or {}  # type: ignore[attr-defined]
    return [f"val/{name}/avg@{one.samples}" for name, one in sets.items()] or ["rollout/accuracy"]


def settings_of(module: Any, trainer: pl.Trainer) -> dict[str, str | float]:
    """What tells runs apart, as far as the module and its data have it."""
    data, regularizer = trainer.datamodule, getattr(module, "regularizer", None)  # type: ignore[attr-defined]
    found: dict[str, Any] = {"module": type(module).__name__, "seed": run_seed()}
    if regularizer is not None:
        found |= {"regularizer": type(regularizer).__name__, "coef": regularizer.coef}
    for owner, name in ((module, "advantage"), (module, "learning_rate"), (data, "group_size")):
        found[name] = getattr(owner, name, None)
    return {
        name: value if isinstance(value, int | float) else str(value)
        for name, value in found.items()
        if value is not None
    }
