"""The run's folder is ``default_root_dir`` with every logger, and each goes on as far as its backend lets it."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.loggers import LikeMLFlow, parts
from helpers.quick import slow_unless
from ibro_lightning.callbacks import EvaluationReport, ExportModel, IterationCheckpoint, RolloutLog, RunSummary
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.runs.curve_files import cut_events, cut_rows
from ibro_lightning.runs.folder import refuse_loggers
from ibro_lightning.runs.loggers import Table, log_table, place_of, resume_logger, state_of
from ibro_lightning.runs.run_files import MARK

PARTS = {"checkpoints", "config.yaml", "evaluations", "model", "rollouts", "summary.json"}
FIT = ["fit", "--config", "tiny.yaml", "--trainer.limit_val_batches=0"]


def steps_of_events(folder: Path) -> list[int]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars("rollout/reward")]


def steps_of_rows(path: Path) -> list[int]:
    with path.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["rollout/reward"]]


def steps_of_lines(path: Path) -> list[int]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record["step"] for record in records if "rollout/reward" in record]


SEVERAL = """
trainer:
  logger:
  - {class_path: CSVLogger, init_args: {save_dir: logs}}
  - {class_path: TensorBoardLogger, init_args: {save_dir: logs, name: tb}}
  - {class_path: helpers.loggers.LikeWandb}
"""
# Settings; where the curves are; how to read their steps; is a point of a lost iteration there twice?
LOGGERS: dict[str, tuple[list[str], str | None, Callable[[Path], list[int]], bool]] = {
    "true": (["logger=true"], "run", steps_of_events, False),
    "TensorBoard elsewhere": (
        ["logger=TensorBoardLogger", "logger.save_dir=tb"],
        "tb/lightning_logs/version_0",
        steps_of_events,
        False,
    ),
    "CSV": (
        ["logger=CSVLogger", "logger.save_dir=logs"],
        "logs/lightning_logs/version_0/metrics.csv",
        steps_of_rows,
        False,
    ),
    "W&B": (["logger=helpers.loggers.LikeWandb"], "wandb/run0.jsonl", steps_of_lines, True),
    "MLflow": (["logger=helpers.loggers.LikeMLFlow"], "mlruns/run0.jsonl", steps_of_lines, True),
    "one's own": (["logger=helpers.loggers.OwnLogger"], "own/metrics.jsonl", steps_of_lines, True),
    "none": (["logger=false"], None, steps_of_lines, False),
}


def with_logger(settings: list[str]) -> list[str]:
    return [*FIT, *(f"--trainer.{setting}" for setting in settings)]


def lose_the_last_iteration(run: Path) -> None:
    """As if the run had been killed before its last checkpoint was written."""
    (run / "checkpoints" / "end.json").unlink()
    newest = max((run / "checkpoints").glob("iteration_*.ckpt"))
    newest.unlink()


@pytest.mark.parametrize("name", slow_unless(lambda name: name in ("true", "CSV", "one's own"), LOGGERS))
def test_the_run_is_in_its_folder_and_goes_on_with_its_curves(
    name: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, curves, steps, twice = LOGGERS[name]
    main([*with_logger(settings), "--trainer.max_epochs=3"])
    assert PARTS - {"evaluations"} <= {path.name for path in Path("run").iterdir()}
    places = json.loads(Path("run", "summary.json").read_text())["curves"]
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("curves")]
    assert shown == [f"curves    {place}" for place in places]
    assert len(places) == (curves is not None)
    if curves is not None:
        assert steps(Path(curves)) == [1, 2, 3]

    lose_the_last_iteration(Path("run"))
    main([*with_logger(settings), "--trainer.max_epochs=4", "--ckpt_path=last"])
    assert json.loads(Path("run", "summary.json").read_text())["iterations"] == 4
    assert not Path("run.1").exists()
    assert len(list(Path("run", "rollouts").iterdir())) == 4
    if curves is not None:
        assert steps(Path(curves)) == ([1, 2, 3, 3, 4] if twice else [1, 2, 3, 4])


def test_several_loggers_have_the_same_curves_evaluations_included(workspace: Path) -> None:
    Path("several.yaml").write_text(SEVERAL)
    main(["fit", "--config", "tiny.yaml", "--config", "several.yaml"])
    assert {path.name for path in Path("run").iterdir()} >= PARTS
    with Path("logs/lightning_logs/version_0/metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(row["step"]) for row in table if row["val/starts/avg@4"]] == [0, 2]
    events = EventAccumulator("logs/tb/version_0", size_guidance={"tensors": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("val/starts/avg@4")] == [0, 2]
    assert "samples/text_summary" in events.Tags()["tensors"]
    records = [json.loads(line) for line in Path("wandb/run0.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "val/starts/avg@4" in record] == [0, 2]
    tables = [record["samples"] for record in records if "samples" in record]
    assert [header[:5] for header, *_ in tables] == [["prompt", "response", "gold", "tokens", "reward"]] * 2
    places = json.loads(Path("run", "summary.json").read_text())["curves"]
    assert places == [
        "logs/lightning_logs/version_0/metrics.csv",
        "tensorboard --logdir logs/tb/version_0",
        "wandb sync wandb/offline-run-run0",
    ]


def test_a_second_run_moves_the_first_one_aside_and_has_curves_of_its_own(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = [*with_logger(["logger=CSVLogger", "logger.save_dir=logs"]), "--trainer.max_epochs=1"]
    main(settings)
    first = Path("run", "model", "model.safetensors").read_bytes()
    with caplog.at_level(logging.INFO):
        main([*settings, "--seed_everything=4"])
    assert "an earlier run was in run: moved to run.1" in caplog.text
    assert Path("run.1", "model", "model.safetensors").read_bytes() == first
    assert len(list(Path("run", "checkpoints").glob("iteration_*.ckpt"))) == 1
    for version in (0, 1):
        assert steps_of_rows(Path(f"logs/lightning_logs/version_{version}/metrics.csv")) == [1]


def test_looking_at_a_run_leaves_its_curves_alone(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Opened again, a CSV logger of a fixed version would remove what it finds."""
    fixed = ["logger=CSVLogger", "logger.save_dir=logs", "logger.version=mine"]
    main([*with_logger(fixed), "--trainer.max_epochs=1"])
    path = Path("logs/lightning_logs/mine/metrics.csv")
    before = path.read_bytes()
    with caplog.at_level(logging.INFO):
        main(["validate", "--config", "tiny.yaml", *with_logger(fixed)[4:]])
    assert path.read_bytes() == before
    assert "CSVLogger is left out of validate" in caplog.text


