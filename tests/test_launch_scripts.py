"""The scripts in ``launch/``, run for real on the CPU: the same training whoever starts its processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.processes import free_port

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = ["one_machine.sh", "torchrun.sh", "slurm.sbatch"]
SETTINGS = ["tiny.yaml", "--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false"]
# What srun does for a job of two nodes with one task each, both of which are here.
SRUN = r"""#!/usr/bin/env bash
set -u
[[ $1 == --kill-on-bad-exit=1 ]] || { echo "unexpected option $1" >&2; exit 64; }
shift
export SLURM_NTASKS=2 SLURM_NNODES=2 SLURM_JOB_NAME=ibro SLURM_NODELIST=127.0.0.1 SLURM_STEP_ID=0
pids=()
for node in 0 1; do
  SLURM_PROCID=$node SLURM_NODEID=$node SLURM_LOCALID=0 "$@" &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""


def environment(**others: str) -> dict[str, str]:
    """Without the variables of a launcher that may have started the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED"):
        kept.pop(name, None)
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    here = f"{Path.cwd()}{os.pathsep}{kept.get('PYTHONPATH', '')}"  # user_code.py, as any folder of a user
    return {**kept, "PATH": path, "PYTHONPATH": here, "OMP_NUM_THREADS": "1", **others}


def start(script: str, name: str, **variables: str) -> subprocess.Popen[str]:
    folder = ["--trainer.default_root_dir", name]
    command = ["bash", str(LAUNCH / script), *SETTINGS, *folder]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(**variables), **pipes)


def finish(*processes: subprocess.Popen[str]) -> str:
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=600)[0])
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n---\n".join(outputs)
    return "\n".join(outputs)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_understands_it(script: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_recipe_it_says_what_it_wants(script: str) -> None:
    result = subprocess.run(["bash", str(LAUNCH / script)], env=environment(), capture_output=True, text=True)
    assert result.returncode != 0
    assert "which recipe?" in result.stderr


def test_torchrun_needs_a_place_to_meet() -> None:
    result = subprocess.run(
        ["bash", str(LAUNCH / "torchrun.sh"), "tiny.yaml"], env=environment(NODES="2"), capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("RENDEZVOUS: ")


def test_the_readme_names_every_script() -> None:
    assert set(re.findall(r"launch/([\w.]+)", (LAUNCH / "README.md").read_text())) == set(SCRIPTS)


@pytest.mark.slow
def test_the_same_training_whoever_starts_its_processes(workspace: Path) -> None:
    """Two processes each: Lightning's own, two torchruns, and two tasks of srun. Bit for bit the same weights."""
    finish(start("one_machine.sh", "lightning", DEVICES="2"))
    expected = weights(workspace / "lightning")

    where = {"NODES": "2", "DEVICES": "1", "RENDEZVOUS": f"127.0.0.1:{free_port()}", "LOCAL_ADDR": "127.0.0.1"}
    finish(start("torchrun.sh", "torchrun", **where), start("torchrun.sh", "torchrun", **where))

    (workspace / "bin").mkdir()
    srun = workspace / "bin" / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "1"}
    path = f"{srun.parent}{os.pathsep}{environment()['PATH']}"
    finish(start("slurm.sbatch", "slurm", **job, PATH=path))

    for folder in ("torchrun", "slurm"):
        found = weights(workspace / folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), folder

    # What SLURM does when it starts the job once more: the run is over, and nothing begins anew.
    again = finish(start("slurm.sbatch", "slurm", **job, PATH=path))
    assert "starting from the beginning" not in again
    assert not list(workspace.glob("slurm.*"))
