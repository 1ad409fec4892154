"""What the sandbox needs of the system: Landlock's version, the interpreter's folders, descriptors, and a temporary
folder, which is removed even after its owner was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from functools import cache

LANDLOCK_THAT_TRUNCATES = 3
"""From this version (Linux 6.2) on, files outside the folder cannot be truncated, so that writing can be allowed."""
_READABLE = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime"),
    *("/dev/urandom", "/dev/random", "/dev/zero"),
)
PREFIX = "ibro-sandbox-"
MAX_FILES = 1000
_GRACE_S = 60.0
_swept = False


@cache
def landlock_version() -> int:
    """This kernel's version of Landlock's interface; 0: none."""
    import ctypes  # here, since rewards without programs do not need it

    return max(0, int(ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1)))


def environment(folder: str) -> dict[str, str]:
    """Only the variables that the interpreter may need to start, and a fixed seed for the order of sets."""
    own = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ}
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}  # there are no threads in the sandbox
    return {"HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", **threads, **own}


@cache
def packages() -> list[str]:
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


@cache
def readable(site_packages: bool) -> list[str]:
    libraries = sysconfig.get_config_vars("LIBDIR", "DESTSHARED")
    libraries += os.environ.get("LD_LIBRARY_PATH", "").split(":")
    own = [str(folder) for folder in (os.path.dirname(os.__file__), *libraries) if folder]
    return [*own, *_READABLE, *(packages() if site_packages else [])]


def sealed(data: bytes) -> int:
    """A read-only descriptor with ``data``. It needs no writer, which a program that never reads would block."""
    fd = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


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
            if count > MAX_FILES:
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