def test_samples_that_no_logger_shows_are_said_once_to_be_in_the_rollouts(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        main([*with_logger(["logger=helpers.loggers.OwnLogger"]), "--trainer.max_epochs=2"])
    assert caplog.text.count("OwnLogger does not log tables: samples are only in run/rollouts") == 1


def test_last_is_not_begun_anew_where_an_older_version_put_the_checkpoints(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = with_logger(["logger=CSVLogger", "logger.save_dir=logs", "logger.version=mine"])
    main([*settings, "--trainer.max_epochs=1"])
    Path("logs/lightning_logs/mine").mkdir(parents=True, exist_ok=True)
    shutil.move("run/checkpoints", "logs/lightning_logs/mine/checkpoints")
    shutil.rmtree("run")
    with pytest.raises(SystemExit) as ended:
        main([*settings, "--ckpt_path=last"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "error: ckpt_path: 'last' - there is no checkpoint in run, but there is logs/lightning_logs/mine" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["logger=CSVLogger"], "error: trainer.logger.save_dir: missing - write text, or a path"),
        (["logger=helpers.loggers.NoSuchLogger"], "NoSuchLogger"),
        (
            ["logger=CSVLogger", "logger.save_dir=run", "logger.name=model", "logger.version=a"],
            "trainer.logger: 'CSVLogger' - its curves would be in run/model/a, and the run keeps model there",
        ),
        (
            ["logger=helpers.loggers.NotInstalled"],
            "trainer.logger: 'helpers.loggers.NotInstalled' - Requirement 'logs>=1.0'",
        ),
    ],
)
def test_a_logger_that_cannot_be_made_is_refused_in_one_line(
    settings: list[str], said: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(with_logger(settings))
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert said in line


@pytest.mark.parametrize("part", ["rollouts", "checkpoints", "model", "summary.json"])
def test_a_loggers_files_are_not_among_the_runs_own(part: str, tmp_path: Path) -> None:
    """Points of a checkpoint or an exported model are replaced and removed as whole folders."""
    root, quiet = tmp_path / "run", {"accelerator": "cpu", "enable_progress_bar": False}

    def check(*loggers: Logger) -> None:
        refuse_loggers(pl.Trainer(default_root_dir=root, logger=list(loggers), **quiet))

    for kind in (CSVLogger, TensorBoardLogger):
        for logger in (kind(root, name=part, version=""), kind(root / part), kind(tmp_path, "run", f"{part}/a")):
            with pytest.raises(ConfigError, match=rf"^trainer\.logger: '{kind.__name__}' - .*keeps {part} there") as e:
                check(logger)
            assert "\n" not in str(e.value)
        check(kind(root), kind(root, name=f"{part}s"), kind(root, name=None, version=""), kind(tmp_path / part))
    with pytest.raises(ConfigError, match="LikeMLFlow"):
        check(LikeMLFlow(str(root / part)))
    assert not root.exists()


# The real ones, where they are installed.


def test_the_real_wandb_goes_on_with_its_run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = with_logger(["logger=WandbLogger", "logger.offline=true"])
    for more in (["--trainer.max_epochs=1"], ["--trainer.max_epochs=2", "--ckpt_path=last"]):
        main([*settings, *more])
        wandb.finish()
    ids = {path.name.rsplit("-", 1)[1] for path in Path("wandb").glob("offline-run-*")}
    assert len(ids) == 1
    assert list(Path("wandb").glob("offline-run-*/files/media/table/*.json"))


def test_the_real_mlflow_goes_on_with_its_run(workspace: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = "sqlite:///mlflow.db"
    settings = with_logger(["logger=MLFlowLogger", f"logger.tracking_uri={uri}"])
    for more in (["--trainer.max_epochs=1"], ["--trainer.max_epochs=2", "--ckpt_path=last"]):
        main([*settings, *more])
    client = mlflow.MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'lightning_logs'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert [point.step for point in client.get_metric_history(run.info.run_id, "rollout/reward")] == [1, 2]


# Files, cut back.


def test_rows_and_events_are_cut_to_what_the_checkpoint_knows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("reward,step\n0.1,1\n0.2,2\n0.3,3\n0.4")  # the last row was being written
    cut_rows(path, 2)
    assert path.read_text().split() == ["reward,step", "0.1,1", "0.2,2"]
    path.rename(tmp_path / "metrics.csv.kept")  # killed while the logger opened
    cut_rows(path, 1)
    assert path.read_text().split() == ["reward,step", "0.1,1"]
    known, later = tmp_path / "events.out.tfevents.1", tmp_path / "events.out.tfevents.2"
    for alone in (False, True):
        known.write_bytes(b"123456")
        later.write_bytes(b"123456")
        cut_events(tmp_path, {known.name: 4}, alone=alone)
        assert known.read_bytes() == b"1234"
        assert later.exists() != alone
    later.write_bytes(b"others'")
    cut_events(tmp_path, {}, alone=True)
    assert later.exists(), "a checkpoint without curves says nothing about those that are there"


def test_ids_of_the_users_own_are_left_alone(tmp_path: Path) -> None:
    from helpers.loggers import LikeMLFlow, LikeWandb

    states = {"run": "old", "version": 3, "folder": "x"}
    for logger, attribute, own in (
        (LikeWandb(id="mine"), "version", "mine"),
        (LikeMLFlow(run_id="mine"), "run_id", "mine"),
        (TensorBoardLogger(tmp_path, version="mine"), "version", "mine"),
        (CSVLogger(tmp_path, version=7), "version", 7),
    ):
        resume_logger(logger, states, tmp_path)
        assert getattr(logger, attribute) == own
    for logger, attribute, then in (
        (LikeWandb(), "version", "old"),
        (LikeMLFlow(), "run_id", "old"),
        (TensorBoardLogger(tmp_path), "version", 3),
        (CSVLogger(tmp_path), "version", 3),
    ):
        resume_logger(logger, states, tmp_path)
        assert getattr(logger, attribute) == then


def test_comet_whose_experiment_is_begun_already_is_told_how_to_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from lightning.pytorch.loggers import CometLogger

    comet: Any = CometLogger.__new__(CometLogger)
    said: list[Any] = []
    comet._experiment = SimpleNamespace(
        get_key=lambda: "new", url="https://comet/new", log_text=lambda *a, **k: said.append((a, k))
    )
    with caplog.at_level(logging.INFO):
        resume_logger(comet, {"run": "old"}, tmp_path)
    assert "write its experiment_key: old" in caplog.text
    assert place_of(comet) == "https://comet/new"
    assert state_of(comet, tmp_path) == {"run": "new"}
    assert log_table([comet], "samples", lambda: Table([], [], "| a |"), 3) == []
    assert said == [(("| a |",), {"step": 3, "metadata": {"name": "samples"}})]


# From plain Python.


def fit(policy: Path, *, batch: int = 64, ckpt_path: str | None = None, **flags: Any) -> dict[str, Any]:
    """A run from Python in ``run``; its summary."""
    module, data = parts(policy, batch)
    callbacks = [RolloutLog(), EvaluationReport(), ExportModel(), IterationCheckpoint(1), RunSummary()]
    settings = {"accelerator": "cpu", "default_root_dir": "run", "logger": False, "callbacks": callbacks}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(**{**settings, **quiet, **flags}).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return json.loads(Path("run", "summary.json").read_text())


def test_from_python_too_the_folder_is_default_root_dir(workspace: Path, tiny_policy: Path) -> None:
    summary = fit(tiny_policy, max_epochs=1, logger=[CSVLogger("logs", version=0), TensorBoardLogger("tb")])
    assert PARTS - {"config.yaml"} | {MARK} == {path.name for path in Path("run").iterdir()}
    assert summary["log_dir"] == "run"
    assert not list(Path("logs").rglob("checkpoints"))
    assert not list(Path("tb").rglob("rollouts"))


def test_from_python_a_second_run_does_not_touch_the_first(workspace: Path, tiny_policy: Path) -> None:
    fit(tiny_policy, max_epochs=2, limit_val_batches=0)
    first = Path("run", "model", "model.safetensors").read_bytes()
    fit(tiny_policy, max_epochs=1, limit_val_batches=0)
    assert sorted(path.name for path in Path("run", "checkpoints").glob("iteration_*")) == ["iteration_000001.ckpt"]
    assert [path.name for path in Path("run", "rollouts").iterdir()] == ["iteration_000001.parquet"]
    assert len(list(Path("run", "earlier.1", "checkpoints").glob("iteration_*"))) == 2
    assert Path("run", "earlier.1", "model", "model.safetensors").read_bytes() == first


def test_a_look_at_two_batches_is_not_called_the_accuracy_before_training(
    workspace: Path, tiny_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = fit(tiny_policy, max_epochs=1, batch=2)
    assert summary["accuracy_before"] is None
    assert summary["accuracy_after"] is not None
    assert not Path("run", "evaluations", "iteration_000000").exists()
    said = capsys.readouterr().out
    assert "before training" not in said
    assert "evaluation: a check, which is not recorded" in said


def test_a_resume_from_python_keeps_the_evaluation_before_training(workspace: Path, tiny_policy: Path) -> None:
    before = fit(tiny_policy, max_epochs=1, batch=2, num_sanity_val_steps=-1)["accuracy_before"]
    assert before is not None
    path = Path("run", "evaluations", "iteration_000000.json")
    evaluation = path.read_text()
    assert len(json.loads(evaluation)["starts"]) > 0
    again = fit(
        tiny_policy, max_epochs=2, batch=2, num_sanity_val_steps=-1, ckpt_path="run/checkpoints/iteration_000001.ckpt"
    )
    assert again["accuracy_before"] == before
    assert again["iterations"] == 2
    assert path.read_text() == evaluation


def test_from_python_going_on_from_an_older_checkpoint_beside_newer_ones_is_refused(
    workspace: Path, tiny_policy: Path
) -> None:
    fit(tiny_policy, max_epochs=2, limit_val_batches=0)
    with pytest.raises(ConfigError, match=r"ckpt_path: .*iteration_000002.ckpt is newer"):
        fit(tiny_policy, max_epochs=3, limit_val_batches=0, ckpt_path="run/checkpoints/iteration_000001.ckpt")
    assert len(list(Path("run", "checkpoints").glob("iteration_*"))) == 2


def test_a_run_does_not_write_over_the_policy_that_it_starts_from(workspace: Path, tiny_policy: Path) -> None:
    shutil.copytree(tiny_policy, "run/model")
    with pytest.raises(ConfigError, match="its model/ is the policy that this run starts from"):
        fit(Path("run/model"), max_epochs=1)
