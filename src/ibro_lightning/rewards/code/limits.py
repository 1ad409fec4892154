"""The limits of a program in the sandbox."""

from __future__ import annotations

from dataclasses import dataclass

from ibro_lightning.errors import check_at_least, check_count


@dataclass(frozen=True)
class SandboxLimits:
    """The resources that a program may use.

    Args:
        wall_s: seconds from start to end.
        cpu_s: seconds of CPU time, rounded up to whole ones.
        memory_mib: address space; the interpreter itself takes about 30.
        output_kib: output to each of stdout, stderr and its report, beyond which it is killed.
        file_mib: largest file in its temporary folder.
        folder_mib: all files there in total, measured 50 times a second.
        open_files: descriptors at a time.
        site_packages: let it import (and read) the packages installed with this project, such as numpy.
        allow_unconfined: run programs even where the kernel cannot lock them in. Only for trusted programs.
    """

    wall_s: float = 10.0
    cpu_s: float = 8.0
    memory_mib: int = 512
    output_kib: int = 64
    file_mib: int = 8
    folder_mib: int = 64
    open_files: int = 32
    site_packages: bool = False
    allow_unconfined: bool = False

    def __post_init__(self) -> None:
        check_at_least("wall_s", self.wall_s, 0.1)
        check_at_least("cpu_s", self.cpu_s, 0.1)
        check_count("memory_mib", self.memory_mib, 64, ": the interpreter needs about half of this")
        check_count("output_kib", self.output_kib, 1)
        check_count("file_mib", self.file_mib, 0)
        check_count("folder_mib", self.folder_mib, 0)
        check_count("open_files", self.open_files, 16)


DEFAULT_LIMITS = SandboxLimits()
CHECK_S = 1.0
"""The least seconds for comparing values, however little time the program has left."""
