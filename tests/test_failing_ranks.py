"""One rank of a training run fails: all of them end, soon, and the error is that of the rank that failed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.processes import free_port, logs, run_ranks
from ibro_lightning.types import Completion

FIT = ["fit", "--config", "tiny.yaml", "--rank_watch.grace_s=2", "--trainer.devices=2", "--trainer.max_epochs=3"]
BOUND_S = 600.0
"""Far below every timeout of torch (30 minutes): some seconds on an idle machine, most of them to start; with six
processes to a core a minute and more."""


def oops(*arguments: object, **settings: object) -> None:
    raise KeyError("oops")


def oops_if_answered(reward: object, prompt: object, completion: Completion) -> bool:
    if completion.token_ids:  # an empty response is judged while the run is set up
        raise KeyError("oops")
    return False


def killed(*arguments: object, **settings: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def waits_for_ever(*arguments: object, **settings: object) -> None:
    time.sleep(1000)


def fit_and_fail(failing: int, where: str, happens: Callable[..., None], settings: list[str]) -> None:
    from lightning.pytorch.strategies import Strategy
    from user_code import SaysEquals

    from ibro_lightning.cli.main import main
    from ibro_lightning.modules import DAPOModule
    from ibro_lightning.rewards import VerifiableReward
    from ibro_lightning.update.updater import Updater

    places = {
        "prepare": (DAPOModule, "prepare"),
        "update": (Updater, "update"),
        "step": (Updater, "clip_and_step"),
        "reward": (SaysEquals, "verify"),
    }
    assert issubclass(SaysEquals, VerifiableReward)
    with pytest.MonkeyPatch.context() as patch:
        if int(os.environ["RANK"]) == failing:
            patch.setattr(*places[where], happens)
            # With NCCL, whoever failed waits here for what the accelerator still has to do, for ever.
            patch.setattr(Strategy, "teardown", waits_for_ever)
        main([*FIT, *settings])


@pytest.mark.parametrize(
    ("strategy", "where", "failing"),
    [
        pytest.param("ddp", "prepare", 1, marks=pytest.mark.slow),
        pytest.param("ddp", "step", 0, marks=pytest.mark.slow),
        ("fsdp2", "update", 1),
        pytest.param("fsdp2", "prepare", 0, marks=pytest.mark.slow),
    ],
)
def test_an_exception_on_one_rank_ends_all(strategy: str, where: str, failing: int, workspace: Path) -> None:
    settings = [f"--trainer.strategy={strategy}"]
    codes = run_ranks(2, fit_and_fail, failing, where, oops, settings, folder=workspace)
    assert codes == [1, 1], logs(workspace)
    own, other = ((workspace / f"rank_{rank}.log").read_text() for rank in (failing, 1 - failing))
    assert "KeyError: 'oops'" in own
    assert f"rank {failing} failed: KeyError: 'oops'" in other


def test_a_reward_that_raises_on_one_rank_is_an_error_on_all(workspace: Path) -> None:
    """Here the other learns of it as all ranks agree on the responses, and leaves by itself."""
    settings = ["--trainer.strategy=ddp", "--trainer.num_sanity_val_steps=0"]
    codes = run_ranks(2, fit_and_fail, 1, "reward", oops_if_answered, settings, folder=workspace)
    assert not {0, -9} & set(codes), logs(workspace)
    assert "SaysEquals raised KeyError: 'oops'" in (workspace / "rank_1.log").read_text()
    assert "rank 1 failed: RewardError: SaysEquals" in (workspace / "rank_0.log").read_text()


def test_an_exception_on_one_rank_before_training_ends_all(workspace: Path) -> None:
    """Where Lightning has called no callback yet: data may be missing on one machine alone."""
    settings = ["--trainer.strategy=ddp"]
    codes = run_ranks(2, fit_and_fail, 1, "reward", oops, settings, folder=workspace)
    assert not {0, -9} & set(codes), logs(workspace)
    assert "rank 1 failed: RewardError: SaysEquals" in (workspace / "rank_0.log").read_text()


@pytest.mark.parametrize("failing", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_ends_the_other(failing: int, workspace: Path) -> None:
    settings = ["--trainer.strategy=fsdp2"]
    codes = run_ranks(2, fit_and_fail, failing, "update", killed, settings, folder=workspace)
    assert codes[failing] == -signal.SIGKILL
    assert codes[1 - failing] == 1, logs(workspace)


FAILS = """
import lightning.pytorch as pl


class Fails(pl.Callback):
    def __init__(self, rank: int):
        self.rank = rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.current_epoch == 1:
            raise KeyError("oops")
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_so_it_is_with_processes_that_lightning_starts(failing: int, workspace: Path) -> None:
    (workspace / "fails.py").write_text(FAILS)
    fails = ["--trainer.callbacks+=fails.Fails", f"--trainer.callbacks.rank={failing}", "--trainer.strategy=ddp"]
    environment = os.environ | {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(workspace), *sys.path])
    result = subprocess.run(
        [sys.executable, "-m", "ibro_lightning", *FIT, *fails],
        env=environment,
        timeout=BOUND_S,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "KeyError: 'oops'" in result.stderr
    assert not alive(workspace), "no process is left behind"


@pytest.mark.slow
def test_a_process_that_lightning_started_does_not_outlive_it(workspace: Path) -> None:
    """Killed before the ranks have met: nobody else could tell the second one."""
    environment = os.environ | {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(workspace), *sys.path])
    first = subprocess.Popen([sys.executable, "-m", "ibro_lightning", *FIT, "--trainer.strategy=ddp"], env=environment)
    deadline = time.monotonic() + BOUND_S
    while len(alive(workspace)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.kill()
    first.wait()
    while alive(workspace):
        assert time.monotonic() < deadline, "it waits for the first one"
        time.sleep(0.5)


def alive(workspace: Path) -> list[str]:
    """Processes that work in the folder, apart from this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
                if os.readlink(entry / "cwd") == str(workspace) and b"ibro_lightning" in command:
                    found.append(command.decode())
            except OSError:
                continue
    return found
