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
SCRIPTS = ["one_machine.sh", "torchrun.sh", "slurm.sbatch", "slurm_server.sbatch"]
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


# srun for the script with a server: the server's step is a port of this machine, the training's writes what it got.
SRUN_WITH_SERVER = r"""#!/usr/bin/env bash
printf '%s\n' "$@" > "srun.${1#--}.txt"
[[ $1 == --nodes ]] || { printf '%s\n' "$SLURM_JOB_NUM_NODES" > trained.txt; exit "$TRAINING_ENDS_WITH"; }
exec python -c 'import signal, socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(open("stopped.txt", "w").close()))
signal.pause()' "$PORT"
"""


@pytest.mark.parametrize("code", [0, 7])
def test_the_last_node_of_a_job_may_serve_while_the_others_train(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    nodes = ["a1", "a2", "127.0.0.1"]
    for name, text in (("srun", SRUN_WITH_SERVER), ("scontrol", "#!/bin/sh\nprintf '%s\\n' " + " ".join(nodes))):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_NUM_NODES": "3", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NODELIST": "a[1-2],127.0.0.1"}
    path = f"{tmp_path / 'bin'}{os.pathsep}{environment()['PATH']}"
    command = ["bash", str(LAUNCH / "slurm_server.sbatch"), "dapo_ib_32b.yaml", "--data.group_size", "8"]
    port = str(free_port())
    variables = environment(**job, PATH=path, PORT=port, IBRO_POLICY="models/32b", TRAINING_ENDS_WITH=str(code))
    assert subprocess.run(command, env=variables, timeout=60).returncode == code
    assert (tmp_path / "stopped.txt").exists(), "the server ends with the training"

    serving = (tmp_path / "srun.nodes.txt").read_text().split("\n")
    assert serving[serving.index("--nodelist") + 1] == "127.0.0.1"
    assert serving[serving.index("serve") + 1] == "models/32b"
    assert serving[serving.index("--tensor-parallel-size") + 1] == "8"
    assert {"VLLM_SERVER_DEV_MODE=1", "processed_logprobs", "--skip-tokenizer-init"} <= set(serving)

    training = (tmp_path / "srun.kill-on-bad-exit=1.txt").read_text().split("\n")
    assert training[training.index("--nodelist") + 1] == "a1,a2"
    assert training[training.index("--ntasks") + 1] == "16"
    assert "SLURM_NNODES=2" in training
    settings = training[training.index("fit") :]
    assert settings[:3] == ["fit", "--config", "dapo_ib_32b.yaml"]
    assert settings[settings.index("--trainer.num_nodes") + 1] == "2"
    assert settings[settings.index("--data.engine.url") + 1] == f"http://127.0.0.1:{port}"
    assert settings[settings.index("--data.engine.weights_dir") + 1] == str(tmp_path / "weights")
    assert settings[-3:] == ["--data.group_size", "8", ""]


def test_a_server_that_ends_ends_the_job_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", "#!/bin/sh\nexit 3"), ("scontrol", "#!/bin/sh\nprintf 'a1\\n127.0.0.1\\n'")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NODELIST": "a1,127.0.0.1"}
    path = f"{tmp_path / 'bin'}{os.pathsep}{environment()['PATH']}"
    command = ["bash", str(LAUNCH / "slurm_server.sbatch"), "dapo_ib_32b.yaml"]
    variables = environment(**job, PATH=path, PORT=str(free_port()))
    ended = subprocess.run(command, env=variables, timeout=60, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "the vLLM server on 127.0.0.1 ended" in ended.stderr


def test_a_server_needs_a_node_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["bash", str(LAUNCH / "slurm_server.sbatch"), "dapo_ib_32b.yaml"]
    variables = environment(SLURM_JOB_NUM_NODES="1", SLURM_NTASKS_PER_NODE="8")
    ended = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("--nodes: 1 - write at least 2")


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
