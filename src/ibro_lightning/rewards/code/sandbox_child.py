"""The sandbox's process: locks itself in, then runs the program. Started by path; imports nothing of this package.

Arguments: the descriptor with the settings (marshalled by ``sandbox.py``), and the one to report to.
"""

import ctypes
import marshal
import os
import resource
import sys

REPORT = 3
CANNOT = 70
_SET_PARENT_DEATH_SIGNAL, _SET_SECCOMP, _SET_NO_NEW_PRIVILEGES = 1, 22, 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
# Landlock's rights as bits: those of each version of its interface, and those granted.
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_FILE, _TRUNCATE = (1 << bit for bit in (1, 2, 3, 5, 8, 14))
_TCP, _SCOPES = 0b11, 0b11  # bind and connect; abstract sockets and signals


def call(step: str, result: int) -> int:
    """Return ``result`` of a C library function; raise OSError if it is negative."""
    if result < 0:
        raise OSError(ctypes.get_errno(), step + ": " + os.strerror(ctypes.get_errno()))
    return result


def prctl(libc: ctypes.CDLL, option: int, *values: int) -> None:
    arguments = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    call("prctl", libc.prctl(option, *arguments))


def drop_capabilities(libc: ctypes.CDLL) -> None:
    """Drop root's powers over files, processes and limits; other users have none."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    call("capset", libc.capset(header, (ctypes.c_uint32 * 6)()))


def landlock(libc: ctypes.CDLL, version: int, folder: str, readable: list[str]) -> None:
    """Restrict writing to ``folder``, and reading to ``folder`` and ``readable``."""
    supported = _RIGHTS[max(v for v in _RIGHTS if v <= version)]
    attributes = [supported, _TCP, _SCOPES][: 3 if version >= 6 else 2 if version >= 4 else 1]
    ruleset = (ctypes.c_uint64 * len(attributes))(*attributes)
    fd = call("landlock", libc.syscall(_CREATE_RULESET, ruleset, ctypes.c_size_t(8 * len(attributes)), 0))
    in_folder = _WRITE_FILE | _READ_FILE | _READ_DIR | _REMOVE_FILE | _MAKE_FILE | _TRUNCATE
    rules = [(folder, in_folder), ("/dev/null", _WRITE_FILE | _READ_FILE | _TRUNCATE)]
    for path, rights in [*rules, *((path, _READ_FILE | _READ_DIR) for path in readable)]:
        try:
            target = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # not every system has every folder
        if not os.path.isdir(path):
            rights &= ~_READ_DIR
        rule = (rights & supported).to_bytes(8, sys.byteorder) + target.to_bytes(4, sys.byteorder)
        call("landlock", libc.syscall(_ADD_RULE, fd, 1, rule, 0))
        os.close(target)
    call("landlock", libc.syscall(_RESTRICT_SELF, fd, 0))
    os.close(fd)


def seccomp(libc: ctypes.CDLL, program: bytes) -> None:
    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    rules = Filter(len(program) // 8, program)
    prctl(libc, _SET_SECCOMP, 2, ctypes.addressof(rules))


def lock_in(settings: dict) -> None:
    """Apply all restrictions, in an order in which none prevents a later or undoes an earlier one."""
    for which, value in settings["limits"]:
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    libc = ctypes.CDLL(None, use_errno=True)
    prctl(libc, _SET_NO_NEW_PRIVILEGES, 1)
    drop_capabilities(libc)
    prctl(libc, _SET_PARENT_DEATH_SIGNAL, 9)
    if os.getppid() != settings["parent"]:
        os._exit(CANNOT)  # it died before it could have taken this process with it
    if settings["landlock"]:
        landlock(libc, settings["landlock"], settings["folder"], settings["readable"])
    if settings["filter"]:
        seccomp(libc, settings["filter"])


def main() -> None:
    settings_fd, report_fd = int(sys.argv[1]), int(sys.argv[2])
    with open(settings_fd, "rb") as file:
        settings = marshal.load(file)
    if report_fd != REPORT:
        os.dup2(report_fd, REPORT)
        os.close(report_fd)
    try:
        lock_in(settings)
    except OSError as error:
        if not settings["allow_unconfined"]:
            os.write(2, str(error).encode())
            os._exit(CANNOT)
    sys.path += settings["packages"]
    sys.argv[:] = ["program.py"]
    program = settings.pop("program")
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    os.write(REPORT, b"ready\n")
    exec(compile(program, "program.py", "exec"), module.__dict__)


main()
