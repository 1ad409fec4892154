"""``trainer.validate`` and ``trainer.test`` from Python return what the evaluation found, and curves have it once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from helpers.models import TinySource
from helpers.rollouts import rollouts
from ibro_lightning.modules import DAPOModule


class CountingLogger(CSVLogger):
    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.written: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.written.append(dict(metrics))


@pytest.mark.parametrize("command", ["validate", "test"])
def test_what_is_returned_holds_every_sets_metrics(command: str, tmp_path: Path) -> None:
    logger = CountingLogger(tmp_path)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(logger=logger, default_root_dir=tmp_path, **quiet)
    rollout = rollouts(1)[0]
    loaders = [DataLoader([replace(rollout, name=name)], batch_size=None) for name in ("a", "b")]  # type: ignore
    returned = getattr(trainer, command)(DAPOModule(TinySource()), dataloaders=loaders, verbose=False)
    prefix = "val" if command == "validate" else "test"
    accuracy = rollout.outcomes.float().mean().item() if rollout.outcomes is not None else None
    assert len(returned) == 2
    for one in returned:
        for name in (f"{prefix}/a/accuracy", f"{prefix}/b/accuracy", f"{prefix}/accuracy"):
            assert isinstance(one[name], float)
            assert accuracy is None or one[name] == pytest.approx(accuracy)
            assert one[name] == trainer.callback_metrics[name]
    assert sum(f"{prefix}/b/accuracy" in metrics for metrics in logger.written) == 1
