"""One run, one folder: a lock that says who holds it, is freed by any death, and refuses in one line."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from helpers.processes import CONTEXT, command, logs, run_ranks
from ibro_lightning.callbacks import IterationCheckpoint, RolloutLog
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.runs import lock as locks
from ibro_lightning.runs.holder import Holder
from ibro_lightning.runs.holding import FolderLock, lock_paths

PATIENCE_S = 600
FIT = ["fit", "--config", "tiny.yaml"]
LINE = b'{"file": "a lock of ibro_lightning", "pid": 1, "host": "elsewhere"}'


def hold(folder: Path, name: str, ready: Any, end: Any) -> None:
    """In a process of its own: take the lock, say whether that worked, and wait."""
    try:
        lock = FolderLock(folder, name)
        lock.take()
        ready.put("taken")
    except ConfigError as error:
        ready.put(str(error))
        return
    end.wait()
    lock.release()


class Other:
    """Another process that holds, or wants, the lock of a folder."""

    def __init__(self, folder: Path, name: str = "fit", work: Callable[..., None] = hold) -> None:
        self.ready, self.end = CONTEXT.Queue(), CONTEXT.Event()
        self.process = CONTEXT.Process(target=work, args=(folder, name, self.ready, self.end))
        self.process.start()

    def answer(self) -> str:
        return str(self.ready.get(timeout=PATIENCE_S))

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Other]:
    process = Other(tmp_path / "run")
    assert process.answer() == "taken"
    yield process
    process.kill()


class TestTheLock:
    def test_says_who_holds_it_and_what_to_do(self, tmp_path: Path, other: Other) -> None:
        with pytest.raises(ConfigError) as refused:
            FolderLock(tmp_path / "run", "fit").take()
        said = str(refused.value)
        assert "\n" not in said
        assert f"in use by process {other.process.pid} on {socket.gethostname()} (fit), since 2" in said
        assert said.startswith("trainer.default_root_dir: ")
        assert "write another folder, or have --run_lock.wait_s wait for it" in said

    def test_is_freed_by_a_kill_at_once(self, tmp_path: Path, other: Other) -> None:
        other.kill()
        assert lock_paths(tmp_path / "run")[0].exists(), "what the dead one has left is in nobody's way"
        with FolderLock(tmp_path / "run", "fit").held():
            assert json.loads(lock_paths(tmp_path / "run")[0].read_text())["pid"] == os.getpid()

    def test_leaves_nothing_when_it_is_let_go(self, tmp_path: Path) -> None:
        with FolderLock(tmp_path / "runs" / "deep" / "mine", "fit").held():
            assert (tmp_path / "runs" / "deep" / ".mine.lock").exists()
        assert list(tmp_path.iterdir()) == []

    def test_one_of_many_starts_wins(self, tmp_path: Path) -> None:
        """Also over what a killed run has left, and with a folder to be made first."""
        for _ in range(2):
            others = [Other(tmp_path / "runs" / "mine") for _ in range(4)]
            answers = [process.answer() for process in others]
            assert answers.count("taken") == 1, answers
            assert all("in use by process" in answer for answer in answers if answer != "taken"), answers
            for process in others:
                process.kill()

    def test_a_child_that_outlives_its_parent_does_not_keep_it(self, tmp_path: Path) -> None:
        parent = Other(tmp_path / "run", work=hold_and_fork)
        assert parent.answer() == "taken"
        child = int(parent.answer())
        parent.kill()
        try:
            os.kill(child, 0)  # it lives
            with FolderLock(tmp_path / "run", "fit").held():
                pass
        finally:
            os.kill(child, signal.SIGKILL)

    def test_follows_links_and_keeps_their_names(self, tmp_path: Path) -> None:
        """A start moves the link aside, so both names must be taken; the other one knows the folder by its own."""
        (tmp_path / "disk").mkdir()
        (tmp_path / "disk" / "run").mkdir()
        (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
        with FolderLock(tmp_path / "run", "fit").held():
            (tmp_path / "run").rename(tmp_path / "run.1")
            for name in ("run", "run.1", "disk/run", "disk/../run"):
                process = Other(tmp_path / name)
                assert "in use by process" in process.answer(), name
                process.kill()

    def test_survives_that_the_folder_is_moved_or_removed(self, tmp_path: Path, other: Other) -> None:
        (tmp_path / "run").mkdir()
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(ConfigError, match="in use by"):
            FolderLock(tmp_path / "run", "fit").take()

    def test_is_inside_where_nothing_can_be_written_beside(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "run").mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "run")
        with FolderLock(tmp_path / "run", "fit").held():
            assert [path.name for path in tmp_path.rglob("*")] == ["run", ".run.lock"]
            assert (tmp_path / "run" / ".run.lock").exists()

    def test_does_not_touch_a_file_of_somebody_else(self, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").write_text("")
        (tmp_path / ".run.lock").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ConfigError, match="nothing can be written there"):
            FolderLock(tmp_path / "run", "fit").take()
        assert (tmp_path / ".run.lock").is_symlink()
        assert (tmp_path / "elsewhere").read_text() == ""
        (tmp_path / ".run.lock").unlink()
        for content in ("mine", "[1]", '{"file": "mine"}'):
            (tmp_path / ".run.lock").write_text(content)
            with pytest.raises(ConfigError, match="the file is not a lock"):
                FolderLock(tmp_path / "run", "fit").take()
            assert (tmp_path / ".run.lock").read_text() == content

    @pytest.mark.parametrize(
        "left", [b"", b"\0" * 200, b'{"file": "a lock', b'{"file": "a lock of ibro_lightning", "pi']
    )
    def test_is_freed_by_a_power_failure_while_it_was_written(self, tmp_path: Path, left: bytes) -> None:
        (tmp_path / ".run.lock").write_bytes(left)
        with FolderLock(tmp_path / "run", "fit").held():
            pass
        assert not (tmp_path / ".run.lock").exists()

    def test_of_the_current_folder_is_that_of_its_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "run" / "sub").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "run" / "sub")
        for name in ("..", "../../run", str(tmp_path / "run")):
            assert lock_paths(Path(name)) == [tmp_path / ".run.lock"], name

    def test_names_what_is_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=r"file is a file: write another folder"):
            FolderLock(tmp_path / "file" / "run", "fit").take()

    def test_waits_for_so_long_and_says_so(
        self, tmp_path: Path, other: Other, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level("INFO"), pytest.raises(ConfigError, match=r"in use after 0\.1 s by"):
            FolderLock(tmp_path / "run", "fit").take(wait_s=0.1)
        assert re.search(r"is in use by process \d+ .*: waiting up to 0.1 s for its end", caplog.text)
        threading.Timer(0.2, other.end.set).start()
        lock = FolderLock(tmp_path / "run", "fit")
        lock.take(wait_s=PATIENCE_S)
        lock.release()

    def test_commands_of_one_kind_exclude_each_other_alone(self, tmp_path: Path, other: Other) -> None:
        with FolderLock(tmp_path / "run", "validate").held(), FolderLock(tmp_path / "run", "test").held():
            second = Other(tmp_path / "run", "validate")
            assert "(validate), since" in second.answer()
            second.kill()


def hold_and_fork(folder: Path, name: str, ready: Any, end: Any) -> None:
    FolderLock(folder, name).take()
    child = os.fork()
    if child == 0:
        os.close(0)
        time.sleep(PATIENCE_S)
        os._exit(0)
    ready.put("taken")
    ready.put(child)
    end.wait()


def left_by(path: Path, **changes: Any) -> Holder:
    """The lock's file, as a process of another machine has left it; or as it has it, where locks do not reach it."""
    holder = Holder(**{**asdict(Holder.this_process("fit")), "host": "elsewhere", "pid": 1, **changes})
    path.write_text(json.dumps({"file": "a lock of ibro_lightning", **asdict(holder)}) + "\n")
    return holder


