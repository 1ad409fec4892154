"""Every flag of Lightning's Trainer does what its documentation says, or is refused in one line."""

from __future__ import annotations

import inspect
import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.run_comparison import differences
from ibro_lightning.cli.main import main
from ibro_lightning.engines import HFEngine
from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.trainer_flags import FLAGS, as_refusal, refuse_batches, refuse_flags, refuse_trainer
from ibro_lightning.models.spec import ModelSpec
from ibro_lightning.update.updater import Updater

FIT = ["fit", "--config", "tiny.yaml"]

# What the command line refuses, by when it is known: settings, Trainer, data, metrics.
REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "accumulate_grad_batches": (["accumulate_grad_batches=2"], ["model.mini_batch_prompts", "micro_batch_tokens"]),
    "precision": (["precision=64"], ["trainer.precision: 64", "32-true or bf16-mixed"]),
    "devices": (["devices=0"], ["trainer.devices: '0'"]),
    "barebones": (["barebones=true", "logger=true"], ["trainer.logger: ", "barebones"]),
    "limit_train_batches": (["limit_train_batches=0.5"], ["trainer.limit_train_batches: 0.5", "write 1 or more"]),
    "limit_val_batches": (["limit_val_batches=0.5"], ["trainer.limit_val_batches: 0.5"]),
    "val_check_interval": (["val_check_interval=2"], ["trainer.val_check_interval: 2", "an epoch has 1 batches"]),
    "callbacks": (
        ["callbacks=EarlyStopping", "callbacks.monitor=nope"],
        ["trainer.callbacks", "`nope`", "rollout/reward"],
    ),
}
# What Lightning itself refuses when a Trainer is made; the command line says it in one line that names the flag.
LIGHTNINGS: list[tuple[dict[str, Any], str]] = [
    ({"accelerator": "gpu", "devices": 99}, "accelerator"),
    ({"accelerator": "nope"}, "accelerator"),
    ({"check_val_every_n_epoch": None, "val_check_interval": 0.5}, "val_check_interval"),
    ({"devices": [0], "accelerator": "cpu"}, "devices"),
    ({"fast_dev_run": -1}, "fast_dev_run"),
    ({"limit_val_batches": -1}, "limit_val_batches"),
    ({"max_time": "soon"}, "max_time"),
    ({"profiler": "nope"}, "profiler"),
    ({"reload_dataloaders_every_n_epochs": -1}, "reload_dataloaders_every_n_epochs"),
    ({"strategy": "nope"}, "strategy"),
    ({"barebones": True, "num_sanity_val_steps": 2}, "num_sanity_val_steps"),
    ({"barebones": True, "enable_checkpointing": True}, "enable_checkpointing"),
]


@pytest.mark.parametrize(("flags", "named"), LIGHTNINGS)
def test_what_lightning_says_of_a_flag_becomes_one_line_that_names_it(flags: dict[str, Any], named: str) -> None:
    with pytest.raises((MisconfigurationException, ValueError, TypeError)) as raised:
        pl.Trainer(**flags)
    line = str(as_refusal(raised.value, SimpleNamespace(**flags)))
    assert line.startswith(f"trainer.{named}: ")
    assert "\n" not in line


@pytest.mark.parametrize(
    "strategy", ["deepspeed_stage_3", "fsdp", "fsdp_cpu_offload", "ddp_spawn", "ddp_notebook", "xla"]
)
def test_strategies_that_networks_here_do_not_know_are_refused_by_name(strategy: str) -> None:
    with pytest.raises(ConfigError, match=rf"trainer.strategy: '{strategy}' - not supported: write auto, ddp or fsdp2"):
        refuse_flags(settings(strategy=strategy))
    for known in ("auto", "ddp", "fsdp2", "ddp_find_unused_parameters_true", "single_device"):
        refuse_flags(settings(strategy=known))


def settings(**flags: Any) -> SimpleNamespace:
    defaults = {name: parameter.default for name, parameter in inspect.signature(pl.Trainer).parameters.items()}
    return SimpleNamespace(**{**defaults, **flags})


def one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


