"""The sandbox: programs run as they should, and none does harm, hangs its parent or leaves anything behind."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("the sandbox needs Linux", allow_module_level=True)

from helpers.leftovers import nothing_is_left  # noqa: F401  an autouse fixture
from ibro_lightning.errors import ConfigError
from ibro_lightning.rewards.code import sandbox, sandbox_host
from ibro_lightning.rewards.code.sandbox import SandboxLimits, run_python
from ibro_lightning.rewards.code.sandbox_filter import seccomp_filter

QUICK = SandboxLimits(wall_s=1.5, cpu_s=1, memory_mib=256)
HAS_LANDLOCK = sandbox.landlock_version() >= 3


# ---- what programs may do


def test_a_program_reads_stdin_prints_and_imports_the_standard_library() -> None:
    program = "import sys, math, json, re, collections, heapq\nprint(json.dumps(sorted(sys.stdin.read())), 'ä')"
    result = run_python(program, stdin="ba\u00e9")
    assert (result.status, result.returncode, result.stderr, result.report) == ("ok", 0, "", "")
    assert result.stdout == '["a", "b", "\\u00e9"] ä\n'


def test_a_program_is_main_and_alone() -> None:
    program = (
        "import os, sys\nclass A: pass\n"
        "print(__name__, A.__module__, sys.modules['__main__'].A is A, sys.argv, os.getcwd() == os.environ['HOME'])\n"
        "print(sorted({*os.environ} - {'LC_CTYPE'}), os.listdir('.'))"
    )
    names = [
        "HOME",
        "MKL_NUM_THREADS",
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "PYTHONHASHSEED",
        "PYTHONUTF8",
        "TMPDIR",
    ]
    own = sorted({*names, *(name for name in ("LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ)})
    assert run_python(program).stdout == f"__main__ __main__ True ['program.py'] True\n{own} []\n"


def test_exit_codes_tracebacks_and_reports() -> None:
    result = run_python("import os, sys\nos.write(3, b'told')\nprint('out')\nsys.exit(3)")
    assert (result.status, result.returncode, result.stdout, result.report) == ("error", 3, "out\n", "told")
    result = run_python("1 / 0")
    assert (result.status, result.returncode) == ("error", 1)
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")
    for broken in ("(", "a\0b", "\ud800", "(" * 5000):
        assert run_python(broken).status == "error"


def test_sets_have_the_same_order_every_time() -> None:
    program = "print(list({str(n) for n in range(50)}))"
    assert run_python(program).stdout == run_python(program).stdout


@pytest.mark.skipif(not HAS_LANDLOCK, reason="this kernel has no Landlock: programs cannot write files")
def test_a_program_can_use_files_in_its_folder() -> None:
    program = (
        "import os, tempfile\nopen('a', 'w').write('x' * 10)\nos.rename('a', 'b')\n"
        "with tempfile.TemporaryFile() as file: file.write(b'y')\n"
        "print(os.listdir('.'), open('b').read())\nos.remove('b')"
    )
    assert run_python(program).stdout == "['b'] xxxxxxxxxx\n"


def test_installed_packages_are_there_only_if_asked_for() -> None:
    program = "import numpy\nprint(numpy.ones((30, 30)).dot(numpy.ones(30))[0])"
    assert "ModuleNotFoundError" in run_python(program).stderr
    assert run_python(program, limits=SandboxLimits(site_packages=True)).stdout == "30.0\n"


# ---- what programs may not do

HOSTILE = {
    "infinite loop": ("while True: pass", {"timeout"}),
    "sleeps": ("import time; time.sleep(99)", {"timeout"}),
    "ignores signals": (
        "import signal\nfor n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n"
        "  except (OSError, ValueError): pass\nwhile True: pass",
        {"timeout"},
    ),
    "closes its files": ("import os; os.closerange(0, 99)\nwhile True: pass", {"timeout"}),
    "closes its output and sleeps": ("import os, time; os.closerange(0, 99); time.sleep(99)", {"timeout"}),
    "fork bomb": ("import os\nwhile True: os.fork()", {"error"}),
    "patient fork bomb": (
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
        {"timeout"},
    ),
    "vfork and posix_spawn": ("import os, sys; os.posix_spawn(sys.executable, ['python', '-c', '1'], {})", {"error"}),
    "exec": ("import os; os.execv('/bin/sh', ['sh', '-c', 'echo hello'])", {"error"}),
    "subprocess": ("import subprocess; subprocess.run(['/bin/true'])", {"error"}),
    "os.system": ("import os, sys; sys.exit(os.system('/bin/true') != 0)", {"error"}),
    "multiprocessing": ("import multiprocessing as m; m.Process(target=print).start()", {"error"}),
    "threads": ("import threading\nwhile True: threading.Thread(target=input).start()", {"error"}),
    "memory bomb": ("x = [bytearray(2 ** 20) for _ in range(10 ** 9)]", {"memory"}),
    "memory in one piece": ("x = 'x' * 10 ** 11", {"memory"}),
    "doubling": ("x = [0]\nwhile True: x += x", {"memory"}),
    "shared memory": ("import mmap; x = [mmap.mmap(-1, 2 ** 26) for _ in range(99)]", {"error", "memory"}),
    "memory outside": ("import os\nwhile True: os.write(os.memfd_create('x'), b'x' * 2 ** 20)", {"error"}),
    "output bomb": ("while True: print('x' * 99)", {"output"}),
    "raw output bomb": ("import os\nwhile True: os.write(1, b'x' * 9999)", {"output"}),
    "error bomb": ("import sys\nwhile True: sys.stderr.write('x' * 99)", {"output"}),
    "report bomb": ("import os\nwhile True: os.write(3, b'x' * 99)", {"output"}),
    "a large file": ("f = open('f', 'wb')\nwhile True: f.write(b'x' * 2 ** 20)", {"error"}),
    "file bomb": (
        "n = 0\nwhile True:\n  n += 1\n  with open(str(n), 'wb') as f: f.write(b'x' * 2 ** 22)",
        {"files", "error"},
    ),
    "many files": ("n = 0\nwhile True:\n  n += 1\n  open(str(n), 'w').close()", {"files", "error"}),
    "folder bomb": ("import os\nwhile True:\n  os.mkdir('d'); os.chdir('d')", {"error"}),
    "deep recursion": ("def f(): return f()\nf()", {"error"}),
    "recursion without a limit": (
        "import sys; sys.setrecursionlimit(10 ** 9)\nclass A:\n  def __add__(s, o): return s + o\nA() + 1",
        {"killed", "memory", "timeout"},
    ),
    "segmentation fault": ("import ctypes; ctypes.string_at(0)", {"killed"}),
    "abort": ("import os; os.abort()", {"killed"}),
    "giant power": ("print(9 ** 9 ** 9)", {"timeout", "memory"}),
    "kills its parent": ("import os; os.kill(os.getppid(), 9)", {"error"}),
    "kills everything": ("import os; os.kill(-1, 9)", {"error"}),
    "kills its group": ("import os; os.killpg(0, 9)", {"error"}),
    "signals by a file's owner": (
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 10, 9)\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())",
        {"error"},
    ),
    "limits of its parent": (
        "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (5, 5))",
        {"error"},
    ),
    "its own limits": ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))", {"error"}),
    "a survivor of its parent": (
        "import ctypes, sys; sys.exit(ctypes.CDLL(None, use_errno=True).prctl(1, 0, 0, 0, 0) != 0)",
        {"error"},
    ),
    "traces its parent": (
        "import ctypes, os, sys; sys.exit(ctypes.CDLL(None).ptrace(16, os.getppid(), None, None) != 0)",
        {"error"},
    ),
    "modes": ("import os; os.chmod('/', 0o777)", {"error"}),
    "owners": ("import os; os.chown('/', 0, 0)", {"error"}),
    "another root": ("import os; os.chroot('.')", {"error"}),
    "another user": ("import os; os.setuid(65534)", {"error"}),
    "priority of its parent": ("import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)", {"error"}),
    "another affinity": ("import os; os.sched_setaffinity(os.getppid(), {0})", {"error"}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_stopped(name: str) -> None:
    program, statuses = HOSTILE[name]
    started = time.monotonic()
    result = run_python(program, limits=QUICK)
    assert result.status in statuses, result
    assert time.monotonic() - started < QUICK.wall_s + 1.0
    assert max(len(result.stdout), len(result.stderr), len(result.report)) <= 64 * 1024


def test_sockets_reach_nobody(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as local:
        server.settimeout(0.2)
        local.settimeout(0.2)
        local.bind(str(tmp_path / "socket"))
        port = server.getsockname()[1]
        attempts = [
            f"socket.create_connection(('127.0.0.1', {port}), 1)",
            f"socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', {str(tmp_path / 'socket')!r})",
            f"socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', {str(tmp_path / 'socket')!r})",
            "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
            f"urllib.request.urlopen('http://127.0.0.1:{port}')",
        ]
        lines = "\n".join(f"try: {line}; print('through')\nexcept OSError: print('refused')" for line in attempts)
        assert run_python(f"import socket, urllib.request\n{lines}").stdout == "refused\n" * 5
        with pytest.raises(TimeoutError):
            server.accept()
        with pytest.raises(TimeoutError):
            local.recv(1)


@pytest.mark.skipif(not HAS_LANDLOCK, reason="this kernel has no Landlock")
def test_files_of_the_user_can_be_neither_read_nor_changed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("the answer is 42")
    (tmp_path / "link").symlink_to(secret)
    attempts = [
        *(
            f"open({str(path)!r}).read()"
            for path in (secret, tmp_path / "link", "/etc/passwd", "/proc/self/environ", __file__)
        ),
        *(f"open({str(secret)!r}, {mode!r})" for mode in ("w", "a", "r+")),
        f"os.open({str(secret)!r}, os.O_RDONLY | os.O_TRUNC)",
        f"os.truncate({str(secret)!r}, 0)",
        *(f"os.{name}({str(secret)!r})" for name in ("remove", "rmdir", "mkfifo", "listdir")),
        f"os.rename({str(secret)!r}, 'mine')",
        f"os.link({str(secret)!r}, 'mine')",
        f"os.utime({str(secret)!r})",
        f"os.chmod({str(secret)!r}, 0)",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"os.listdir({str(tmp_path)!r})",
        "os.listdir('/proc')",
        "os.listdir('..')",
        "open('/proc/%d/mem' % os.getppid(), 'rb')",
        "open('/dev/tty', 'w')",
        "os.symlink('/', 'mine')",
    ]
    lines = "\n".join(f"try: {line}; print({line!r})\nexcept OSError: pass" for line in attempts)
    result = run_python(f"import os\n{lines}")
    assert (result.status, result.stdout) == ("ok", "")
    assert secret.read_text() == "the answer is 42"
    assert not (tmp_path / "new").exists()


def test_without_landlock_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "landlock_version", lambda: 0)
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    attempts = [f"open({str(mine)!r}, {mode!r})" for mode in ("w", "a", "r+", "x")]
    attempts += [f"os.remove({str(mine)!r})", f"os.rename({str(mine)!r}, 'x')", f"os.truncate({str(mine)!r}, 0)"]
    attempts += ["open('own', 'w')", "os.mkdir('own')", f"os.open({str(mine)!r}, os.O_RDONLY | os.O_TRUNC)"]
    attempts += ["os.open('.', os.O_TMPFILE | os.O_RDWR)"]
    lines = "\n".join(f"try: {line}; print({line!r})\nexcept OSError: pass" for line in attempts)
    result = run_python(f"import os, json\n{lines}\nprint(json.dumps(open({str(mine)!r}).read()))")
    assert (result.status, result.stdout) == ("ok", '"mine"\n')
    assert mine.read_text() == "mine"


def test_calls_that_the_kernel_does_not_have_yet_are_unknown() -> None:
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "print([libc.syscall(number, 0, 0, 0, 0, 0) for number in (9999, 2 ** 30 + 39)], ctypes.get_errno())"
    )
    assert run_python(program).stdout == f"[-1, -1] {errno.ENOSYS}\n"  # the second is x32's getpid


def test_the_kernel_confirms_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "landlock_version", lambda: 0)  # so that it can be asked
    status = dict(
        line.split(":", 1) for line in run_python("print(open('/proc/self/status').read())").stdout.split("\n")[:-2]
    )
    keys = ("CapPrm", "CapEff", "CapInh", "NoNewPrivs", "Seccomp", "Seccomp_filters")
    assert [int(status[key], 16) for key in keys] == [0, 0, 0, 1, 2, 1]
    assert int(status["Threads"]) == 1


# ---- the filter, by a small interpreter of its language


def filtered(program: bytes, machine: int, number: int, *arguments: int) -> str:
    data = struct.pack("=IIQ6Q", number, machine, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    rules, accumulator, place = list(struct.iter_unpack("=HBBI", program)), 0, 0
    while True:
        code, if_true, if_false, operand = rules[place]
        place += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, operand)
        elif code == 0x06:
            return {0x80000000: "kill", 0x7FFF0000: "allow", 0x50001: "refuse", 0x50026: "unknown"}[operand]
        else:
            holds = {0x15: accumulator == operand, 0x35: accumulator >= operand, 0x45: bool(accumulator & operand)}[
                code
            ]
            place += if_true if holds else if_false


X86, ARM = 0xC000003E, 0xC00000B7
REFUSED = {  # from unistd.h: x86_64, aarch64
    "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221), "execveat": (322, 281), "socket": (41, 198),
    "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "sendto": (44, 206), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "mount": (165, 40),
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "keyctl": (250, 219), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "chroot": (161, 51), "pivot_root": (155, 41), "io_uring_setup": (425, 425),
    "prctl": (157, 167), "seccomp": (317, 277), "setuid": (105, 146), "fchmod": (91, 52), "fchmodat": (268, 53),
    "truncate": (76, 45), "mkdirat": (258, 34), "symlinkat": (266, 36), "linkat": (265, 37), "memfd_create": (319, 279),
    "shmget": (29, 194), "setrlimit": (160, 164), "mknodat": (259, 33), "utimensat": (280, 88), "openat2": (437, 437),
}  # fmt: skip


@pytest.mark.parametrize(("machine", "column", "number"), [("x86_64", 0, X86), ("aarch64", 1, ARM)])
def test_the_filter_on_both_machines(machine: str, column: int, number: int) -> None:
    program = seccomp_filter(machine, writable=True)
    assert program is not None
    assert {
        name for name, numbers in REFUSED.items() if filtered(program, number, numbers[column]) != "refuse"
    } == set()
    read, fcntl_, ioctl, prlimit, openat = [(0, 63), (72, 25), (16, 29), (302, 261), (257, 56)]
    assert filtered(program, number, read[column]) == "allow"
    assert filtered(program, ARM + X86 - number, read[column]) == "kill"  # the other machine's, in 32 bits, …
    assert filtered(program, 0x40000003, read[column]) == "kill"
    assert filtered(program, number, 9999) == filtered(program, number, 0x40000000 + read[column]) == "unknown"
    assert [filtered(program, number, fcntl_[column], 1, command) for command in (3, 8, 10, 15)] == [
        "allow",
        *["refuse"] * 3,
    ]
    assert [filtered(program, number, ioctl[column], 1, command) for command in (0x5401, 0x5412)] == ["allow", "refuse"]
    ask = [(0, 7, 0, 99), (1, 7, 0, 99), (0, 7, 99, 0), (0, 7, 2**40, 0)]
    assert [filtered(program, number, prlimit[column], *a) for a in ask] == ["allow", *["refuse"] * 3]
    strict = seccomp_filter(machine, writable=False)
    assert strict is not None
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_TMPFILE):
        assert filtered(program, number, openat[column], 0, 0, flags) == "allow"
        assert filtered(strict, number, openat[column], 0, 0, flags) == "refuse"
    assert filtered(strict, number, openat[column], 0, 0, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY) == "allow"
    assert len(program) // 8 < 4096  # the kernel's limit


@pytest.mark.skipif(not Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h").exists(), reason="no kernel headers")
def test_the_numbers_are_the_kernels() -> None:
    from ibro_lightning.rewards.code import sandbox_filter as tables

    words = " ".join(
        (tables._ALLOWED, tables._OPEN, tables._CHANGE_FOLDER, tables._FCNTL, tables._IOCTL, tables._PRLIMIT)
    ).split()
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h").read_text().split("\n")
    kernel = {
        line.split()[1].removeprefix("__NR_"): line.split()[2] for line in header if line.startswith("#define __NR_")
    }
    assert dict(zip(words[::3], words[1::3], strict=True)) == {name: kernel[name] for name in words[::3]}


# ---- the parent's side


def test_it_works_in_threads_side_by_side_and_with_sigint_ignored() -> None:
    results = {}

    def run(number: int) -> None:
        results[number] = run_python(f"print(int(input()) * {number})", stdin="7").stdout

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert results == {number: f"{7 * number}\n" for number in range(6)}


def test_the_program_dies_with_its_parent_and_the_folder_is_removed_later(tmp_path: Path) -> None:
    folder = Path(tempfile.gettempdir())
    code = (
        "from ibro_lightning.rewards.code.sandbox import run_python\n"
        'run_python(\'import time\\nopen("here", "w").close()\\ntime.sleep(60)\')'
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(folder)})
    until = time.monotonic() + 20
    while not list(folder.glob("ibro-sandbox-*/here" if HAS_LANDLOCK else "ibro-sandbox-*")):
        assert time.monotonic() < until
        time.sleep(0.01)
    (child,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    (left,) = folder.iterdir()
    os.utime(left, (0, 0))  # as if it were old
    sandbox_host.sweep()
    assert left.exists()  # its owner lives
    parent.kill()
    parent.wait()
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < until
        time.sleep(0.01)
    sandbox_host.sweep()
    assert not left.exists()


def test_a_young_folder_is_not_swept() -> None:
    folder = Path(tempfile.mkdtemp(prefix=sandbox_host.PREFIX))
    sandbox_host.sweep()
    assert folder.exists()
    folder.rmdir()


def test_a_system_that_cannot_lock_in_is_refused_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "seccomp_filter", lambda machine, writable: None)
    with pytest.raises(ConfigError, match="allow_unconfined"):
        run_python("print(1)")
    assert run_python("print(1)", limits=SandboxLimits(allow_unconfined=True)).stdout == "1\n"


def test_a_filter_that_the_kernel_refuses_is_no_silent_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "seccomp_filter", lambda machine, writable: b"\xff" * 8)
    with pytest.raises(ConfigError, match=r"allow_unconfined: False - this system cannot lock a program in \(.*prctl"):
        run_python("print(1)")
    assert run_python("print(1)", limits=SandboxLimits(allow_unconfined=True)).stdout == "1\n"


def test_a_program_cannot_pass_for_a_system_that_cannot_lock_in() -> None:
    result = run_python("import os; os.write(2, b'seccomp'); os._exit(70)")
    assert (result.status, result.returncode) == ("error", 70)


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="darwin"):
        run_python("print(1)")


@pytest.mark.parametrize(
    "setting", [{"wall_s": 0}, {"cpu_s": float("nan")}, {"memory_mib": 10}, {"output_kib": 0}, {"open_files": 3}]
)
def test_wrong_limits(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(setting))}: "):
        SandboxLimits(**setting)