class TestWithoutLocksThatReach:
    @pytest.fixture(autouse=True)
    def hasty(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(locks, "BEAT_S", 0.05)
        monkeypatch.setattr(locks, "SILENCE_S", 2.0)

    @pytest.fixture
    def no_locks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*arguments: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(locks.fcntl, "lockf", refuse)
        monkeypatch.setattr(locks.fcntl, "fcntl", refuse)

    def test_a_silent_process_of_another_machine_is_dead(self, tmp_path: Path) -> None:
        left_by(tmp_path / ".run.lock")
        with FolderLock(tmp_path / "run", "fit").held():
            pass

    def test_one_that_gives_signs_of_life_is_not(self, tmp_path: Path) -> None:
        path, end = tmp_path / ".run.lock", threading.Event()
        left_by(path)

        def live() -> None:
            while not end.wait(0.05):
                os.utime(path)

        beat = threading.Thread(target=live)
        beat.start()
        with pytest.raises(ConfigError, match="in use by process 1 on elsewhere"):
            FolderLock(tmp_path / "run", "fit").take()
        end.set()
        beat.join()

    def test_a_holder_gives_signs_of_life(self, tmp_path: Path) -> None:
        with FolderLock(tmp_path / "run", "fit").held():
            before, until = (tmp_path / ".run.lock").stat().st_mtime_ns, time.monotonic() + PATIENCE_S
            while (tmp_path / ".run.lock").stat().st_mtime_ns == before:
                assert time.monotonic() < until

    def test_a_process_of_this_machine_is_looked_up(
        self, tmp_path: Path, no_locks: None, other: Other, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(ConfigError, match=f"in use by process {other.process.pid}"):
            FolderLock(tmp_path / "run", "fit").take()
        other.kill()
        with caplog.at_level("INFO"), FolderLock(tmp_path / "run", "fit").held():
            assert "has no locks" in caplog.text

    def test_another_process_with_its_number_is_not_taken_for_it(self, tmp_path: Path, no_locks: None) -> None:
        left_by(tmp_path / ".run.lock", host=socket.gethostname(), pid=os.getpid(), started="1")
        with FolderLock(tmp_path / "run", "fit").held():
            pass


class TestRanks:
    def test_the_lock_lasts_as_long_as_any_rank(self, tmp_path: Path, other: Other) -> None:
        rank = Other(tmp_path / "run", work=join)
        assert rank.answer() == "joined"
        other.kill()
        with pytest.raises(ConfigError, match="in use by"):
            FolderLock(tmp_path / "run", "fit").take()
        rank.kill()
        FolderLock(tmp_path / "run", "fit").take()

    def test_all_of_them_are_refused(self, workspace: Path) -> None:
        """Each with exit code 2 and one line, though only the first takes the lock, and before anything changes."""
        holder = Other(workspace / "run")
        assert holder.answer() == "taken"
        before = sorted(str(path) for path in workspace.rglob("*") if "__pycache__" not in path.parts)
        codes = run_ranks(2, command, [*FIT, "--trainer.devices=2", "--trainer.strategy=ddp"], folder=workspace)
        assert codes == [2, 2], logs(workspace)
        for rank in range(2):
            said = (workspace / f"rank_{rank}.log").read_text()
            assert f"error: trainer.default_root_dir: 'run' - in use by process {holder.process.pid}" in said
            assert "Traceback" not in said
        left = [path for path in workspace.rglob("*") if path.suffix != ".log" and "__pycache__" not in path.parts]
        assert sorted(map(str, left)) == before
        holder.kill()


def join(folder: Path, name: str, ready: Any, end: Any) -> None:
    lock = FolderLock(folder, name)
    lock.join(1)
    ready.put("joined" if lock.files[0].join(1) else "not joined")
    end.wait()


class TestCommands:
    def test_refused_before_anything_changes(self, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
        main([*FIT, "--trainer.max_epochs=1"])
        assert not list(workspace.glob(".*")), "a run that has ended leaves no lock"
        before = {path: path.stat().st_mtime_ns for path in (workspace / "run").rglob("*")}
        holder = Other(workspace / "run")
        assert holder.answer() == "taken"
        capsys.readouterr()
        for more in ([], ["--ckpt_path=last"]):
            with pytest.raises(SystemExit) as end:
                main([*FIT, *more])
            assert end.value.code == 2
            said = capsys.readouterr().err.strip().splitlines()
            assert said[-1].startswith("error: trainer.default_root_dir: 'run' - in use by process ")
        assert {path: path.stat().st_mtime_ns for path in (workspace / "run").rglob("*")} == before
        assert not list(workspace.glob("run.*"))
        main([*FIT, "--trainer.fast_dev_run=1"])  # writes nothing
        main(["validate", "--config=tiny.yaml"])  # has names of its own
        second = Other(workspace / "run", "validate")
        assert second.answer() == "taken"
        with pytest.raises(SystemExit) as end:
            main(["validate", "--config=tiny.yaml"])
        assert end.value.code == 2
        assert "(validate), since" in capsys.readouterr().err
        holder.kill()
        second.kill()

    def test_a_refused_run_lets_go(self, workspace: Path) -> None:
        """So that a notebook may try again."""
        for _ in range(2):
            with pytest.raises(SystemExit):
                main([*FIT, "--data.group_size=1"])
        assert not list(workspace.glob(".*"))
        FolderLock(workspace / "run", "fit").take()

    def test_export_does_not_write_what_a_live_run_will(self, tmp_path: Path, other: Other) -> None:
        with pytest.raises(ConfigError, match=r"output: .* in use by"):
            FolderLock(tmp_path / "run", "fit", setting="output").refuse_others()
        FolderLock(tmp_path / "another", "fit", setting="output").refuse_others()


class Nothing(pl.LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> None:
        return None


def python_fit(folder: Path, *callbacks: pl.Callback) -> None:
    trainer = pl.Trainer(
        default_root_dir=folder, max_epochs=1, logger=False, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), enable_checkpointing=any(
            isinstance(callback, IterationCheckpoint) for callback in callbacks),
    )  # fmt: skip
    trainer.fit(Nothing(), [0])


class Refits(pl.Callback):
    """Fits into the same folder while its own Trainer does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with pytest.raises(ConfigError) as refused:
            python_fit(self.folder, RolloutLog())
        self.said = str(refused.value)
        process = Other(self.folder)
        self.said += process.answer()
        process.kill()


class Fails(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        raise KeyError("oops")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        raise KeyError("again")


class TestPython:
    @pytest.mark.parametrize("writer", [IterationCheckpoint, RolloutLog], ids=lambda writer: writer.__name__)
    def test_a_trainer_holds_its_folder_while_it_fits(self, tmp_path: Path, writer: type[pl.Callback]) -> None:
        refits = Refits(tmp_path / "run")
        python_fit(tmp_path / "run", writer(), refits)
        assert refits.said.count(f"in use by process {os.getpid()}") == 2
        assert not list(tmp_path.glob(".*")), "and lets go at the end"

    def test_an_error_ends_it_however_callbacks_take_it(self, tmp_path: Path) -> None:
        for _ in range(2):
            with pytest.raises(KeyError):
                python_fit(tmp_path / "run", RolloutLog(), Fails())

    def test_a_trainer_that_writes_nothing_of_ours_takes_nothing(self, tmp_path: Path, other: Other) -> None:
        python_fit(tmp_path / "run")