@pytest.mark.parametrize("name", REFUSED)
def test_a_flag_that_cannot_be_obeyed_is_refused_in_one_line(
    name: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, expected = REFUSED[name]
    Path("run").mkdir()
    Path("run", "config.yaml").write_text("# ibro_lightning: an earlier run\n")
    line = one_line([*FIT, *(f"--trainer.{flag}" for flag in flags)], capsys)
    for part in expected:
        assert part in line
    if name != "callbacks":  # that is known after an iteration
        assert [path.name for path in Path("run").iterdir()] == ["config.yaml"], "nothing was moved or written"


BIT_FOR_BIT = [
    "benchmark=true",
    "detect_anomaly=true",
    "deterministic=true",
    "enable_autolog_hparams=false",
    "enable_model_summary=true",
    "enable_progress_bar=false",
    "inference_mode=true",
    "limit_predict_batches=1",
    "limit_test_batches=1",
    "limit_train_batches=1",
    "log_every_n_steps=2",
    "logger=false",
    "min_epochs=1",
    "min_steps=1",
    "num_sanity_val_steps=0",
    "plugins=LightningEnvironment",
    "profiler=simple",
    "reload_dataloaders_every_n_epochs=1",
    "sync_batchnorm=true",
    "use_distributed_sampler=false",
    "val_check_interval=1",
]
"""What must not change the weights."""


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run, "model", "model.safetensors"))


def test_flags_that_are_not_about_the_update_leave_the_weights_as_they_are_bit_for_bit(workspace: Path) -> None:
    main([*FIT, "--trainer.default_root_dir=plain"])
    try:
        main([*FIT, "--trainer.default_root_dir=flags", *(f"--trainer.{flag}" for flag in BIT_FOR_BIT)])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
    plain, flags = weights("plain"), weights("flags")
    assert all(torch.equal(plain[name], flags[name]) for name in plain)
    assert json.loads(Path("flags", "summary.json").read_text())["curves"] == []


def test_a_rehearsal_leaves_no_trace(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    main([*FIT, "--trainer.max_epochs=1"])
    before = {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()}
    with caplog.at_level(logging.INFO):
        for command in ("validate", "predict"):
            main([command, "--config", "tiny.yaml", "--trainer.fast_dev_run=2"])
        main([*FIT, "--trainer.fast_dev_run=true"])
    assert "fast_dev_run: nothing is written to or removed from run" in caplog.text
    after = {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()}
    assert {path for path in after if "__pycache__" not in path.parts} == set(before) - {
        path for path in before if "__pycache__" in path.parts
    }
    assert all(after[path] == content for path, content in before.items())
    assert not Path("run.1").exists()


def test_a_rehearsal_in_a_new_folder_makes_none(workspace: Path) -> None:
    main([*FIT, "--trainer.fast_dev_run=true", "--ckpt_path=last"])
    assert not Path("run").exists()


def curve(name: str, run: str = "run") -> list[int]:
    events = EventAccumulator(run)
    events.Reload()
    return [event.step for event in events.Scalars(name)] if name in events.Tags()["scalars"] else []


def test_barebones_keeps_the_result_and_drops_what_costs_time(workspace: Path) -> None:
    main([*FIT, "--trainer.barebones=true", "--trainer.max_epochs=1"])
    assert Path("run", "model", "model.safetensors").exists()
    assert json.loads(Path("run", "summary.json").read_text())["iterations"] == 1
    for part in ("checkpoints", "rollouts", "evaluations/iteration_000000.json"):
        assert not Path("run", part).exists()
    assert not list(Path("run").glob("events*"))


def test_curves_have_a_point_every_so_many_steps(workspace: Path) -> None:
    main([*FIT, "--trainer.log_every_n_steps=2", "--trainer.max_epochs=4", "--trainer.limit_val_batches=0"])
    assert curve("rollout/reward") == [2, 4]


def test_an_evaluation_every_so_many_batches(workspace: Path) -> None:
    """Counted over epochs, in the middle of one, and after a time."""
    over = ["--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=3", "--trainer.max_epochs=4"]
    main([*FIT, *over, "--trainer.default_root_dir=over"])
    assert curve("val/starts/avg@4", "over") == [0, 3, 4]
    within = ["--data.rollouts_per_epoch=4", "--trainer.val_check_interval=0.5", "--trainer.max_epochs=1"]
    main([*FIT, *within, "--trainer.check_val_every_n_epoch=1", "--trainer.default_root_dir=within"])
    assert curve("val/starts/avg@4", "within") == [0, 2, 4]
    timed = ["--trainer.val_check_interval=00:00:00:00", "--trainer.check_val_every_n_epoch=1"]
    main([*FIT, *timed, "--trainer.default_root_dir=timed"])
    assert curve("val/starts/avg@4", "timed") == [0, 1, 2]


GOES_ON = {
    "an evaluation within the epoch": (
        ["data.rollouts_per_epoch=4", "trainer.val_check_interval=2", "trainer.check_val_every_n_epoch=1"],
        ["trainer.max_epochs=1"],
    ),
    "optimizer steps": (["trainer.max_steps=7"], ["trainer.max_epochs=null"]),
}


@pytest.mark.parametrize("name", GOES_ON)
def test_a_run_goes_on_as_if_it_had_not_been_killed_after_its_second_iteration(name: str, workspace: Path) -> None:
    flags = [f"--{flag}" for part in GOES_ON[name] for flag in part]
    main([*FIT, *flags, "--checkpoint.keep_last=null"])
    shutil.copytree("run", "whole")
    for path in Path("run", "checkpoints").iterdir():
        if path.name != "iteration_000002.ckpt":
            path.unlink()
    shutil.rmtree("run/model")
    main([*FIT, *flags, "--checkpoint.keep_last=null", "--ckpt_path=last"])
    for run in ("whole", "run"):  # the first is gone; those that follow count Lightning's empty epoch
        for name in ("iteration_000001.ckpt", "iteration_000003.ckpt", "iteration_000004.ckpt", "last.ckpt"):
            Path(run, "checkpoints", name).unlink(missing_ok=True)
    assert differences(Path("whole"), Path("run")) == []


@pytest.mark.parametrize("flag", ["max_epochs=0", "limit_train_batches=0"])
def test_a_run_without_training_names_no_model(flag: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*FIT, f"--trainer.{flag}", "--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0"])
    printed = capsys.readouterr().out
    assert "summary   run/summary.json" in printed
    assert "None" not in printed
    assert ("model     run/model" in printed) == Path("run", "model").exists()


