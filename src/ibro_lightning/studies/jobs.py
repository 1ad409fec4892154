"""Sends jobs to this machine or to SLURM, by submitit, and says what became of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from submitit import AutoExecutor, Executor, Job, LocalExecutor, SlurmJob

from ibro_lightning.errors import ConfigError, check_count
from ibro_lightning.guards.disk import write_json
from ibro_lightning.guards.machine import cores
from ibro_lightning.studies.job import Outcome, TrialJob
from ibro_lightning.studies.study_file import Trial

FOREVER_MIN = 60 * 24 * 365
"""Minutes that a local job may take: submitit's default is two."""
TIMEOUTS = 1000
"""How often a job may run out of its time on SLURM and be queued again; submitit's default is 3."""
SHARED = ("timeout_min", "mem_gb", "nodes", "tasks_per_node")
"""Parameters that submitit names without ``slurm_``."""


@dataclass(frozen=True)
class Execution:
    """Where trials run.

    Args:
        executor: ``local``: processes on this machine; ``slurm``: one SLURM job per trial.
        at_once: trials at the same time; None: as many as this machine has cores for; with SLURM, all.
        threads: CPU threads of each trial.
        gpus: GPUs of each trial; 0: it sees none. Local trials share out those of CUDA_VISIBLE_DEVICES, or else the
            machine's first.
        slurm: parameters of submitit's SLURM executor, e.g. ``{partition: gpu, timeout_min: 720, mem_gb: 64}``.
    """

    executor: Literal["local", "slurm"] = "local"
    at_once: int | None = None
    threads: int = 1
    gpus: int = 0
    slurm: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_count("threads", self.threads, 1)
        check_count("gpus", self.gpus, 0)
        if self.at_once is not None:
            check_count("at_once", self.at_once, 1)
        elif self.gpus and self.executor == "local":
            raise ConfigError("at_once", None, "write how many trials share this machine's GPUs at a time")
        if self.executor == "local" and self.gpus * (self.at_once or 0) > (there := len(visible_gpus())):
            remedy = f"CUDA_VISIBLE_DEVICES names {there}: write fewer trials at_once, or fewer gpus"
            raise ConfigError("gpus", self.gpus, remedy)
        if self.executor == "slurm" and shutil.which("sbatch") is None:
            raise ConfigError("executor", "slurm", "there is no sbatch here: start the study on a login node")
        if self.slurm and self.executor != "slurm":
            raise ConfigError("slurm", self.slurm, "these are for SLURM: write executor: slurm, too")

    def limit(self, trials: int) -> int:
        """Trials at the same time, of so many in all."""
        if self.at_once is not None:
            return self.at_once
        return trials if self.executor == "slurm" else max(1, cores() // self.threads)


class Jobs:
    """The jobs of a study.

    Args:
        folder: submitit's files: what it sends, and what jobs print besides their trials' logs. On a cluster it must be
            on a disk that all machines share.
    """

    def __init__(self, execution: Execution, folder: Path) -> None:
        self.execution, self.folder = execution, folder
        if execution.executor == "local":
            self.executor: Executor = LocalExecutor(folder)
        else:
            self.executor = AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=TIMEOUTS)
        self.running: dict[str, Job[Outcome]] = {}
        self._queued = self._find_queued()
        self._slots: dict[str, int] = {}

    def submit(self, job: TrialJob) -> None:
        """Start a job, unless an earlier study command has queued it on SLURM and it is still there."""
        name = job.trial.name
        if (queued := self._queued.pop(_label(job.trial), None)) is not None:
            self.running[name] = queued
            return
        self._slots[name] = min(set(range(len(self._slots) + 1)) - set(self._slots.values()))
        self._prepare(name)
        with _without_ctrl_c():
            self.running[name] = self.executor.submit(job)
        if self.execution.executor == "slurm":
            write_json(self._ids, {**self._read_ids(), _label(job.trial): self.running[name].job_id})

    def finished(self) -> dict[str, Outcome]:
        """The jobs that have ended since the last call, and how."""
        done = {name: job for name, job in self.running.items() if job.done()}
        for name in done:
            del self.running[name]
            self._slots.pop(name, None)
        return {name: outcome_of(job) for name, job in done.items()}

    def _prepare(self, name: str) -> None:
        """Set what the next job needs."""
        execution = self.execution
        if execution.executor == "local":  # by AutoExecutor, GPUs could not be chosen
            first = self._slots[name] * execution.gpus
            gpus = visible_gpus()[first : first + execution.gpus]
            self.executor.update_parameters(timeout_min=FOREVER_MIN, visible_gpus=gpus, gpus_per_node=len(gpus))
        else:
            own = {key if key in SHARED else f"slurm_{key}": value for key, value in execution.slurm.items()}
            needs: dict[str, Any] = {"name": name.replace("/", "-"), "cpus_per_task": execution.threads}
            needs |= {"gpus_per_node": execution.gpus} if execution.gpus else {}
            self.executor.update_parameters(**{**needs, **own})

    @property
    def _ids(self) -> Path:
        return self.folder / "slurm_jobs.json"

    def _read_ids(self) -> dict[str, str]:
        return json.loads(self._ids.read_text()) if self._ids.exists() else {}

    def _find_queued(self) -> dict[str, Job[Outcome]]:
        """What an earlier study command has sent to SLURM and is still there."""
        if self.execution.executor != "slurm":
            return {}
        jobs = {label: SlurmJob[Outcome](self.folder, job_id) for label, job_id in self._read_ids().items()}
        return {label: job for label, job in jobs.items() if not job.done(force_check=True)}


def outcome_of(job: Job[Outcome]) -> Outcome:
    """How a job that is done has ended. One that left no result was killed: it is tried again."""
    if not job.paths.result_pickle.exists():  # submitit would wait for it
        return Outcome("failed", f"its job left no result: was it killed? See {job.paths.stderr}")
    error = job.exception()
    if error is None:
        return job.result()
    return Outcome("failed", f"its job ended with an error; the last line: {str(error).strip().splitlines()[-1]}")


def _label(trial: Trial) -> str:
    """A trial, and its settings."""
    return f"{trial.name} {trial.digest}"


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Context in which processes are started that ignore Ctrl-C, which a terminal sends to all of them: submitit would
    kill its jobs after a second. The runs themselves handle it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def visible_gpus() -> list[int]:
    """The GPUs that trials may use, by number."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return list(range(64))  # as many as any machine has
    return [int(number) for number in named.split(",") if number.strip().isdecimal()]
