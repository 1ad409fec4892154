"""One run, one folder: a command that writes into a run's folder holds its lock.

The lock of ``runs/mine`` is the file ``runs/.mine.lock``. It lies beside the folder, as a new run moves an earlier
run's folder aside, and a folder that is moved or removed while its run is alive must not be free for another. Each
other command has its own lock (``.mine.validate.lock``): two validations would mix their files, while one beside a
training run is fine.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from ibro_lightning.errors import ConfigError, check_at_least
from ibro_lightning.guards.disk import disk_errors
from ibro_lightning.guards.orphans import started_by_lightning
from ibro_lightning.runs.holder import Holder, run_name
from ibro_lightning.runs.lock import LockFile

LOOK_S = 0.5
"""Polling interval in seconds while waiting for a lock."""


class RunLock(pl.Callback):
    """Ensures that one run at a time writes into a run's folder; another is refused before it changes anything.

    The lock ends with the run, however that ends. The command line takes it first of all; in a run from Python, the
    first callback or datamodule of this package that writes does (:meth:`of`).

    Args:
        wait_s: seconds to wait for an earlier run in the folder to end, as after a requeue; 0 refuses at once.
    """

    def __init__(self, wait_s: float = 0.0) -> None:
        check_at_least("run_lock.wait_s", wait_s, 0)
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
        """Hold the lock during a whole command of the command line.

        Raises:
            ConfigError: another run has the folder.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # it writes nothing
            yield
            return
        self._for_command = True
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
        lock = FolderLock(Path(trainer.default_root_dir), name, _use_of(trainer))
        if trainer.global_rank == 0:
            lock.take(self.wait_s)
            self._lock = lock
        elif command is not None and not started_by_lightning():  # Lightning starts ranks after the first has the lock
            lock.wait_for_others(self.wait_s)

    def release(self) -> None:
        """Release the lock, unless it is held for a whole command."""
        if self._lock is not None and not self._for_command:
            self._lock.release()
            self._lock = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._for_command and self._lock is None and trainer.global_rank > 0:  # by now the first rank has it
            lock = FolderLock(Path(trainer.default_root_dir), stage)
            lock.join(trainer.global_rank)
            self._lock = lock

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.release()


class FolderLock:
    """A folder's lock for one command, on both the given path and the one to which links resolve.

    Args:
        in_use: whether this process still needs the lock, should it take it again while it holds it.
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
        self.folder, self.in_use, self.setting = folder, in_use, setting
        self.files = [LockFile(path, by or command) for path in lock_paths(folder, command)]
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
            if (other := _claim(file, self.in_use)) is not None:
                self.release()
                return other
            try:
                with disk_errors(file.path):
                    holder = file.take()
            except BaseException as error:
                _disclaim(file)
                self.release()
                if not isinstance(error, OSError):
                    raise
                files = [str(part) for part in file.path.parents if part.exists() and not part.is_dir()]
                kind = "a link" if file.path.is_symlink() else "a folder" if file.path.is_dir() else None
                why = f"{file.path} is {kind}" if kind else error.strerror
                reason = f"{files[0]} is a file" if files else f"nothing can be written there ({why})"
                remedy = f"{reason}: write another folder"
                raise ConfigError(self.setting, str(self.folder), remedy) from error
            if holder is not None:
                _disclaim(file)
                self.release()
                return holder
            self._taken.append(file)
        return None

    def _refusal(self, holder: Holder, wait_s: float) -> ConfigError:
        waited = f" after {wait_s:g} s" if wait_s else ""
        wait = ", or have --run_lock.wait_s wait for it" if self.setting == "trainer.default_root_dir" else ""
        remedy = f"in use{waited} by {holder}: let it end or stop it, write another folder{wait}"
        return ConfigError(self.setting, str(self.folder), remedy)

    def refuse_others(self) -> None:
        """Raise if another process has the lock, without taking it."""
        own_paths = [path for path, own in _own.items() if own.process == os.getpid()]
        if holder := next(filter(None, (file.holder() for file in self.files if file.path not in own_paths)), None):
            raise self._refusal(holder, 0.0)

    def wait_for_others(self, wait_s: float = 0.0) -> None:
        """For a rank that does not take the lock itself: raise the first rank's error if another run has it."""
        until = time.monotonic() + wait_s
        while (holder := next(filter(None, (file.holder() for file in self.files)), None)) is not None:
            if holder.run == run_name():
                return
            if time.monotonic() >= until:
                raise self._refusal(holder, wait_s)
            time.sleep(LOOK_S)

    def join(self, rank: int) -> None:
        """Extend the lock to the lifetime of this process, another rank of the run that holds it."""
        self._taken = [file for file in self.files if file.join(rank)]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context manager around :meth:`take` and :meth:`release`."""
        self.take()
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        while self._taken:
            file = self._taken.pop(0)
            try:
                file.release()
            finally:
                _disclaim(file)


def lock_paths(folder: Path, command: str = "fit") -> list[Path]:
    """A folder's lock files: one, or two if it is a link."""
    given, kind = Path.cwd() / folder.expanduser(), "" if command == "fit" else f".{command}"
    unresolved = [given.parent.resolve() / given.name] if given.name not in ("", "..") else []
    return list(dict.fromkeys(_lock_of(path, kind) for path in [*unresolved, given.resolve()]))


def _lock_of(folder: Path, kind: str) -> Path:
    fixed = not folder.name or (folder.is_dir() and (os.path.ismount(folder) or not os.access(folder.parent, os.W_OK)))
    if fixed:  # such a folder cannot be moved aside either
        return folder / f".run{kind}.lock"
    return folder.with_name(f".{folder.name}{kind}.lock")


# The locks of this process: the kernel does not stop a process from taking its own locks again.


@dataclass(frozen=True)
class _Own:
    file: LockFile
    holder: Holder
    process: int
    in_use: Callable[[], bool]


_own: dict[Path, _Own] = {}
_guard = threading.Lock()


def _claim(file: LockFile, in_use: Callable[[], bool]) -> Holder | None:
    """Register a lock for this process. Returns its holder if it is already registered and in use, otherwise None."""
    with _guard:
        own = _own.get(file.path)
        if own is not None and own.process == os.getpid():
            if own.in_use():
                return own.holder
            own.file.release()
        _own[file.path] = _Own(file, Holder.this_process(file.command), os.getpid(), in_use)
        return None


def _disclaim(file: LockFile) -> None:
    with _guard:
        if file.path in _own and _own[file.path].file is file:
            del _own[file.path]


def _use_of(trainer: pl.Trainer) -> Callable[[], bool]:
    """Whether a Trainer needs its lock: not after an error, even if that kept its callbacks from releasing it."""
    reference = weakref.ref(trainer)

    def in_use() -> bool:
        trainer = reference()
        return trainer is not None and not trainer.state.stopped

    return in_use
