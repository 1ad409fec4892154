"""The command line: LightningCLI with recipes by name, run folders, and errors of one line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lightning
import lightning.pytorch as pl
import torch
import transformers
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

import ibro_lightning.datamodules
import ibro_lightning.engines
import ibro_lightning.modules
import ibro_lightning.regularizers
import ibro_lightning.rewards
import ibro_lightning.strategies  # noqa: F401  imported so that recipes may name classes without their module
from ibro_lightning import compare, exporting
from ibro_lightning.arguments import OneLineParser, resolve_configs
from ibro_lightning.callbacks import (
    EvaluationReport,
    ExportModel,
    Heartbeat,
    Interruptions,
    IterationCheckpoint,
    IterationProgress,
    MetricsLog,
    RankWatch,
    RolloutLog,
    RunSummary,
    SamplesTable,
)
from ibro_lightning.checkpoints import CheckpointFiles, check_fits
from ibro_lightning.errors import ConfigError, RankError, RewardError, RolloutError, check_at_least
from ibro_lightning.estimate import add_arguments, dry_run
from ibro_lightning.guards import interruption
from ibro_lightning.guards.disk import PARTIAL, DiskFullError, as_disk_full, written_whole
from ibro_lightning.guards.interruption import Interrupted
from ibro_lightning.guards.orphans import end_with_launcher, started_by_lightning
from ibro_lightning.modules import PolicyModule
from ibro_lightning.modules.nonfinite import NonFiniteError
from ibro_lightning.resume import (
    check_continues,
    check_exists,
    evaluation_of,
    find_checkpoint,
    forget_beginning,
    note_end,
    wind_back,
)
from ibro_lightning.run_folders import HEADER, make_room, put_back
from ibro_lightning.version import __version__


class SaveResolvedConfig(SaveConfigCallback):
    """Every setting as it was used, under a header that says by which versions.

    ``config.yaml`` belongs to training; the other commands write ``validate.yaml`` and so on beside it.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.already_saved:
            return
        name = "config.yaml" if stage == "fit" else f"{TrainerFn(stage).value}.yaml"
        self.config_filename = name + PARTIAL
        super().setup(trainer, pl_module, stage)
        folder = trainer.log_dir  # a broadcast: all ranks must ask
        if trainer.is_global_zero and folder is not None:
            partial = Path(folder) / self.config_filename
            with written_whole(Path(folder) / name):
                partial.write_text(_header() + partial.read_text())


