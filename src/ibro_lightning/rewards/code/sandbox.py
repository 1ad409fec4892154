"""Runs untrusted Python in a locked-down process (Linux, without privileges, without dependencies).

Guarantees, whatever the program does:

- *No other processes, no network, no signals*: a seccomp filter refuses every system call that is not on a short list
  (:mod:`.sandbox_filter`): there are no forks, threads, sockets, kills, traces, mounts and new kernel features.
- *Files*: Landlock lets it read the interpreter's own folders and write its temporary folder, nothing else. On kernels
  without it (before Linux 6.2) it can write nothing, but read whatever this user can.
- *Limits*: address space, CPU seconds, file size and open files by rlimits; wall time, output and the folder's size by
  this process, which kills it. No capabilities, no environment, no descriptors but stdin, stdout, stderr and a report.
- It dies with the thread that started it (a killed one included), and leaves no zombie and no folder behind.

What bubblewrap (0.8) alone does not do: refuse forks, threads and new namespaces, limit memory, CPU, output and
files, run where user namespaces are forbidden (containers, hardened kernels); and it is a package to install.

Not guaranteed: it can see which paths exist and how large they are, it uses one core up to its CPU limit, files that it
deletes while open are not counted (at most ``open_files`` times ``file_mib``), and a kernel bug is a way out. asyncio,
threads, subprocesses and folders within the temporary folder do not work.
"""

from __future__ import annotations

import contextlib
import marshal
import math
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ibro_lightning.errors import ConfigError
from ibro_lightning.rewards.code.limits import DEFAULT_LIMITS, SandboxLimits
from ibro_lightning.rewards.code.sandbox_filter import seccomp_filter
from ibro_lightning.rewards.code.sandbox_host import (
    LANDLOCK_THAT_TRUNCATES,
    environment,
    folder_size,
    landlock_version,
    packages,
    readable,
    sealed,
    temporary_folder,
)

Status = Literal["ok", "error", "timeout", "memory", "output", "files", "killed"]
_CHILD = str(Path(__file__).with_name("sandbox_child.py"))
_READY = b"ready\n"
_CANNOT = 70
_TICK_S = 0.02


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended.

    ``status``: "ok" (exit code 0), "error" (another one), "timeout" (wall or CPU limit), "memory" (it ended in a
    MemoryError), "output" or "files" (killed for writing too much), "killed" (a signal, e.g. a segmentation fault).
    ``report`` is what it wrote to descriptor 3. The texts are cut at ``output_kib``. Exit code and texts are under the
    program's control.
    """

    status: Status
    returncode: int
    stdout: str
    stderr: str
    report: str
    seconds: float


def run_python(program: str, *, stdin: str = "", limits: SandboxLimits = DEFAULT_LIMITS) -> SandboxResult:
    """Run ``program`` as ``__main__`` of a fresh interpreter in the sandbox, and wait for its end. Raises
    :class:`ConfigError` if this system cannot lock programs in, unless ``limits.allow_unconfined``."""
    if sys.platform != "linux":
        raise ConfigError("platform", sys.platform, "the sandbox for programs needs Linux: leave out the code reward")
    with temporary_folder() as folder, contextlib.ExitStack() as descriptors:
        version = landlock_version()
        settings: dict[str, Any] = {
            "program": program,
            "parent": os.getpid(),
            "folder": folder,
            "limits": _rlimits(limits),
            "landlock": version,
            "readable": readable(limits.site_packages),
            "filter": _filter(version >= LANDLOCK_THAT_TRUNCATES, limits),
            "packages": packages() if limits.site_packages else [],
            "allow_unconfined": limits.allow_unconfined,
        }
        descriptors.callback(os.close, settings_fd := sealed(marshal.dumps(settings)))
        descriptors.callback(os.close, input_fd := sealed(stdin.encode("utf-8", "replace")))
        report, report_end = os.pipe()
        descriptors.callback(os.close, report)
        started = time.monotonic()
        try:
            process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-P", "-B", _CHILD, str(settings_fd), str(report_end)],
                stdin=input_fd,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=environment(folder),
                pass_fds=(settings_fd, report_end),
                start_new_session=True,
                bufsize=0,
            )
        finally:
            os.close(report_end)
        return _follow(process, report, limits, folder, started)


def _follow(
    process: subprocess.Popen[bytes], report: int, limits: SandboxLimits, folder: str, started: float
) -> SandboxResult:
    """Read the program's output until it ends or has to be stopped; leaves no process behind."""
    assert process.stdout is not None
    assert process.stderr is not None
    texts = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray(), report: bytearray()}
    with process.stdout, process.stderr, selectors.DefaultSelector() as selector:
        for fd in texts:
            selector.register(fd, selectors.EVENT_READ)
        try:
            stopped = _watch(process.pid, selector, texts, limits, folder, started)
        finally:  # also if this process is interrupted
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    cut = limits.output_kib * 1024
    stdout, stderr, reported = (bytes(text[:cut]).decode("utf-8", "replace") for text in texts.values())
    seconds = time.monotonic() - started
    if not reported.startswith(_READY.decode()):
        if process.returncode == _CANNOT or process.returncode == 1:  # before a line of the program ran
            reason = f"this system cannot lock a program in ({stderr.strip()[-300:] or 'no reason given'})"
            remedy = f"{reason}: use one with seccomp, or write true if you trust all programs"
            raise ConfigError("allow_unconfined", False, remedy)
        reported = ""
    status = stopped or _status(process.returncode, stderr, seconds >= math.ceil(limits.cpu_s))
    return SandboxResult(status, process.returncode, stdout, stderr, reported[len(_READY) :], seconds)


