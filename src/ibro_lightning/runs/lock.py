"""A lock file that one process at a time holds, until it releases it or dies, however it dies.

The kernel keeps the lock (``fcntl.lockf``): SIGKILL or a power failure frees it, and NFS, Lustre and the like enforce
it across machines. ``flock``, which the package ``filelock`` uses, would outlive the process in any child that it has
forked: an orphaned worker would keep a dead run's folder locked. In return, ``lockf`` requires that a process opens the
file only once, as closing any descriptor of it drops the lock. The file therefore lies beside the folder it protects,
where nothing reads or copies it, and this process's own locks are registered here.

On file systems without locks, or whose locks do not reach other machines, the file's content names the holder, and a
thread touches the file every few seconds as a heartbeat: a holder on this machine is looked up by its pid, one on
another machine counts as alive while its heartbeat continues.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from ibro_lightning.guards.disk import free_name
from ibro_lightning.runs.holder import START, Holder

BEAT_S = 4.0
"""Seconds between two heartbeats."""
WRITE_S = 2.0
"""Seconds within which a process that has created the file writes its name, on a machine busy with other work."""
SILENCE_S = 12.0
"""Seconds without a heartbeat after which a process on another machine counts as dead."""
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


_own: dict[Path, LockFile] = {}
"""This process's locks, which the kernel would let it take again."""
_guard = threading.RLock()