class IbroCLI(LightningCLI):
    """Adds what every run has: curves, rollouts, evaluations, checkpoints, the exported model and a summary."""

    resumed: Mapping[str, Any] = {}
    """What the checkpoint that training goes on from says about itself."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--num_threads",
            type=int | None,
            default=None,
            help="CPU threads of this process. Small models are fastest with 1; None leaves torch's choice.",
        )
        add_arguments(parser)
        # Order matters: who must hear of a failure or a wish to stop first; then the metrics, and those who show them.
        parser.add_lightning_class_args(RankWatch, "rank_watch")
        parser.add_lightning_class_args(Interruptions, "interruptions")
        parser.add_lightning_class_args(Heartbeat, "heartbeat")
        parser.add_lightning_class_args(MetricsLog, "metrics_log")
        parser.add_lightning_class_args(IterationProgress, "progress")
        parser.add_lightning_class_args(RolloutLog, "rollout_log")
        parser.add_lightning_class_args(SamplesTable, "samples")
        parser.add_lightning_class_args(EvaluationReport, "evaluation_report")
        parser.add_lightning_class_args(ExportModel, "export")
        parser.add_lightning_class_args(IterationCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RunSummary, "summary")

    def _parse_ckpt_path(self) -> None:
        """In place of LightningCLI's, which reads the whole checkpoint for hyperparameters that ours do not hold."""
        subcommand = self.config.get("subcommand")
        if subcommand and (wanted := self.config[subcommand].get("ckpt_path")):
            check_exists(wanted)

    def before_instantiate_classes(self) -> None:
        if not sys.stderr.isatty():  # bars redraw their line, which a log file cannot
            transformers.utils.logging.disable_progress_bar()
            datasets.disable_progress_bars()
        if (threads := self._get(self.config, "num_threads")) is not None:
            check_at_least("num_threads", threads, 1, ", or null")
            torch.set_num_threads(threads)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        settings = self._get(self.config_init, "trainer")
        refuse_trainer_settings(settings)
        if self._get(self.config_init, "dry_run"):  # before there is a Trainer, whose GPUs may be elsewhere
            if self.subcommand != "fit":
                raise ConfigError("dry_run", True, f"only fit has one: leave it out of {self.subcommand}")
            dry_run(self.model, self.datamodule, settings, self._get(self.config_init, "estimate"))
            raise SystemExit(0)
        root = kwargs["default_root_dir"] = settings.default_root_dir or "runs/default"
        if kwargs.get("inference_mode") is None and settings.inference_mode is True:
            kwargs["inference_mode"] = False  # the default, under which FSDP2 cannot gather weights
        if settings.logger in (None, True):
            # Only training has curves; the other commands must not add to those of a run they look at.
            curves = TensorBoardLogger(root, name="", version="", default_hp_metric=False)
            kwargs["logger"] = curves if self.subcommand == "fit" else False
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
        """Leaves out those of our callbacks that a Trainer flag switches off."""
        switches = {"enable_progress_bar": ProgressBar, "enable_checkpointing": Checkpoint}
        off = tuple(kind for flag, kind in switches.items() if config.get(flag) is False)
        plugins = config.get("plugins") or []
        config["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), CheckpointFiles()]
        return super()._instantiate_trainer(config, [c for c in callbacks if not isinstance(c, off)])

    def _run_subcommand(self, subcommand: str) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RankWatch) and self.trainer.world_size > 1:
                callback.start()
        super()._run_subcommand(subcommand)

    def fit(self, **kwargs: Any) -> None:
        folder, wanted = Path(self.trainer.default_root_dir), kwargs.get("ckpt_path")
        checkpoint = self._checkpoint(kwargs)
        continues = checkpoint is not None and folder.resolve() in checkpoint.resolve().parents
        if checkpoint is not None:
            self.trainer.num_sanity_val_steps = 0  # "before training" is in the checkpoint
            self.resumed = check_continues(checkpoint, folder, type(self.model).__name__)
            if continues:
                wind_back(folder, self.resumed)
        elif wanted is not None:
            rank_zero_info(f"there is no checkpoint in {folder} yet: starting anew")
            continues = forget_beginning(folder)
        existed, aside = folder.exists(), None
        if not continues:
            needed = self.model.source_folders if isinstance(self.model, PolicyModule) else ()
            aside = make_room(folder, needed)
        try:
            self.trainer.fit(**kwargs)
        except Exception as error:
            if _own_error(error) is not None and (aside is not None or not existed):
                put_back(folder, aside)
            raise

    def after_fit(self) -> None:
        """Training that did not end with an evaluation gets one, so that the summary tells how it ended."""
        if isinstance(self.model, PolicyModule):
            known = None
            if not self.model.evaluation_is_current:
                known = evaluation_of(Path(self.trainer.default_root_dir), self.resumed, self.model.iteration)
                if known is None:  # all ranks agree in it, if somebody has asked to stop meanwhile
                    self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, RunSummary):
                    callback.after = known or callback.after
                    callback.finish(self.trainer, self.model)
            note_end(Path(self.trainer.default_root_dir), self.model.iteration)

    def _checkpoint(self, settings: dict[str, Any]) -> Path | None:
        """The checkpoint that ``ckpt_path`` in ``settings`` means, which is then the one to be loaded."""
        if (wanted := settings.get("ckpt_path")) is None:
            return None
        path = find_checkpoint(wanted, Path(self.trainer.default_root_dir))
        settings["ckpt_path"] = None if path is None else str(path)
        if path is not None:
            self.model.register_load_state_dict_pre_hook(partial(_check_weights, path))
        elif self.subcommand != "fit":
            raise ConfigError("ckpt_path", wanted, f"there is no checkpoint in {self.trainer.default_root_dir}")
        return path

    def validate(self, **kwargs: Any) -> None:
        self._checkpoint(kwargs)
        self.trainer.validate(**{**kwargs, "verbose": False})  # EvaluationReport prints a better table

    def test(self, **kwargs: Any) -> None:
        self._checkpoint(kwargs)
        self.trainer.test(**{**kwargs, "verbose": False})

    def predict(self, **kwargs: Any) -> None:
        self._checkpoint(kwargs)
        self.trainer.predict(**{**kwargs, "return_predictions": False})  # they are in the parquet files


