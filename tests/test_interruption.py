"""A run that is asked to stop, in whatever phase: it stops there, and goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.processes import free_port, logs, run_ranks
from helpers.quick import slow_unless
from ibro_lightning.callbacks.interruptions import Interruptions, requeue
from ibro_lightning.cli.main import main
from ibro_lightning.datamodules.collector import Collector
from ibro_lightning.engines import HFEngine
from ibro_lightning.guards import interruption
from ibro_lightning.guards.interruption import Interrupted
from ibro_lightning.modules import DAPOModule, PolicyModule
from ibro_lightning.update.updater import Updater

FIT = ["fit", "--config", "tiny.yaml", "--trainer.max_epochs=4", "--checkpoint.every_n_iterations=0"]
FIT += ["--data.eval_batch_prompts=4"]  # evaluations of three batches
HANDLERS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def no_wish() -> Iterator[None]:
    interruption.clear()
    before = [signal.getsignal(number) for number in HANDLERS]
    yield
    interruption.clear()
    assert [signal.getsignal(number) for number in HANDLERS] == before, "a run gives the handlers back"


class TestTheWish:
    def test_is_noted_where_work_cannot_be_given_up(self):
        interruption.request("SIGTERM", 143)
        assert interruption.requested() == "SIGTERM"

    def test_ends_work_that_can_be_given_up_at_once_and_only_once(self):
        def asked_twice() -> None:
            with interruption.abandonable():
                try:
                    interruption.request("SIGINT", 130)
                finally:
                    interruption.request("SIGTERM", 143)  # what is done about the first one is not broken into

        with pytest.raises(Interrupted, match="SIGINT") as caught:
            asked_twice()
        assert caught.value.exit_code == 130

    def test_ends_work_that_can_be_given_up_before_it_begins(self):
        interruption.request("SIGTERM")
        begun = False
        with pytest.raises(Interrupted), interruption.abandonable():
            begun = True
        assert not begun

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_is_not_lost_where_python_swallows_exceptions(self):
        class Swallows:
            def __del__(self) -> None:
                interruption.request("SIGTERM")

        with pytest.raises(Interrupted), interruption.abandonable():
            Swallows()

    def test_is_forgotten_when_it_was_granted(self):
        interruption.request("SIGTERM")
        interruption.clear()
        with interruption.abandonable():
            assert interruption.requested() is None


# A signal in each phase of a run.

# What is struck, and when: how many iterations are complete, and is an evaluation running?
PHASES: dict[str, tuple[Any, str, Callable[[pl.Trainer], bool]]] = {
    "generate": (HFEngine, "generate", lambda trainer: trainer.training and done(trainer) == 2),
    "reward": (Collector, "_completions", lambda trainer: trainer.training and done(trainer) == 2),
    "prepare": (DAPOModule, "prepare", lambda trainer: done(trainer) == 2),
    "update": (Updater, "update", lambda trainer: done(trainer) == 2),
    "generate the first": (HFEngine, "generate", lambda trainer: trainer.training and done(trainer) == 0),
    "evaluate": (HFEngine, "generate", lambda trainer: trainer.validating and done(trainer) == 2),
    "evaluate the second batch": (
        HFEngine,
        "generate",
        lambda trainer: trainer.validating and done(trainer) == 2 and evaluated(trainer) == 1,
    ),
    "evaluate before training": (HFEngine, "generate", lambda trainer: trainer.sanity_checking),
    "evaluate at the end": (HFEngine, "generate", lambda trainer: trainer.validating and done(trainer) == 4),
    "save": (pl.Trainer, "save_checkpoint", lambda trainer: done(trainer) == 2),
    "export": (PolicyModule, "export", lambda trainer: True),
}
SAVED_AT = {"prepare": 3, "update": 3, "generate the first": None, "evaluate before training": None}
SAVED_AT |= {"evaluate at the end": 4, "export": 4}


def done(trainer: pl.Trainer) -> int:
    return trainer.fit_loop.epoch_loop.batch_progress.total.completed


def evaluated(trainer: pl.Trainer) -> int:
    """How many batches of the evaluation that is running are complete."""
    return trainer.fit_loop.epoch_loop.val_loop.batch_progress.current.completed


def strike(patch: pytest.MonkeyPatch, phase: str, number: int = signal.SIGTERM) -> None:
    """Send this process a signal in the phase, once, just before the work of it begins."""
    owner, name, is_time = PHASES[phase]
    original, setup, trainers = getattr(owner, name), Interruptions.setup, list[pl.Trainer]()

    def remember(self: Interruptions, trainer: pl.Trainer, *arguments: Any, **settings: Any) -> None:
        trainers.append(trainer)
        setup(self, trainer, *arguments, **settings)

    def struck(*arguments: Any, **settings: Any) -> Any:
        if trainers and is_time(trainers[-1]):
            trainers.clear()
            os.kill(os.getpid(), number)
        return original(*arguments, **settings)

    patch.setattr(Interruptions, "setup", remember)
    patch.setattr(owner, name, struck)


def run(*settings: str) -> int:
    """The command's exit code."""
    try:
        main([*FIT, *settings])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, list[tuple[int, float]]]]:
    """The trained weights, and every point of every curve that does not measure time, in the order of the files."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.*"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if not tag.startswith(("time", "tokens_per_second")):
                curves.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return load_file(folder / "model" / "model.safetensors"), curves


def assert_same(got: Any, expected: Any) -> None:
    assert got[0].keys() == expected[0].keys()
    for name, tensor in expected[0].items():
        assert torch.equal(got[0][name], tensor), name
    assert got[1] == expected[1]


UNINTERRUPTED: dict[str, Any] = {}


@pytest.fixture
def uninterrupted(workspace: Path) -> Any:
    """What the run without a signal ends with, computed once."""
    if not UNINTERRUPTED:
        assert run("--trainer.default_root_dir=reference") == 0
        UNINTERRUPTED["outcome"] = outcome(workspace / "reference")
    return UNINTERRUPTED["outcome"]


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("iteration_")) for path in folder.glob("checkpoints/iteration_*.ckpt"))


QUICK_PHASES = ("generate", "update", "evaluate the second batch", "evaluate at the end", "save", "export")


@pytest.mark.parametrize("phase", slow_unless(lambda phase: phase in QUICK_PHASES, PHASES))
def test_a_run_stops_in_each_phase_and_goes_on_bit_for_bit(
    phase: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    often = ["--checkpoint.every_n_iterations=2"] if phase == "save" else []
    with monkeypatch.context() as patch:
        strike(patch, phase)
        code = run(*often)
    saved = SAVED_AT.get(phase, 2)
    assert code == (0 if phase == "export" else 143), "what is complete is complete"
    assert checkpoints(workspace / "run") == ([] if saved is None else [saved])
    assert not list((workspace / "run").rglob("*.partial"))
    said = capfd.readouterr().err
    assert "SIGTERM: the run will stop" in said
    if phase != "export":
        rest = "nothing had to be saved" if saved is None else f"after {saved} iterations: resume with --ckpt_path last"
        assert rest in said
        interruption.clear()
        assert run(*often, *([] if saved is None else ["--ckpt_path=last"])) == 0
    assert_same(outcome(workspace / "run"), uninterrupted)


def test_a_run_may_be_stopped_again_and_again(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Any
) -> None:
    resume: list[str] = []
    for phase in ("update", "evaluate at the end", "evaluate at the end"):
        with monkeypatch.context() as patch:
            strike(patch, phase, signal.SIGINT)
            assert run(*resume) == 130
        interruption.clear()
        resume = ["--ckpt_path=last"]
    assert checkpoints(workspace / "run") == [3, 4]
    assert run(*resume) == 0
    assert_same(outcome(workspace / "run"), uninterrupted)


@pytest.mark.parametrize("best", slow_unless("rollout/reward".__eq__, ["null", "rollout/reward"]))
def test_a_resumed_run_that_is_stopped_at_once_goes_on_from_where_it_was(
    best: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Any
) -> None:
    resume = [f"--checkpoint.best={best}"]
    for _ in range(3):
        with monkeypatch.context() as patch:
            strike(patch, "generate")
            assert run(*resume) == 143
        interruption.clear()
        assert checkpoints(workspace / "run") == [2]
        resume = [f"--checkpoint.best={best}", "--ckpt_path=last"]
    assert run(*resume) == 0
    assert_same(outcome(workspace / "run"), uninterrupted)


def test_several_rollouts_per_epoch(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped within an epoch, where Lightning has begun it and not ended it."""
    epochs = ["--data.rollouts_per_epoch=2", "--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1"]
    assert run(*epochs, "--trainer.default_root_dir=reference") == 0
    for phase, saved in (("generate", 2), ("update", 3)):
        with monkeypatch.context() as patch:
            strike(patch, phase)
            assert run(*epochs, f"--trainer.default_root_dir={phase}") == 143
        interruption.clear()
        assert checkpoints(workspace / phase) == [saved]
        assert run(*epochs, f"--trainer.default_root_dir={phase}", "--ckpt_path=last") == 0
        assert_same(outcome(workspace / phase), outcome(workspace / "reference"))


