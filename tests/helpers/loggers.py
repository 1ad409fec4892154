"""Loggers with the interface of those whose packages the tests do without, and one that a user might write."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from ibro_lightning.datamodules import EvalSet, RolloutDataModule
from ibro_lightning.modules import DAPOModule
from ibro_lightning.types import SamplingParams


def append(path: Path, record: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record, default=str) + "\n")


class OwnLogger(Logger):
    """Metrics, and nothing else of what loggers may offer."""

    def __init__(self, path: str = "own/metrics.jsonl") -> None:
        super().__init__()
        self.path = Path(path)

    name = version = None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        append(self.path, {**metrics, "step": step})

    def log_hyperparams(self, params: Any, *arguments: Any, **settings: Any) -> None:
        pass


class NotInstalled(OwnLogger):
    """A logger whose package is missing says so when it is made, as Lightning's do."""

    def __init__(self) -> None:
        raise ModuleNotFoundError("Requirement 'logs>=1.0' not met. HINT: Try running `pip install -U 'logs>=1.0'`")


class RunOfWandb:
    """What ``wandb.init`` returns, as far as Lightning and we use it."""

    url = None

    def __init__(self, folder: Path, id: str) -> None:
        self.id, self.dir, self.path = id, str(folder / f"offline-run-{id}" / "files"), folder / f"{id}.jsonl"
        self.config: dict[str, Any] = {}

    def log(self, metrics: dict[str, Any]) -> None:
        append(self.path, {**metrics, "step": metrics["trainer/global_step"]})


class LikeWandb(WandbLogger):
    """Lightning's own, on a run in a file."""

    def __init__(self, save_dir: str = "wandb", id: str | None = None) -> None:
        Logger.__init__(self)
        self._save_dir, self._id, self._project, self._prefix = save_dir, id, "project", ""
        self._wandb_init: dict[str, Any] = {"id": id, "resume": "allow"}
        self._experiment: Any = None
        self._checkpoint_callbacks = {}

    @property
    def experiment(self) -> Any:
        if self._experiment is None:
            folder = Path(self._save_dir)
            number = len(list(folder.glob("*.jsonl")))
            self._experiment = RunOfWandb(folder, self._wandb_init["id"] or f"run{number}")
        return self._experiment

    def log_hyperparams(self, params: Any) -> None:
        self.experiment.config.update(params)

    def log_table(
        self, key: str, columns: Any = None, data: Any = None, dataframe: Any = None, step: int | None = None
    ) -> None:
        self.log_metrics({key: [columns, *data]}, step)


class ClientOfMLflow:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        path = self.folder / run_id / artifact_file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


class LikeMLFlow(MLFlowLogger):
    """Lightning's own, on a client that writes files."""

    def __init__(self, save_dir: str = "mlruns", run_id: str | None = None) -> None:
        Logger.__init__(self)
        self._tracking_uri, self._run_id, self._experiment_id = f"file:{save_dir}", run_id, "0"
        self._client = ClientOfMLflow(Path(save_dir))
        self._initialized, self._checkpoint_callback = False, None

    @property
    def experiment(self) -> Any:
        if self._run_id is None:
            self._run_id = f"run{len(list(self._client.folder.glob('*.jsonl')))}"
        return self._client

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        append(self.experiment.folder / f"{self.run_id}.jsonl", {**metrics, "step": step})

    def log_hyperparams(self, params: Any) -> None:
        pass

    def finalize(self, status: str = "success") -> None:
        pass


def parts(policy: Path, batch: int = 64) -> tuple[DAPOModule, RolloutDataModule]:
    import user_code

    pl.seed_everything(3)
    sampling = SamplingParams(temperature=1.0, max_tokens=6)
    sets = {"starts": EvalSet(user_code.Starts(), user_code.SaysEquals(), 2, sampling)}
    module = DAPOModule(str(policy), optimizer=partial(torch.optim.AdamW, lr=1e-2))
    data = RolloutDataModule(
        user_code.Starts(),
        user_code.SaysEquals(),
        sampling,
        prompts_per_rollout=2,
        group_size=4,
        allow_overlap=True,
        reward_pool=None,
        eval_sets=sets,
        eval_batch_prompts=batch,
    )
    return module, data