def refuse_trainer_settings(settings: Any) -> None:
    """Raise :class:`ConfigError` for Trainer settings whose place is taken, as modules here optimise by hand."""
    if settings.accumulate_grad_batches not in (None, 1):
        raise ConfigError(
            "trainer.accumulate_grad_batches",
            settings.accumulate_grad_batches,
            "write model.mini_batch_prompts (an optimizer step's) and model.micro_batch_tokens (what memory holds)",
        )
    if settings.gradient_clip_val is not None:
        raise ConfigError("trainer.gradient_clip_val", settings.gradient_clip_val, "write model.max_grad_norm")


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ibro_lightning``; ``args`` as on the command line."""
    argv = list(sys.argv[1:] if args is None else args)
    # Lightning and the parser read sys.argv themselves (for relaunches and messages), so it must hold what is parsed.
    interruption.clear()
    end_with_launcher()
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    try:
        if argv[:1] == ["compare"]:
            compare.main(argv[1:])
            return
        if argv[:1] == ["export"]:
            exporting.main(resolve_configs(argv[1:]))
            return
        sys.argv[1:] = resolve_configs(argv)
        IbroCLI(
            model_class=pl.LightningModule,
            datamodule_class=pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveResolvedConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=OneLineParser,
            parser_kwargs={"parser_mode": "omegaconf", "version": __version__},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
    except Interrupted as stop:
        # Lightning's observer kills everybody if a process that it has started ends with another code than 0.
        raise SystemExit(0 if started_by_lightning() else stop.exit_code) from None
    except Exception as error:
        cause = _own_error(error) or as_disk_full(error, Path.cwd() / "a file of this run")
        if cause is None:
            raise
        sys.stderr.write(f"error: {' '.join(str(cause).split())}\n")
        raise SystemExit(2) from error


# Warnings that tell a user nothing they could act on.
NOISE = (
    ".*LeafSpec.*",
    ".*does not have many workers.*",
    ".*across ranks is zero.*",
    ".*sync_dist=True.*",  # vLLM opens a process group, even of one; evaluations are reduced by torchmetrics
)

TRAINER_DEFAULTS = {
    # "auto" would take Apple's GPUs, which have no float64; sampling and advantages need it.
    "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
    "devices": 1,
    "num_sanity_val_steps": -1,  # the whole evaluation before training: "accuracy before"
    "log_every_n_steps": 1,
    "enable_model_summary": False,
}


def _own_error(error: BaseException | None) -> Exception | None:
    """The error of ours that ``error`` is or was caused by; the configuration parser wraps what constructors raise."""
    ours = ConfigError | RewardError | RolloutError | RankError | DiskFullError | NonFiniteError
    while error is not None and not isinstance(error, ours):
        error = error.__cause__
    return error


def _check_weights(path: Path, module: pl.LightningModule, state_dict: Mapping[str, Any], *_: Any) -> None:
    """A hook of ``load_state_dict``: another model's weights are refused in one line."""
    check_fits({name: value.shape for name, value in state_dict.items()}, module, path)


def _header() -> str:
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}, transformers {transformers.__version__}"
    return f"{HEADER} {__version__}, {versions}\n# python -m ibro_lightning {' '.join(sys.argv[1:])}\n"