def _watch(
    pid: int,
    selector: selectors.BaseSelector,
    texts: dict[int, bytearray],
    limits: SandboxLimits,
    folder: str,
    started: float,
) -> Status | None:
    """Why the program has to be stopped; None once it has ended."""
    looked = started
    while True:
        now = time.monotonic()
        if now - started >= limits.wall_s:
            return "timeout"
        if now - looked >= _TICK_S:
            looked = now
            if folder_size(folder) > limits.folder_mib * 2**20:
                return "files"
        ended = _has_ended(pid)  # checked before reading, so that its last output is read
        wait = 0.0 if ended else min(_TICK_S, limits.wall_s - (now - started))
        if not selector.get_map():  # it has closed all three, so its end is near
            if ended:
                return None
            time.sleep(min(wait, 0.001))
            continue
        events = selector.select(wait)
        for key, _ in events:
            data = os.read(key.fd, 65536)
            texts[key.fd] += data
            if len(texts[key.fd]) > limits.output_kib * 1024:
                return "output"
            if not data:
                selector.unregister(key.fd)
        if ended and not events:
            return None


def _has_ended(pid: int) -> bool:
    """Whether a process has ended, without reaping it: its group can then still be killed by this number."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # this process ignores SIGCHLD: the kernel has reaped it
        return True


def _status(returncode: int, stderr: str, long_enough: bool) -> Status:
    if returncode == 0:
        return "ok"
    if returncode < 0:  # where soft and hard limit are equal, the kernel kills at the CPU limit
        return "timeout" if returncode == -signal.SIGKILL and long_enough else "killed"
    last = stderr.rstrip().rpartition("\n")[2]
    return "memory" if last.startswith("MemoryError") else "error"


def _rlimits(limits: SandboxLimits) -> list[tuple[int, int]]:
    mib = 2**20
    return [
        (resource.RLIMIT_AS, limits.memory_mib * mib),
        (resource.RLIMIT_CPU, math.ceil(limits.cpu_s)),
        (resource.RLIMIT_FSIZE, limits.file_mib * mib),
        (resource.RLIMIT_NOFILE, limits.open_files),
        *((which, 0) for which in (resource.RLIMIT_CORE, resource.RLIMIT_NPROC)),
        *((which, 0) for which in (resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE)),
    ]


def _filter(writable: bool, limits: SandboxLimits) -> bytes | None:
    machine = os.uname().machine
    program = seccomp_filter(machine, writable=writable) if sys.maxsize > 2**32 else None
    if program is None and not limits.allow_unconfined:
        remedy = "use x86_64 or aarch64, or write true if you trust all of them"
        raise ConfigError("allow_unconfined", False, f"programs cannot be locked in on {machine}: {remedy}")
    return program
