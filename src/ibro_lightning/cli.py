"""The command line: LightningCLI with recipes by name, run folders, and errors of one line."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import datasets
import lightning
import lightning.pytorch as pl
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

import ibro_lightning.datamodules
import ibro_lightning.engines
import ibro_lightning.modules
import ibro_lightning.regularizers
import ibro_lightning.rewards
import ibro_lightning.strategies  # noqa: F401  imported so that recipes may name classes without their module
from ibro_lightning import compare
from ibro_lightning.callbacks import (
    EvaluationReport,
    ExportModel,
    IterationCheckpoint,
    IterationProgress,
    MetricsLog,
    RolloutLog,
    RunSummary,
    SamplesTable,
)
from ibro_lightning.errors import ConfigError, RewardError, RolloutError, check_at_least
from ibro_lightning.modules import PolicyModule
from ibro_lightning.recipes import find_config
from ibro_lightning.run_folders import HEADER, make_room, put_back
from ibro_lightning.version import __version__


class OneLineParser(LightningArgumentParser):
    """Reports a bad setting in one line, with the nearest name that would have been right."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(str(message).split())
        sys.stderr.write(f"error: {text}{self._suggest(text)}\n")
        raise SystemExit(2)

    def _suggest(self, text: str) -> str:
        if unknown := re.search(r"[Oo]ption '([\w.]+)' is not accepted|[Kk]ey \"([\w.]+)\" is not", text):
            name = unknown[1] or unknown[2]
            near = difflib.get_close_matches(name, [action.dest for action in self._actions], n=1)
            return f" - did you mean {near[0]}?" if near else ""
        if base := re.search(r"<class '(ibro_lightning[\w.]*)\.(\w+)'>.*Expected a dot import path string", text):
            classes = [c.__name__ for c in _subclasses(getattr(importlib.import_module(base[1]), base[2]))]
            return f" - write one of {', '.join(sorted(classes))}, or module.Class of your own" if classes else ""
        return ""


def _subclasses(base: type) -> Iterator[type]:
    """The concrete classes below ``base`` that are imported."""
    subclass: type
    for subclass in base.__subclasses__():
        if not inspect.isabstract(subclass):
            yield subclass
        yield from _subclasses(subclass)


class SaveResolvedConfig(SaveConfigCallback):
    """Every setting as it was used, under a header that says by which versions.

    ``config.yaml`` belongs to training; the other commands write ``validate.yaml`` and so on beside it.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.already_saved:
            return
        self.config_filename = "config.yaml" if stage == "fit" else f"{TrainerFn(stage).value}.yaml"
        super().setup(trainer, pl_module, stage)
        folder = trainer.log_dir  # a broadcast: all ranks must ask
        if trainer.is_global_zero and folder is not None:
            path = Path(folder) / self.config_filename
            path.write_text(_header() + path.read_text())


class IbroCLI(LightningCLI):
    """Adds what every run has: curves, rollouts, evaluations, checkpoints, the exported model and a summary."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--num_threads",
            type=int | None,
            default=None,
            help="CPU threads of this process. Small models are fastest with 1; None leaves torch's choice.",
        )
        # Order matters: the metrics come first, those who show them after.
        parser.add_lightning_class_args(MetricsLog, "metrics_log")
        parser.add_lightning_class_args(IterationProgress, "progress")
        parser.add_lightning_class_args(RolloutLog, "rollout_log")
        parser.add_lightning_class_args(SamplesTable, "samples")
        parser.add_lightning_class_args(EvaluationReport, "evaluation_report")
        parser.add_lightning_class_args(ExportModel, "export")
        parser.add_lightning_class_args(IterationCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RunSummary, "summary")
        parser.set_defaults(
            {
                "checkpoint.every_n_epochs": 20,
                "checkpoint.save_last": True,
                "checkpoint.save_on_train_epoch_end": True,
                "checkpoint.filename": "iteration_{iteration:06.0f}",
                "checkpoint.enable_version_counter": False,
                "checkpoint.auto_insert_metric_name": False,
            }
        )

    def _parse_ckpt_path(self) -> None:
        """In place of LightningCLI's, which reads the whole checkpoint for hyperparameters that ours do not hold."""
        subcommand = self.config.get("subcommand")
        checkpoint = self.config[subcommand].get("ckpt_path") if subcommand else None
        if checkpoint in (None, "last", "best", "hpc", "registry"):
            return
        path = Path(checkpoint)
        if not path.exists():
            raise ConfigError("ckpt_path", checkpoint, "no such checkpoint: look in checkpoints/ of the run's folder")
        if path.is_file() and not zipfile.is_zipfile(path):
            raise ConfigError("ckpt_path", checkpoint, "this file is no checkpoint, or only a part of one")

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
        switches = {"enable_progress_bar": ProgressBar, "enable_checkpointing": ModelCheckpoint}
        off = tuple(kind for flag, kind in switches.items() if config.get(flag) is False)
        return super()._instantiate_trainer(config, [c for c in callbacks if not isinstance(c, off)])

    def fit(self, **kwargs: Any) -> None:
        folder, checkpoint = Path(self.trainer.default_root_dir), kwargs.get("ckpt_path")
        if checkpoint == "last" and not (folder / "checkpoints" / "last.ckpt").exists():
            raise ConfigError("ckpt_path", "last", f"there is no checkpoint in {folder}: leave it out to start anew")
        if checkpoint is not None:
            self.trainer.num_sanity_val_steps = 0  # "before training" is in the checkpoint
        continues = checkpoint == "last" or (checkpoint and folder.resolve() in Path(checkpoint).resolve().parents)
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
            if not self.model.evaluation_is_current:
                self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, RunSummary):
                    callback.finish(self.trainer, self.model)

    def validate(self, **kwargs: Any) -> None:
        self.trainer.validate(**{**kwargs, "verbose": False})  # EvaluationReport prints a better table

    def test(self, **kwargs: Any) -> None:
        self.trainer.test(**{**kwargs, "verbose": False})

    def predict(self, **kwargs: Any) -> None:
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
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    try:
        if argv[:1] == ["compare"]:
            compare.main(argv[1:])
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
    except Exception as error:
        if (cause := _own_error(error)) is None:
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


def resolve_configs(argv: Sequence[str]) -> list[str]:
    """Replace every ``--config NAME`` by the file it stands for."""
    resolved: list[str] = []
    expects_config = False
    for argument in argv:
        if expects_config:
            argument, expects_config = str(find_config(argument)), False
        elif argument in ("--config", "-c"):
            expects_config = True
        elif argument.startswith("--config="):
            argument = f"--config={find_config(argument.removeprefix('--config='))}"
        resolved.append(argument)
    return resolved


def _own_error(error: BaseException | None) -> Exception | None:
    """The error of ours that ``error`` is or was caused by; the configuration parser wraps what constructors raise."""
    while error is not None and not isinstance(error, ConfigError | RewardError | RolloutError):
        error = error.__cause__
    return error


def _header() -> str:
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}, transformers {transformers.__version__}"
    return f"{HEADER} {__version__}, {versions}\n# python -m ibro_lightning {' '.join(sys.argv[1:])}\n"