# Several ranks: the signal reaches one of them.


def fit_on_a_rank(struck_rank: int, phase: str, settings: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if int(os.environ["RANK"]) == struck_rank:
            strike(patch, phase)
        raise SystemExit(run(*settings))


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_all_ranks_stop_together_though_one_is_asked(strategy: str, workspace: Path) -> None:
    several = ["--trainer.devices=2", f"--trainer.strategy={strategy}"]

    def fit(struck_rank: int, phase: str, *settings: str) -> list[int]:
        codes = run_ranks(2, fit_on_a_rank, struck_rank, phase, [*several, *settings], folder=workspace)
        assert -9 not in codes, logs(workspace)
        return codes

    assert fit(-1, "", "--trainer.default_root_dir=reference") == [0, 0], logs(workspace)
    expected = outcome(workspace / "reference")
    resume: list[str] = []
    for struck_rank, phase, saved in ((1, "generate", 2), (0, "update", 3), (1, "evaluate at the end", 4)):
        assert fit(struck_rank, phase, *resume) == [143, 143], logs(workspace)
        assert checkpoints(workspace / "run")[-1] == saved
        resume = ["--ckpt_path=last"]
    assert fit(-1, "", *resume) == [0, 0], logs(workspace)
    assert_same(outcome(workspace / "run"), expected)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_all_processes_that_lightning_started(workspace: Path) -> None:
    settings = [
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.max_epochs=100000",
        "--progress.line_every=1",
    ]
    environment = os.environ | {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(workspace), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-m", "ibro_lightning", *FIT, *settings, "--trainer.check_val_every_n_epoch=100000"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert any("3/100000" in line for line in process.stdout)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 130, said
    assert "stopped by SIGINT" in said
    assert "Traceback" not in said
    assert len(checkpoints(workspace / "run")) == 1


# The handlers.


def stub(environment: Any = None) -> Any:
    return SimpleNamespace(
        callbacks=[],
        checkpoint_callbacks=[],
        _signal_connector=SimpleNamespace(),
        _accelerator_connector=SimpleNamespace(cluster_environment=environment),
        strategy=SimpleNamespace(launcher=None),
    )


@pytest.fixture
def handling() -> Iterator[Interruptions]:
    guard = Interruptions()
    guard.setup(stub(SLURMEnvironment(auto_requeue=True)), pl.LightningModule(), "fit")
    yield guard
    guard.teardown(stub(), pl.LightningModule(), "fit")


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not(handling: Interruptions) -> None:
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert interruption.requested() == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_slurms_signal_stops_the_run_and_requeues_the_job(
    handling: Interruptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    signal.raise_signal(signal.SIGUSR1)
    assert interruption.requested() == "SIGUSR1"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$@" >> asked\n')
    scontrol.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    trainer: Any = SimpleNamespace(
        callbacks=[],
        state=SimpleNamespace(fn="validate"),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=-1)),
    )
    handling.on_exception(trainer, pl.LightningModule(), Interrupted("SIGUSR1", 138))
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeue()
    assert (tmp_path / "asked").read_text() == "requeue 17\nrequeue 16_3\n"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    requeue()
    assert "the job is not requeued" in capfd.readouterr().err


def test_another_error_gives_the_handlers_back(handling: Interruptions) -> None:
    assert signal.getsignal(signal.SIGTERM) == handling._handle
    handling.on_exception(stub(), pl.LightningModule(), ValueError("oops"))
    assert signal.getsignal(signal.SIGTERM) != handling._handle


def test_a_request_does_not_break_into_the_handling_of_the_first_within_other_work() -> None:
    """Neither within the work that was given up, nor within that around it."""
    handled = False

    def work() -> None:
        nonlocal handled
        with interruption.abandonable():
            try:
                with interruption.abandonable():
                    interruption.request("SIGINT", 130)
            finally:
                interruption.request("SIGTERM", 143)
                handled = True

    with pytest.raises(Interrupted, match="SIGINT"):
        work()
    assert handled
