"""LightningCLI with what every run has: curves, rollouts, evaluations, checkpoints, an exported model, a summary."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import torch
import transformers
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

import ibro_lightning.datamodules
import ibro_lightning.engines
import ibro_lightning.modules
import ibro_lightning.regularizers
import ibro_lightning.rewards
import ibro_lightning.sources.dataset
import ibro_lightning.strategies
import ibro_lightning.tasks  # noqa: F401  imported so that recipes may name classes without their module
from ibro_lightning import callbacks as ours
from ibro_lightning.callbacks.saved_config import header
from ibro_lightning.cli.trainer import build_trainer, flags_refused, loggers_for
from ibro_lightning.datamodules import RolloutDataModule
from ibro_lightning.dry_run.options import add_arguments
from ibro_lightning.errors import ConfigError, check_count
from ibro_lightning.guards import printing
from ibro_lightning.guards.endings import explanation, one_line
from ibro_lightning.guards.interruption import Interrupted
from ibro_lightning.guards.trainer_flags import refuse_batches, refuse_flags
from ibro_lightning.modules import PolicyModule
from ibro_lightning.runs.checkpoints.plugin import read_about, read_optimizers
from ibro_lightning.runs.checkpoints.validity import check_fits, check_limits
from ibro_lightning.runs.folder import callbacks_of, enter, is_fast_dev_run, refuse_curves, run_folder
from ibro_lightning.runs.holding import RunLock
from ibro_lightning.runs.loggers import resume_loggers
from ibro_lightning.runs.moving import make_room, put_back, reopen
from ibro_lightning.runs.resume import (
    check_continues,
    check_exists,
    checkpoints_elsewhere,
    evaluation_of,
    find_checkpoint,
    forget_beginning,
    logger_states_of,
    record_end,
    wind_back,
)
from ibro_lightning.runs.settings import ResumeOptions, RunSettings, check_settings, keep_settings, put_settings_back

MAX_SEED = 2**32 - 1
"""numpy takes no larger seed."""


class IbroCLI(LightningCLI):
    """LightningCLI with the settings, callbacks and commands of ibro_lightning."""

    resumed: Mapping[str, Any] = {}
    """What the checkpoint from which training resumes records about itself."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The command that was given, or all of them. The other three parsers take a tenth of a second to build."""
        known = LightningCLI.subcommands()
        return {name: skipped for name, skipped in known.items() if name in sys.argv[1:2]} or known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--num_threads",
            type=int | None,
            default=None,
            help="CPU threads of this process. Small models are fastest with 1; None leaves torch's choice.",
        )
        add_arguments(parser)
        parser.add_class_arguments(ResumeOptions, "resume")
        # Order matters: first those that react to failures and interruptions, then metrics and those that show them.
        kinds = {
            "rank_watch": ours.RankWatch,
            "interruptions": ours.Interruptions,
            "run_lock": RunLock,
            "heartbeat": ours.Heartbeat,
            "metrics_log": ours.MetricsLog,
            "alarms": ours.Alarms,
            "information_plane": ours.InformationPlane,
            "progress": ours.IterationProgress,
            "rollout_log": ours.RolloutLog,
            "samples": ours.SamplesTable,
            "overview": ours.TensorBoardOverview,
            "evaluation_report": ours.EvaluationReport,
            "export": ours.ExportModel,
            "checkpoint": ours.IterationCheckpoint,
            "summary": ours.RunSummary,
        }
        for name, kind in kinds.items():
            parser.add_lightning_class_args(kind, name)
        # A plain Trainer's callback measures; from the command line it is there in any case, and off.
        parser.set_defaults({"information_plane.every_n_iterations": 0})

    def _parse_ckpt_path(self) -> None:
        """Replaces LightningCLI's, which reads the whole checkpoint for hyperparameters that ours do not hold."""
        subcommand = self.config.get("subcommand")
        if subcommand and (requested := self.config[subcommand].get("ckpt_path")):
            check_exists(requested)

    def _set_seed(self) -> None:
        if not 0 <= (seed := self._get(self.config, "seed_everything")) <= MAX_SEED:
            raise ConfigError("seed_everything", seed, f"write a whole number from 0 to {MAX_SEED}")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        if not printing.is_terminal(sys.stderr):  # bars redraw their line, which does not work in a log file
            transformers.utils.logging.disable_progress_bar()
            datasets.disable_progress_bars()
        if (threads := self._get(self.config, "num_threads")) is not None:
            check_count("num_threads", threads, 1, ", or null")
            torch.set_num_threads(threads)

    def instantiate_classes(self) -> None:
        try:
            with self._named_settings():
                super().instantiate_classes()
        except ValueError as error:  # e.g. a logger's package is missing: the parser lists all it tried
            if "loggers.logger.Logger" not in str(error) or explanation(error) is not None:
                raise
            named = re.search(r"given class_path '([\w.]+)':\s*([^\n]+)", str(error))
            value, reason = (named[1], named[2]) if named else ("cannot be made", str(error))
            raise ConfigError("trainer.logger", value, reason) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        settings = self._get(self.config_init, "trainer")
        refuse_flags(settings)
        if self._get(self.config_init, "dry_run"):  # before a Trainer is built: its GPUs may be elsewhere
            if self.subcommand != "fit":
                raise ConfigError("dry_run", True, f"only fit has a dry run: leave it out of {self.subcommand}")
            from ibro_lightning.dry_run.dry_run import dry_run  # its imports are heavy

            with self._named_settings():
                dry_run(self.model, self.datamodule, settings, self._get(self.config_init, "estimate"))
            raise SystemExit(0)
        kwargs["default_root_dir"] = str(Path(settings.default_root_dir or "runs/default").expanduser())
        kwargs["logger"] = loggers_for(str(self.subcommand), settings, kwargs["default_root_dir"])
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
        for overview in (callback for callback in callbacks if isinstance(callback, ours.TensorBoardOverview)):
            overview.recipe = overview.recipe or self._recipe_name()
        return build_trainer(super()._instantiate_trainer, config, callbacks)

    def _recipe_name(self) -> str:
        recipes = self._get(self.config, "config") or []
        return ", ".join(Path(str(recipe)).stem for recipe in recipes)

    def _run_subcommand(self, subcommand: str) -> None:
        watches = [one.watch for one in callbacks_of(self.trainer, ours.RankWatch) if self.trainer.world_size > 1]
        for watch in watches:
            watch.start()  # before the Trainer's first hook: data may be missing on only one machine
        try:
            with self._named_settings(), RunLock.of(self.trainer).held(self.trainer, subcommand):
                super()._run_subcommand(subcommand)
        finally:
            for watch in watches:
                watch.stop_without_group()

    @contextmanager
    def _named_settings(self) -> Iterator[None]:
        """Completes an error that names an object's field with the object's path in the recipe."""
        try:
            yield
        except Exception as error:
            if isinstance(own := explanation(error), ConfigError):
                self.parser.paths.complete(own)
            raise

    def fit(self, **kwargs: Any) -> None:
        if is_fast_dev_run(self.trainer):
            rank_zero_info(f"fast_dev_run: nothing is written to or removed from {run_folder(self.trainer)}")
            self._checkpoint(kwargs)
            self._fit(kwargs)
            return
        folder, requested = run_folder(self.trainer), kwargs.get("ckpt_path")
        checkpoint = self._checkpoint(kwargs)
        continues = checkpoint is not None and folder.resolve() in checkpoint.resolve().parents
        if checkpoint is not None:
            self.trainer.num_sanity_val_steps = 0  # "before training" is in the checkpoint
            self.resumed = check_continues(checkpoint, folder, type(self.model).__name__)
            check_limits(read_about(checkpoint), self.trainer.max_epochs, self.trainer.max_steps, checkpoint)
            options = self._get(self.config_init, "resume")
            check_settings(checkpoint, self._settings, options)
            if isinstance(self.datamodule, RolloutDataModule):
                self.datamodule.allow_other_prompts = options.allow_changes
            if isinstance(self.model, PolicyModule):
                self.model.check_resumed_optimizers(read_optimizers(checkpoint))
            if continues:
                reopen(folder, checkpoint)
                states = logger_states_of(folder, self.resumed)
                wind_back(folder, self.resumed)
                resume_loggers(self.trainer.loggers, states, folder)
        elif requested is not None:
            if (other := checkpoints_elsewhere(folder, self.trainer.loggers)) is not None:
                remedy = f"there is no checkpoint in {folder}, but there is {other}: write that, or leave it out"
                raise ConfigError("ckpt_path", requested, remedy)
            rank_zero_info(f"there is no checkpoint in {folder} yet: starting from the beginning")
            if continues := forget_beginning(folder):
                reopen(folder)
        kept = keep_settings(folder, self._settings) if continues else None
        needed = self.model.source_folders if isinstance(self.model, PolicyModule) else ()
        room = None if continues else make_room(folder, needed, RunLock.of(self.trainer).wait_s)
        try:
            if not continues:
                refuse_curves(self.trainer.loggers)
            self._fit(kwargs)
        except BaseException as error:
            # Not after a traceback: a bug report needs config.yaml.
            if isinstance(error, Interrupted | KeyboardInterrupt) or one_line(error) is not None:
                if self.trainer.fit_loop.epoch_loop.total_batch_idx < self.resumed.get("iteration", 0):
                    put_settings_back(folder, kept)
                if room is not None:
                    put_back(room)
            raise

    @cached_property
    def _settings(self) -> RunSettings:
        """The run's settings as ``config.yaml`` will hold them."""
        parser = self._parser(self.subcommand)
        return RunSettings.parse(
            header() + parser.dump(self.config[self.subcommand], skip_none=False, skip_validation=True)
        )

    def _fit(self, settings: dict[str, Any]) -> None:
        batches = self.datamodule.train_dataloader() if hasattr(self.datamodule, "train_dataloader") else None
        if isinstance(batches, Sized):
            refuse_batches(self.trainer, len(batches))
        with flags_refused(self._get(self.config_init, "trainer")):
            self.trainer.fit(**settings)

    def after_fit(self) -> None:
        """Evaluate once more if training did not end with an evaluation, for the summary."""
        if isinstance(self.model, PolicyModule) and not is_fast_dev_run(self.trainer):
            evaluation = None
            if not self.model.evaluation_is_current:
                evaluation = evaluation_of(run_folder(self.trainer), self.resumed, self.model.iteration)
                if evaluation is None and self.trainer.limit_val_batches:
                    # It makes all ranks agree on a stop requested meanwhile.
                    self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
            for summary in callbacks_of(self.trainer, ours.RunSummary):
                summary.after = evaluation or summary.after
                summary.finish(self.trainer, self.model)
            record_end(run_folder(self.trainer), self.model.iteration, self.trainer.loggers)

    def _checkpoint(self, settings: dict[str, Any]) -> Path | None:
        """Resolve ``ckpt_path`` in ``settings`` to the path of the checkpoint that it means, and return that."""
        enter(self.trainer, str(self.subcommand))
        if (requested := settings.get("ckpt_path")) is None:
            return None
        path = find_checkpoint(requested, run_folder(self.trainer))
        settings["ckpt_path"] = None if path is None else str(path)
        if path is not None:
            self.model.register_load_state_dict_pre_hook(partial(_check_weights, path))
        elif self.subcommand != "fit":
            raise ConfigError("ckpt_path", requested, f"there is no checkpoint in {self.trainer.default_root_dir}")
        return path

    def validate(self, **kwargs: Any) -> None:
        self._evaluate(self.trainer.validate, {**kwargs, "verbose": False})  # EvaluationReport prints a better table

    def test(self, **kwargs: Any) -> None:
        self._evaluate(self.trainer.test, {**kwargs, "verbose": False})

    def predict(self, **kwargs: Any) -> None:
        # Responses are in the parquet files.
        self._evaluate(self.trainer.predict, {**kwargs, "return_predictions": False})

    def _evaluate(self, command: Callable[..., Any], settings: dict[str, Any]) -> None:
        self._checkpoint(settings)
        with flags_refused(self._get(self.config_init, "trainer")):
            command(**settings)


def _check_weights(path: Path, module: pl.LightningModule, state_dict: Mapping[str, Any], *_: Any) -> None:
    """A hook of ``load_state_dict`` that refuses another model's weights in one line."""
    check_fits({name: value.shape for name, value in state_dict.items()}, module, path)
