"""One run, one folder: a command that writes into a run's folder holds its lock.

The lock of ``runs/mine`` is the file ``runs/.mine.lock``. It lies beside the folder, as a new run moves an earlier
run's folder aside, and a folder that is moved or removed while its run is alive must not be free for another. Each
other command has its own lock (``.mine.validate.lock``): two validations would mix their files, while one beside a
training run is fine.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from ibro_lightning.errors import ConfigError, check_at_least
from ibro_lightning.guards.disk import disk_errors
from ibro_lightning.guards.signals import started_by_lightning
from ibro_lightning.runs.holder import Holder, run_name
from ibro_lightning.runs.lock import LockFile

LOOK_S = 0.5
"""Polling interval in seconds while waiting for a lock."""


class RunLock(pl.Callback):
    """Ensures that one run at a time writes into a run's folder; another is refused before it changes anything.

    The lock ends with the run, however that ends. The command line takes it first; in a run from Python, the first
    callback or datamodule of this package that writes takes it (:meth:`of`).

    Args:
        wait_s: seconds to wait for an earlier run in the folder to end, as after a requeue; 0 refuses at once.
    """

    def __init__(self, wait_s: float = 0.0) -> None:
        check_at_least("wait_s", wait_s, 0)
        self.wait_s = wait_s
        self._lock: FolderLock | None = None
        self._for_command = False

    @classmethod
    def of(cls, trainer: pl.Trainer) -> RunLock:
        """The Trainer's RunLock, added if it has none."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        found = next((callback for callback in callbacks if isinstance(callback, cls)), None)
        if found is None:
            callbacks.append(found := cls())  # last, as on an exception the others may still write a checkpoint
        return found

    @contextmanager
    def held(self, trainer: pl.Trainer, command: str) -> Iterator[None]:
        """Hold the lock during a whole command of the command line; see :meth:`take`."""
        self._for_command = not trainer.fast_dev_run  # type: ignore[attr-defined]  # which writes nothing
        self.take(trainer, command)
        try:
            yield
        finally:
            self._for_command = False
            self.release()

    def take(self, trainer: pl.Trainer, command: str | None = None) -> None:
        """Take the lock unless this run already has it; any rank may call this.

        Raises:
            ConfigError: another run has the folder.
        """
        if self._lock is not None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        name = command or TrainerFn(trainer.state.fn).value
        lock = FolderLock(Path(trainer.default_root_dir), name, _in_use(trainer))
        if trainer.global_rank == 0:
            lock.take(self.wait_s)
            self._lock = lock
        elif command is not None and not started_by_lightning():  # Lightning starts ranks after the first has the lock
            lock.refuse_others(self.wait_s, except_run=run_name())

    def release(self) -> None:
        """Release the lock, unless it is held for a whole command."""
        if self._lock is not None and not self._for_command:
            self._lock.release()
            self._lock = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._for_command and self._lock is None and trainer.global_rank > 0:  # by now the first rank has it
            self._lock = FolderLock(Path(trainer.default_root_dir), stage)
            self._lock.join(trainer.global_rank)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.release()


def _in_use(trainer: pl.Trainer) -> Callable[[], bool]:
    """Whether a Trainer needs its lock: not after an error, even if that kept its callbacks from releasing it."""
    reference = weakref.ref(trainer)
    return lambda: (alive := reference()) is not None and not alive.state.stopped


class FolderLock:
    """A folder's lock for one command, on both the given path and the one to which links resolve.

    Args:
        in_use: see :class:`.LockFile`.
        setting: the setting that names the folder, for errors.
        by: the command that takes the lock, if it is another one.
    """

    def __init__(
        self,
        folder: Path,
        command: str,
        in_use: Callable[[], bool] = lambda: True,
        setting: str = "trainer.default_root_dir",
        by: str | None = None,
    ) -> None:
        self.folder, self.setting = folder, setting
        self.files = [LockFile(path, by or command, in_use) for path in lock_paths(folder, command)]
        self._taken: list[LockFile] = []

    def take(self, wait_s: float = 0.0) -> None:
        """Take the lock, waiting up to ``wait_s`` seconds for it.

        Raises:
            ConfigError: another process has it, or the folder is not writable.
        """
        until, reported = time.monotonic() + wait_s, False
        while (holder := self._try()) is not None:
            if time.monotonic() >= until:
                raise self._refusal(holder, wait_s)
            if not reported:
                rank_zero_info(f"{self.folder} is in use by {holder}: waiting up to {wait_s:g} s for its end")
                reported = True
            time.sleep(LOOK_S)

    def _try(self) -> Holder | None:
        for file in self.files:
            try:
                with disk_errors(file.path):
                    holder = file.take()
            except OSError as error:
                self.release()
                blocking = [str(part) for part in file.path.parents if part.exists() and not part.is_dir()]
                kind = "a link" if file.path.is_symlink() else "a folder" if file.path.is_dir() else None
                why = f"{file.path} is {kind}" if kind else error.strerror
                reason = f"{blocking[0]} is a file" if blocking else f"nothing can be written there ({why})"
                raise ConfigError(self.setting, str(self.folder), f"{reason}: write another folder") from error
            except BaseException:
                self.release()
                raise
            if holder is not None:
                self.release()
                return holder
            self._taken.append(file)
        return None

    def _refusal(self, holder: Holder, wait_s: float) -> ConfigError:
        waited = f" after {wait_s:g} s" if wait_s else ""
        last = "or write another folder"
        if self.setting == "trainer.default_root_dir":
            last = "write another folder, or have --run_lock.wait_s wait for it"
        remedy = f"in use{waited} by {holder}: wait for it to end, stop it, {last}"
        return ConfigError(self.setting, str(self.folder), remedy)

    def refuse_others(self, wait_s: float = 0.0, *, except_run: str | None = None) -> None:
        """Raise, after up to ``wait_s`` seconds, if another process has the lock, unless it is of ``except_run``
        (:func:`.run_name`); do not take it."""
        until = time.monotonic() + wait_s
        while holder := next(filter(None, (file.holder() for file in self.files)), None):
            if holder.run == except_run:
                return
            if time.monotonic() >= until:
                raise self._refusal(holder, wait_s)
            time.sleep(LOOK_S)

    def join(self, rank: int) -> None:
        """Extend the lock to the lifetime of this process, another rank of the run that holds it."""
        self._taken = [file for file in self.files if file.join(rank)]

    @contextmanager
    def held(self, wait_s: float = 0.0) -> Iterator[None]:
        self.take(wait_s)
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        while self._taken:
            self._taken.pop(0).release()


def lock_paths(folder: Path, command: str = "fit") -> list[Path]:
    """A folder's lock files: one, or two if it is a link."""
    given, kind = Path.cwd() / folder.expanduser(), "" if command == "fit" else f".{command}"
    unresolved = [given.parent.resolve() / given.name] if given.name not in ("", "..") else []
    return list(dict.fromkeys(_lock_path(path, kind) for path in [*unresolved, given.resolve()]))


def _lock_path(folder: Path, kind: str) -> Path:
    fixed = not folder.name or (folder.is_dir() and (os.path.ismount(folder) or not os.access(folder.parent, os.W_OK)))
    if fixed:  # such a folder cannot be moved aside either
        return folder / f".run{kind}.lock"
    return folder.with_name(f".{folder.name}{kind}.lock")
