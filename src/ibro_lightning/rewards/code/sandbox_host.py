"""The sandbox's view of the system: Landlock's version, the interpreter's folders, descriptors."""

from __future__ import annotations

import fcntl
import os
import sysconfig
from functools import cache

LANDLOCK_THAT_TRUNCATES = 3
"""From this version (Linux 6.2) on, files outside the folder cannot be truncated, so that writing can be allowed."""
_READABLE = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime"),
    *("/dev/urandom", "/dev/random", "/dev/zero"),
)


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
