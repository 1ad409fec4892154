"""The temporary folder of a program in the sandbox: created, measured, and removed even after its owner was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator

PREFIX = "ibro-sandbox-"
MOST_FILES = 1000
_GRACE_S = 60.0
_swept = False


@contextlib.contextmanager
def temporary_folder() -> Iterator[str]:
    """A folder that is removed afterwards. Those of killed processes are removed by later ones."""
    global _swept
    if not _swept:
        _swept = True
        sweep()
    folder = tempfile.mkdtemp(prefix=PREFIX)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # shows that its owner is alive; the kernel releases it when the owner dies
        yield folder
    finally:
        remove(folder)
        os.close(lock)


def folder_size(folder: str) -> float:
    """Bytes in the folder's files; infinite if there are absurdly many, which take space, too."""
    total, count = 0, 0
    with os.scandir(folder) as entries:
        for entry in entries:
            count += 1
            if count > MOST_FILES:
                return float("inf")
            with contextlib.suppress(FileNotFoundError):  # removed in the meantime
                total += entry.stat(follow_symlinks=False).st_size
    return total


def remove(folder: str) -> None:
    with contextlib.suppress(RecursionError):  # folders within folders: only where programs are not locked in
        shutil.rmtree(folder, ignore_errors=True)


def sweep() -> None:
    """Remove the folders of this user whose owners are dead."""
    parent = tempfile.gettempdir()
    with os.scandir(parent) as entries:
        candidates = [entry for entry in entries if entry.name.startswith(PREFIX)]
    for entry in candidates:
        with contextlib.suppress(OSError):
            status = entry.stat(follow_symlinks=False)
            # A new one may not be locked yet.
            if status.st_uid != os.geteuid() or time.time() - status.st_mtime < _GRACE_S:
                continue
            lock = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(entry.path)
            finally:
                os.close(lock)
