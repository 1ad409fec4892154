"""A study that is killed ends like one that is not: real runs, small ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from helpers.processes import HANGS_S

pytestmark = pytest.mark.slow

SMALL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 32}
CONTENT = {
    "name": "tiny",
    "recipe": "quickstart.yaml",
    "plan": {
        "question": "Does a study survive?",
        "metric": "val/number_path/avg@1",
        "comparisons": [["none", "ib"]],
        "answer": "The same table.",
        "chosen_by": "Nothing.",
        "difference_that_matters": 0.02,
    },
    "settings": {
        "trainer.max_epochs": 2,
        "trainer.check_val_every_n_epoch": 2,
        "data.prompts_per_rollout": 4,
        "data.group_size": 4,
        "data.dynamic_sampling": None,
        "model.mini_batch_prompts": 2,
        "data.eval_samples": 1,
        "checkpoint.every_n_iterations": 1,
    },
    "arms": {
        "none": {"settings": {"model.regularizer": None}},
        "ib": {},
        "naive": {"settings": {"model.regularizer": {"class_path": "EntropyBonus", "init_args": {"coef": 0.001}}}},
    },
    "seeds": [1, 2, 3, 4],
    "base_policy": {
        "recipe": "sft_quickstart.yaml",
        "settings": {
            "trainer.max_epochs": 1,
            "trainer.check_val_every_n_epoch": 10,
            "data.steps_per_epoch": 4,
            **{f"model.policy.init_args.{name}": size for name, size in SMALL.items()},
        },
    },
}


def study(folder: Path, **changes: object) -> list[str]:
    """The command that runs it in a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**CONTENT, **changes}, sort_keys=False))
    options = ["--output", str(folder), "--execution.at_once", "2"]
    return [sys.executable, "-m", "ibro_lightning", "study", "--config", str(folder / "tiny.yaml"), *options]


def start(command: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, start_new_session=True)


def finished(folder: Path) -> int:
    path = folder / "results/trials.parquet"
    return pq.read_table(path).num_rows if path.exists() else 0


def kill_everything(process: subprocess.Popen[bytes]) -> None:
    """As a lost machine does: the study, its jobs and their runs, all of its session."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_twelve_trials_killed_three_times_end_with_the_table_of_those_that_were_not(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(study(whole)).wait(HANGS_S) == 0
    for trials in (1, 4, 8):
        process = start(study(killed))
        while finished(killed) < trials:
            assert process.poll() is None
            time.sleep(0.05)
        if trials == 4:  # the command alone: its jobs go on, and the next command waits for them
            process.kill()
            process.wait()
        elif trials == 1:
            kill_everything(process)
        else:
            process.terminate()
            assert process.wait(HANGS_S) == 143
    assert start(study(killed)).wait(HANGS_S) == 0
    for name in ("results", "questions", "trials"):
        assert (killed / f"results/{name}.parquet").read_bytes() == (whole / f"results/{name}.parquet").read_bytes()
    table = pq.read_table(whole / "results/results.parquet")
    assert len(set(table["trial"].to_pylist())) == 12
    assert "val/number_path/avg@1" in table["metric"].to_pylist()
