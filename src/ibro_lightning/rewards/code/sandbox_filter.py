"""The sandbox's system-call filter: a seccomp BPF program with a list of allowed calls; all others are refused.

Allowed is what a single-threaded Python program needs for its own memory and files. Refused is everything that creates
processes or threads, opens sockets, sends signals, reaches into other processes, changes limits, owners or modes,
mounts, traces or loads, and every future system call. The numbers are those of Linux' ``unistd.h``.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable

# name: number on x86_64, number on aarch64 ("-": it does not exist there).
_ALLOWED = """
read 0 63 write 1 64 readv 19 65 writev 20 66 pread64 17 67 pwrite64 18 68 preadv 295 69 pwritev 296 70 lseek 8 62
close 3 57 close_range 436 436 dup 32 23 dup2 33 - dup3 292 24 pipe 22 - pipe2 293 59 sendfile 40 71
stat 4 - fstat 5 80 lstat 6 - newfstatat 262 79 statx 332 291 access 21 - faccessat 269 48 faccessat2 439 439
readlink 89 - readlinkat 267 78 getcwd 79 17 chdir 80 49 fchdir 81 50 getdents 78 - getdents64 217 61 statfs 137 43
fstatfs 138 44 umask 95 166 fsync 74 82 fdatasync 75 83 ftruncate 77 46 fadvise64 221 223 copy_file_range 326 285
mmap 9 222 mprotect 10 226 munmap 11 215 mremap 25 216 brk 12 214 madvise 28 233 msync 26 227 mincore 27 232
rt_sigaction 13 134 rt_sigprocmask 14 135 rt_sigreturn 15 139 rt_sigpending 127 136 rt_sigsuspend 130 133
rt_sigtimedwait 128 137 sigaltstack 131 132 pause 34 - alarm 37 - getitimer 36 102 setitimer 38 103 nanosleep 35 101
clock_nanosleep 230 115 restart_syscall 219 128 clock_gettime 228 113 clock_getres 229 114 gettimeofday 96 169
time 201 - times 100 153 futex 202 98 set_robust_list 273 99 rseq 334 293 membarrier 324 283 sched_yield 24 124
sched_getaffinity 204 123 getcpu 309 168 get_mempolicy 239 236 poll 7 - ppoll 271 73 select 23 - pselect6 270 72
getpid 39 172 getppid 110 173 gettid 186 178 getuid 102 174 geteuid 107 175 getgid 104 176 getegid 108 177
getresuid 118 148 getresgid 120 150 getgroups 115 158 getpgrp 111 - getpgid 121 155 getsid 124 156 uname 63 160
sysinfo 99 179 getrusage 98 165 getrlimit 97 163 getrandom 318 278 exit 60 93 exit_group 231 94
"""
_OPEN = "open 2 - openat 257 56"
_CHANGE_FOLDER = "unlink 87 - unlinkat 263 35 rename 82 - renameat 264 38 renameat2 316 276"
_FCNTL, _IOCTL, _PRLIMIT = "fcntl 72 25", "ioctl 16 29", "prlimit64 302 261"
_NEWEST = 470
"""Numbers from here on were unassigned at the time of writing: "no such call", so that the C library falls back."""

# All but those that send signals to a chosen owner (F_SETOWN, F_SETSIG), leases and notifications.
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 1030)
# Terminal or not, its size, bytes to read, close-on-exec, non-blocking.
_IOCTL_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451, 0x5421)
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | 0o20000000  # the last is O_TMPFILE's own bit

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; arguments are 64 bits, low half first
_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _ALLOW = 0x80000000, 0x7FFF0000
_REFUSE, _NO_SUCH_CALL = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, operand: ``struct sock_filter``."""


def seccomp_filter(machine: str, *, writable: bool) -> bytes | None:
    """The filter for a machine as ``os.uname`` names it, as an array of ``struct sock_filter``; None for other
    machines.

    Unless ``writable``, where Landlock restricts writing, no file may be opened for writing, removed or renamed.
    """
    if machine not in _ARCHITECTURES:
        return None
    column, architecture = _ARCHITECTURES[machine]
    program = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL)]
    program += [(_LOAD, 0, 0, _NUMBER)]
    for number in _numbers(_ALLOWED, column):
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    guarded = [(_FCNTL, _one_of(1, _FCNTL_COMMANDS)), (_IOCTL, _one_of(1, _IOCTL_COMMANDS)), (_PRLIMIT, _only_asks())]
    if writable:
        guarded += [(_OPEN, [(_RETURN, 0, 0, _ALLOW)]), (_CHANGE_FOLDER, [(_RETURN, 0, 0, _ALLOW)])]
    else:
        guarded += [("open 2 -", _no_bits(1, _TO_WRITE)), ("openat 257 56", _no_bits(2, _TO_WRITE))]
    for names, rule in guarded:
        for number in _numbers(names, column):
            program += [(_EQUAL, 0, len(rule), number), *rule]
    program += [(_ABOVE, 0, 1, _NEWEST), (_RETURN, 0, 0, _NO_SUCH_CALL), (_RETURN, 0, 0, _REFUSE)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _numbers(table: str, column: int) -> list[int]:
    words = table.split()
    return [int(number) for number in words[1 + column :: 3] if number != "-"]


def _argument(index: int, half: int = 0) -> Instruction:
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * index + 4 * half)


def _one_of(index: int, values: Iterable[int]) -> list[Instruction]:
    rule = [_argument(index)]
    for value in values:
        rule += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return [*rule, (_RETURN, 0, 0, _REFUSE)]


def _no_bits(index: int, bits: int) -> list[Instruction]:
    return [_argument(index), (_ANY_BIT, 0, 1, bits), (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]


def _only_asks() -> list[Instruction]:
    """``prlimit64(0, …, NULL, …)``: read its own limits only. Root could raise them, or lower those of others."""
    rule: list[Instruction] = []
    for argument in (_argument(0), _argument(2), _argument(2, half=1)):
        rule += [argument, (_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _REFUSE)]
    return [*rule, (_RETURN, 0, 0, _ALLOW)]
