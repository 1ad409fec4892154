"""A disk that is full: one clear line, nothing of the new file, and the old ones as they were."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.processes import command, logs, run_ranks
from ibro_lightning.batches import Rollout
from ibro_lightning.guards.disk import DiskFullError, as_disk_full, disk_errors, write_json, written_atomically
from ibro_lightning.runs.parquet import read_groups, write_parquet
from ibro_lightning.types import Completion, Group, Prompt, RewardResult

SMALL = 256 * 1024


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"mounting is not allowed here: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@contextmanager
def files_limited(size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


PROMPT = Prompt("q1", "text", (1, 2), "ok")


def rollout(size: int) -> Rollout:
    """With a response that no compression makes smaller than ``size`` bytes."""
    noise = os.urandom(size // 2).hex()
    completion = Completion((1, 2), (0.0, -1.0), "stop", noise, 16, seed=0)
    group = Group(PROMPT, (completion,), (RewardResult(1.0, {"accuracy": 1.0}),))
    return Rollout.from_groups([group], name="train", iteration=1, temperature=1.0)


WRITERS: dict[str, Callable[[Path, int], Any]] = {
    "json": lambda path, size: write_json(path, ["x" * size]),
    "parquet": lambda path, size: write_parquet(path, rollout(size), tokens=True),
    "torch": lambda path, size: _whole(path, lambda partial: torch.save(torch.zeros(size // 4), partial)),
    "safetensors": lambda path, size: _whole(path, lambda partial: save_file({"w": torch.zeros(size // 4)}, partial)),
}


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    with written_atomically(path) as partial:
        write(partial)


def check_that_nothing_is_lost(folder: Path, write: Callable[[Path, int], Any]) -> str:
    """Try to replace a file by one that is too large; what the error says."""
    path = folder / "data" / "file"
    write(path, 1000)
    before = path.read_bytes()
    with pytest.raises(DiskFullError) as caught:
        write(path, 2 * SMALL)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["file"], "nothing of the new file is left"
    return str(caught.value)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_leaves_the_old_file(kind: str, full_disk: Path) -> None:
    said = check_that_nothing_is_lost(full_disk, WRITERS[kind])
    assert "\n" not in said
    assert f"file cannot be written to {full_disk}/data" in said
    assert "MiB are free there" in said
    assert "--ckpt_path last" in said


@pytest.mark.parametrize("kind", WRITERS)
def test_a_limit_on_files_leaves_the_old_file(kind: str, tmp_path: Path) -> None:
    with files_limited(SMALL):
        check_that_nothing_is_lost(tmp_path, WRITERS[kind])


def test_what_was_written_before_can_be_read(full_disk: Path) -> None:
    path = write_parquet(full_disk / "rollout.parquet", rollout(1000), tokens=True)
    with pytest.raises(DiskFullError):
        write_parquet(full_disk / "more.parquet", rollout(2 * SMALL), tokens=True)
    groups = read_groups(path, [PROMPT], [[0]])
    assert groups is not None
    assert groups[0].completions[0].token_ids == (1, 2)
    assert json.loads(write_json(full_disk / "summary.json", {"a": 1}).read_text()) == {"a": 1}


def test_tensorboard_says_so_at_one_of_the_next_points_and_keeps_the_earlier_ones(
    full_disk: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Its events are written by a thread; what it meets comes up here later, and must not hang."""
    logger = TensorBoardLogger(full_disk, name="", version="")
    logger.log_metrics({"kept": 1.0}, step=1)
    logger.experiment.flush()

    def log_on() -> None:
        with disk_errors(full_disk / "curves"):
            for step in range(2, 1000):
                logger.experiment.add_text("samples", os.urandom(4096).hex(), step)
                logger.experiment.flush()

    with pytest.raises(DiskFullError, match="the disk is full"):
        log_on()
    events = EventAccumulator(str(full_disk))
    events.Reload()
    assert [event.value for event in events.Scalars("kept")] == [1.0]


class TestWhatCountsAsAFullDisk:
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
    def test_the_systems_errors_name_the_file(self, number, tmp_path):
        error = OSError(number, os.strerror(number), str(tmp_path / "there" / "a.ckpt"))
        full = as_disk_full(error, tmp_path / "unknown")
        assert full is not None
        assert str(full).startswith("a.ckpt cannot be written")
        assert os.strerror(number) in str(full)

    def test_it_is_found_behind_other_errors(self, tmp_path):
        first, then = OSError(errno.ENOSPC, "No space left on device"), ValueError("finalizing failed, too")
        then.__context__ = first
        assert "disk is full" in str(as_disk_full(then, tmp_path / "a"))

    def test_libraries_that_keep_no_number(self, tmp_path):
        for said in (
            "I/O error: No space left on device (os error 28)",
            "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598",
        ):
            assert as_disk_full(RuntimeError(said), tmp_path / "a") is not None

    def test_other_errors_are_none_of_it(self, tmp_path):
        for other in (OSError(errno.EACCES, "denied"), RuntimeError("oops"), ValueError("os error 28"), None):
            assert as_disk_full(other, tmp_path / "a") is None
        with pytest.raises(PermissionError), disk_errors(tmp_path / "a"):
            raise PermissionError(errno.EACCES, "denied")

    def test_an_interrupted_write_leaves_nothing(self, tmp_path):
        def stopped(partial: Path) -> None:
            partial.write_bytes(b"half")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            _whole(tmp_path / "a", stopped)
        assert not list(tmp_path.iterdir())

    def test_an_error_of_the_writer_is_its_own(self, tmp_path):
        with pytest.raises(io.UnsupportedOperation), written_atomically(tmp_path / "a"):
            raise io.UnsupportedOperation("read")
        assert not list(tmp_path.iterdir())


def test_a_run_ends_with_one_line_and_goes_on_when_there_is_room(
    workspace: Path, full_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from ibro_lightning.cli.main import main

    fit = ["fit", "--config", "tiny.yaml", f"--trainer.default_root_dir={full_disk}/run", "--trainer.max_epochs=50"]
    with pytest.raises(SystemExit) as end:
        main(fit)
    subprocess.run(["mount", "-o", "remount,size=64m", str(full_disk)], check=True)
    assert end.value.code == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert "cannot be written to" in said
    assert not list(full_disk.rglob("*.partial"))
    whole = list(full_disk.glob("run/checkpoints/iteration_*.ckpt"))
    resume = ["--ckpt_path=last"] if whole else []
    main([*fit, *resume, "--trainer.max_epochs=6"])
    assert (full_disk / "run" / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_two_ranks_that_save_shards_end_with_one_line_each(workspace: Path, full_disk: Path) -> None:
    """DCP's own error is a page per rank."""
    settings = ["--checkpoint.every_n_iterations=1", "--checkpoint.keep_last=null", "--trainer.max_epochs=50"]
    sharded = ["--trainer.strategy=FSDP2Strategy", "--trainer.strategy.save_distributed_checkpoint=true"]
    run = ["fit", "--config", "tiny.yaml", f"--trainer.default_root_dir={full_disk}/run", "--trainer.devices=2"]
    codes = run_ranks(2, command, [*run, *settings, *sharded], folder=workspace)
    assert codes == [2, 2], logs(workspace)
    for rank in (0, 1):
        said = (workspace / f"rank_{rank}.log").read_text()
        assert "error: " in said.splitlines()[-1]
        assert "Traceback" not in said
    assert "cannot be written to" in logs(workspace)
    assert not list(full_disk.rglob("*.partial"))
