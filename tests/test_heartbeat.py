"""What a run is doing right now, and a line when it takes unusually long."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest

from ibro_lightning import timing
from ibro_lightning.callbacks.heartbeat import Heartbeat
from ibro_lightning.errors import ConfigError
from ibro_lightning.timing import PhaseTimer


class TestPhases:
    def test_the_innermost_phase_is_published(self):
        timer = PhaseTimer()
        assert timing.running() is None
        with timer("generate"):
            with timing.phase("sync"):
                assert timing.running()[0] == "sync"
            name, seconds = timing.running()
            assert name == "generate"
            assert seconds >= 0
        assert timing.running() is None

    def test_an_error_ends_the_phase(self):
        timer = PhaseTimer()
        with pytest.raises(ValueError, match="oops"), timer("update"):
            raise ValueError("oops")
        assert timing.running() is None
        assert timer.seconds["update"] >= 0


def trainer(batches: int = 0, first: bool = True) -> Any:
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=batches - 1))
    return SimpleNamespace(is_global_zero=first, fit_loop=loop)


def lines_while(heartbeat: Heartbeat, capfd: pytest.CaptureFixture[str], enough: int) -> list[str]:
    """What it says until there are enough lines, in a bounded time."""
    said = ""
    for _ in range(1000):
        said += capfd.readouterr().err
        if said.count("\n") >= enough:
            break
        time.sleep(0.01)
    return said.splitlines()


class TestHeartbeat:
    module = pl.LightningModule()

    def test_an_iteration_that_takes_long_gets_a_line_with_its_phase(self, capfd):
        heartbeat = Heartbeat(factor=3, at_least_s=0, first_s=0.05)
        heartbeat.on_train_start(trainer(), self.module)
        with timing.phase("generate"):
            lines = lines_while(heartbeat, capfd, 2)  # and another one, later
        heartbeat.on_train_end(trainer(), self.module)
        assert all(line.startswith("iteration 1 (the first here) has been running for") for line in lines)
        assert "in generate for" in lines[0]
        assert heartbeat._thread is None

    def test_the_median_of_the_earlier_ones_is_the_measure(self, capfd):
        heartbeat = Heartbeat(factor=3, at_least_s=0)
        heartbeat._durations.extend([0.01, 0.02, 100.0])
        assert heartbeat.patience_s == 0.06
        assert "iteration 7 has been running for 9 s, between phases; 0.0 s is usual" in heartbeat.describe(7, 9.0)
        assert Heartbeat(at_least_s=60).patience_s == 600

    def test_the_intervals_grow(self, capfd):
        heartbeat = Heartbeat(factor=1, at_least_s=0, first_s=0.02)
        heartbeat.on_train_start(trainer(), self.module)
        began = time.monotonic()
        lines = lines_while(heartbeat, capfd, 4)
        heartbeat.on_train_end(trainer(), self.module)
        assert time.monotonic() - began >= 0.02 * 2**3, "the fourth line comes after three doublings"
        assert len(lines) >= 4

    def test_an_evaluation_does_not_count(self):
        heartbeat = Heartbeat()
        heartbeat.on_train_start(trainer(), self.module)
        began = heartbeat._began
        heartbeat.on_validation_start(trainer(), self.module)
        time.sleep(0.01)
        heartbeat.on_validation_end(trainer(), self.module)
        assert heartbeat._began >= began + 0.01
        heartbeat.on_exception(trainer(), self.module, ValueError())
        assert heartbeat._thread is None

    def test_quick_iterations_and_other_ranks_say_nothing(self, capfd):
        for heartbeat, first in ((Heartbeat(), True), (Heartbeat(at_least_s=0, first_s=0.01), False)):
            heartbeat.on_train_start(trainer(first=first), self.module)
            time.sleep(0.1)
            heartbeat.on_train_batch_end(trainer(1), self.module, None, None, 0)
            heartbeat.on_train_end(trainer(1), self.module)
        assert Heartbeat(factor=0)._thread is None
        assert capfd.readouterr().err == ""

    def test_wrong_settings_are_refused(self):
        with pytest.raises(ConfigError, match=r"^factor: -1"):
            Heartbeat(factor=-1)


def test_a_training_run_with_a_heartbeat_names_the_phase(
    workspace: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ibro_lightning.cli.main import main
    from ibro_lightning.modules import DAPOModule

    prepare = DAPOModule.prepare

    def slow(self: DAPOModule, rollout: Any) -> Any:
        if rollout.iteration == 2:
            time.sleep(1)
        return prepare(self, rollout)

    monkeypatch.setattr(DAPOModule, "prepare", slow)
    main(["fit", "--config", "tiny.yaml", "--heartbeat.at_least_s=0.3", "--heartbeat.factor=0.001"])
    assert "iteration 2 has been running for" in (said := capfd.readouterr().err)
    assert ", in prepare for" in said