class LockFile:
    """One lock.

    Args:
        path: the lock file. It is created, and removed on release; one left by a killed process is taken over.
        command: the command that holds the lock.
        in_use: whether this process still needs the lock, should it take it again while it holds it.
    """

    def __init__(self, path: Path, command: str, in_use: Callable[[], bool] = lambda: True) -> None:
        self.path, self.command, self.in_use = path, command, in_use
        self.me = Holder.this_process(command)
        self._file: int | None = None
        self._joined = False
        self._created_folders: list[Path] = []
        self._silent: bytes | None = None
        self._ambiguous: tuple[int, float] | None = None  # its inode, and when it was first met
        self._stopped = threading.Event()

    def take(self) -> Holder | None:
        """Acquire the lock. Returns the holder if it is taken, otherwise None.

        Raises:
            ConfigError: the file is not a lock file of this package.
            OSError: the file cannot be created.
        """
        with _guard:
            own = _own.get(self.path)
            if own is not None and own.me.pid == os.getpid():
                if own.in_use():
                    return own.me
                own.release()
            self.me = Holder.this_process(self.command)
            _own[self.path] = self
        holder: Holder | None = self.me
        try:
            holder = self._take()
        finally:
            if holder is not None:
                self._unregister()
        return holder

    def _take(self) -> Holder | None:
        while True:
            try:
                self._make_folder()
                file, created = self._open()
            except FileNotFoundError:  # the file or its (empty) folder was removed in between
                continue
            taken = False
            try:
                holder, taken = self._try(file, created)
            finally:
                if not taken:
                    os.close(file)
            if taken:
                self._file = file
                self._start_heartbeat()
                return None
            if holder is not None:
                self._remove_folders()
                return holder

    def _open(self) -> tuple[int, bool]:
        """The file's descriptor, and whether this call created it."""
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), True
        except FileExistsError:
            return os.open(self.path, os.O_RDWR | os.O_NOFOLLOW), False

    def _make_folder(self) -> None:
        for folder in reversed([self.path.parent, *self.path.parent.parents]):
            if not folder.is_dir():
                folder.mkdir(exist_ok=True)
                self._created_folders.append(folder)

    def _remove_folders(self) -> None:
        """Remove the folders that were created only for the lock."""
        for folder in reversed(self._created_folders):
            try:
                folder.rmdir()
            except OSError:  # in use
                break
        self._created_folders = []

    def _try(self, file: int, created: bool) -> tuple[Holder | None, bool]:
        """``(holder, whether this process has the lock now)``. ``(None, False)`` means: try again, as the file was
        removed in between, or the wait for the holder's heartbeat dropped the lock."""
        text, holder = Holder.read(file, self.path)
        locks = _lock(file)
        if locks is False:
            return holder or self._read_later(file), False
        if not _is_at(file, self.path):
            return None, False
        if not created and not os.pread(file, 4096, 0).strip(b"\0").startswith(START):
            self._release_ambiguous(file)
            return None, False
        if holder is not None and self._silent != text and (not holder.is_here() or locks is None):
            # Either there are no locks, or the holder's machine may not share them with this one.
            if _has_heartbeat(self.path, file, holder):
                return holder, False
            self._silent = text
            return None, False
        os.ftruncate(file, 0)
        os.pwrite(file, self.me.to_json().encode(), 0)
        if locks is None:
            rank_zero_info(f"the file system of {self.path} has no locks: other processes check that file's heartbeat")
            time.sleep(0.5)  # if two processes found it free, the last to write has it
            holder = Holder.read(file, self.path)[1]
            return (None, True) if holder == self.me else (holder, False)
        fcntl.lockf(file, fcntl.LOCK_UN, 0, 1)  # keep the first byte; the others are for the run's ranks
        return None, True

    def _release_ambiguous(self, file: int) -> None:
        """Unlock a file that is empty, or holds only a lock's first characters. It need not be ours: it is moved aside,
        unless it is new, as its creator may be about to write."""
        inode = os.fstat(file).st_ino
        if self._ambiguous is None or self._ambiguous[0] != inode:
            self._ambiguous = inode, time.monotonic()
        if time.monotonic() - self._ambiguous[1] < WRITE_S:
            with contextlib.suppress(OSError):
                fcntl.lockf(file, fcntl.LOCK_UN)
            time.sleep(0.1)
            return
        aside = free_name(self.path)
        self.path.rename(aside)
        rank_zero_info(f"{self.path} is not recognisable as a lock: renamed to {aside.name}")

    def _read_later(self, file: int) -> Holder:
        """The holder, once a process that has just taken the lock has written its name (waits up to a second)."""
        for _ in range(20):
            if (holder := Holder.read(file, self.path)[1]) is not None:
                return holder
            time.sleep(0.05)
        return Holder(0, "", "", "", self.command, "")

    def join(self, rank: int) -> bool:
        """Extend the lock to the lifetime of this process, another rank of the run that holds it. Returns whether that
        worked."""
        if self._file is not None:
            return True
        try:
            file = os.open(self.path, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            os.close(file)
            return False
        self._file, self._joined = file, True
        return True

    def holder(self) -> Holder | None:
        """The other process that holds the lock, if any; changes nothing. None for a lock of this process, as closing
        the file would drop it."""
        if self.path in _own and _own[self.path].me.pid == os.getpid():
            return None
        try:
            file = os.open(self.path, os.O_RDONLY)
        except OSError:
            return None
        try:
            _, holder = Holder.read(file, self.path)
            return holder if holder is not None and _is_locked(file, holder) else None
        finally:
            os.close(file)

    def release(self) -> None:
        self._stopped.set()
        try:
            if self._file is not None:
                file, self._file = self._file, None
                # Ranks and forked children must not remove it.
                if not self._joined and self.me.pid == os.getpid() and _is_at(file, self.path):
                    self.path.unlink(missing_ok=True)
                os.close(file)
                self._remove_folders()
        finally:
            self._unregister()

    def _unregister(self) -> None:
        with _guard:
            if _own.get(self.path) is self:
                del _own[self.path]

    def _start_heartbeat(self) -> None:
        """Touch the file every :data:`BEAT_S` seconds until the lock is released."""
        self._stopped = stopped = threading.Event()

        def beat() -> None:
            while not stopped.wait(BEAT_S):
                with contextlib.suppress(OSError):  # disk full, or file removed: the kernel's lock still holds
                    os.utime(self.path)  # not the descriptor, whose number another file may have by now

        threading.Thread(target=beat, name="run-lock", daemon=True).start()


def _lock(file: int) -> bool | None:
    """Whether this process now has the lock; None if the file system has no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _is_at(file: int, path: Path) -> bool:
    """Whether ``path`` still names the open file: a holder removes it on release."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _is_locked(file: int, holder: Holder) -> bool:
    """Whether a process has locked any part of the file."""
    linux = sys.platform.startswith("linux")
    layout, fields = (
        ("hhqqi", (fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)) if linux else ("qqihh", (0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET))
    )
    try:
        answer = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(layout, *fields)))
        return bool(answer[0 if linux else 3] != fcntl.F_UNLCK)
    except OSError:  # no locks on this file system
        return holder.is_here() and holder.is_alive()


def _has_heartbeat(path: Path, file: int, holder: Holder) -> bool:
    """Whether the process that a lock file names is alive. On another machine only a change of the file's time counts,
    so clocks need not agree."""
    if holder.is_here():
        return holder.is_alive()
    rank_zero_info(f"{path} was left by {holder}: waiting up to {SILENCE_S:g} s for its heartbeat")
    before, until = os.fstat(file).st_mtime_ns, time.monotonic() + SILENCE_S
    while time.monotonic() < until:
        time.sleep(min(0.5, SILENCE_S / 4))
        try:
            again = os.open(path, os.O_RDONLY)  # opening makes a network file system refresh its attributes
        except FileNotFoundError:
            return False
        now = os.fstat(again).st_mtime_ns
        os.close(again)  # drops this process's lock, if any: the caller tries again
        if now != before:
            return True
    return False
