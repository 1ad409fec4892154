"""A SLURM of one node in a folder: ``sbatch``, ``srun`` and ``sacct`` as submitit calls them.

Jobs start at once. What they were asked for is in ``jobs/ID/script.sh``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def install(folder: Path) -> Path:
    """Write the three commands into a folder, which goes to the front of PATH."""
    folder.mkdir(parents=True)
    for name in ("sbatch", "srun", "sacct"):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} {folder} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def sbatch(folder: Path, script: str) -> None:
    number = str(1000 + len(list((folder / "jobs").glob("*"))))
    job = folder / "jobs" / number
    job.mkdir(parents=True)
    (job / "script.sh").write_text(Path(script).read_text())
    environment = {**os.environ, "SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "1"}
    environment |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = f"bash {job}/script.sh; touch {job}/ended"
    subprocess.Popen(["sh", "-c", command], env=environment, start_new_session=True, **quiet)
    print(f"Submitted batch job {number}")


def srun(arguments: list[str]) -> None:
    """Run the command after the options, of which those with a value are followed by it."""
    while arguments[0].startswith("--"):
        arguments = arguments[1 if arguments[0] == "--unbuffered" else 2 :]
    os.execvp(arguments[0], arguments)


def sacct(folder: Path) -> None:
    print("JobID|State|NodeList")
    for job in sorted((folder / "jobs").glob("*")):
        print(f"{job.name}|{'COMPLETED' if (job / 'ended').exists() else 'RUNNING'}|here")


if __name__ == "__main__":
    name, folder, *arguments = sys.argv[1:]
    if name == "sbatch":
        sbatch(Path(folder), *arguments)
    elif name == "srun":
        srun(arguments)
    else:
        sacct(Path(folder))