def test_a_sanity_check_of_a_few_batches_is_not_the_evaluation_before_training(workspace: Path) -> None:
    look = ["--trainer.num_sanity_val_steps=2", "--data.eval_batch_prompts=2", "--trainer.max_epochs=1"]
    main([*FIT, *look])
    summary = json.loads(Path("run", "summary.json").read_text())
    assert summary["accuracy_before"] is None
    assert curve("val/starts/avg@4") == [1], "none before training"
    assert not Path("run", "evaluations", "iteration_000000.json").exists()


@pytest.mark.parametrize(
    ("command", "flag", "batches"),
    [("fit", "limit_val_batches", 2), ("test", "limit_test_batches", 3), ("predict", "limit_predict_batches", 1)],
)
def test_limits_count_batches(command: str, flag: str, batches: int, workspace: Path) -> None:
    few = ["--data.eval_batch_prompts=2", f"--trainer.{flag}={batches}"]
    main([command, "--config", "tiny.yaml", *few, *(["--trainer.max_epochs=1"] if command == "fit" else [])])
    folder = {"fit": "evaluations/iteration_000000", "test": "evaluations/test", "predict": "predictions"}[command]
    assert len(list(Path("run", folder, "starts").glob("batch_*.parquet"))) == batches


def test_training_stops_after_so_many_optimizer_steps_with_the_rollout_finished(workspace: Path) -> None:
    main([*FIT, "--trainer.max_steps=3", "--trainer.max_epochs=null", "--trainer.limit_val_batches=0"])
    summary = json.loads(Path("run", "summary.json").read_text())
    assert (summary["iterations"], summary["optimizer_steps"]) == (2, 4)


def test_early_stopping_and_its_least_number_of_epochs(workspace: Path) -> None:
    """A metric that cannot improve: patience runs out at once, ``min_epochs`` comes first."""
    Path("stop.yaml").write_text(
        "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: rollout/truncated, patience: 0, "
        "check_on_train_epoch_end: true, divergence_threshold: -1.0}}]}\n"
    )
    stop = [*FIT, "--config", "stop.yaml", "--trainer.max_epochs=6", "--trainer.limit_val_batches=0"]
    for least, done in ((1, 1), (3, 3)):
        main([*stop, f"--trainer.min_epochs={least}", f"--trainer.default_root_dir={least}"])
        assert json.loads(Path(str(least), "summary.json").read_text())["iterations"] == done


def test_a_bar_of_ones_own_takes_the_place_of_ours(workspace: Path) -> None:
    main([*FIT, "--trainer.callbacks=TQDMProgressBar", "--trainer.max_epochs=1", "--trainer.limit_val_batches=0"])
    assert Path("run", "summary.json").exists()


def test_anomalies_are_looked_for_while_the_run_lasts(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    update = Updater.update

    def watched(self: Updater, *arguments: Any) -> Any:
        seen.append(torch.is_anomaly_enabled())
        return update(self, *arguments)

    monkeypatch.setattr(Updater, "update", watched)
    main([*FIT, "--trainer.detect_anomaly=true", "--trainer.max_epochs=1", "--trainer.limit_val_batches=0"])
    assert seen == [True, True]
    assert not torch.is_anomaly_enabled()


# From plain Python.


def trainer(**flags: Any) -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, **flags)


@pytest.mark.parametrize(
    ("flags", "setting"),
    [
        ({"overfit_batches": 1}, "overfit_batches"),
        ({"precision": "64-true"}, "precision"),
        ({"gradient_clip_algorithm": "value"}, "gradient_clip_algorithm"),
        ({"gradient_clip_val": 1.0}, "gradient_clip_val"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches"),
        ({"model_registry": "mine"}, "model_registry"),
        ({"default_root_dir": "s3://bucket/run"}, "default_root_dir"),
        ({"strategy": DDPStrategy(start_method="fork")}, "strategy"),
        ({"callbacks": [BatchSizeFinder()]}, "callbacks"),
        ({"callbacks": [LearningRateFinder()]}, "callbacks"),
        ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, "callbacks"),
    ],
)
def test_from_python_the_same_flags_are_refused(flags: dict[str, Any], setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"^trainer\.{setting}: ") as refused:
        refuse_trainer(trainer(**flags))
    assert "\n" not in str(refused.value)


def test_a_module_refuses_them_in_its_setup(workspace: Path, tiny_policy: Path) -> None:
    from helpers.loggers import parts

    module, data = parts(tiny_policy)
    with pytest.raises(ConfigError, match=r"^trainer\.overfit_batches: 1"):
        trainer(overfit_batches=1, max_epochs=1, default_root_dir="run").fit(module, datamodule=data)


def test_counts_of_batches_are_compared_with_an_epochs() -> None:
    refuse_batches(trainer(val_check_interval=4, limit_train_batches=0.25), 4)
    refuse_batches(trainer(val_check_interval=9, check_val_every_n_epoch=None), 4)
    refuse_batches(trainer(limit_train_batches=0.0), 4)
    with pytest.raises(ConfigError, match="val_check_interval: 5"):
        refuse_batches(trainer(val_check_interval=5), 4)
    with pytest.raises(ConfigError, match=r"limit_train_batches: 0\.2 .* write 0\.25 or more"):
        refuse_batches(trainer(limit_train_batches=0.2), 4)


ELSEWHERE = {"enable_checkpointing", "max_epochs", "num_nodes"}
"""Flags that test_end_to_end.py and test_launch_scripts.py try."""


def test_no_flag_is_forgotten() -> None:
    """A flag that a new version of Lightning brings must be looked at."""
    tried = set(re.findall(r"\w+", Path(__file__).read_text()))
    assert set(FLAGS) - tried - ELSEWHERE == set()


@pytest.mark.parametrize(("limit", "times"), [("0", 1), ("1.0", 2)])
def test_a_run_without_validation_sets_no_engine_up_for_it_at_its_end(
    limit: str, times: int, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time is for the evaluation after the last iteration, which here is no multiple of two."""
    built, original = list[ModelSpec](), HFEngine.setup

    def setup(engine: HFEngine, spec: ModelSpec) -> None:
        if engine._model is None:
            built.append(spec)
        original(engine, spec)

    monkeypatch.setattr(HFEngine, "setup", setup)
    main([*FIT, "--trainer.max_epochs", "1", "--trainer.limit_val_batches", limit])
    assert len(built) == times
