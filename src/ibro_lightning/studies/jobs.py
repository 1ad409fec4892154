"""Sends jobs to this machine or to SLURM, by submitit, and says what became of them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from submitit import AutoExecutor, Job, LocalExecutor, SlurmJob

from ibro_lightning.errors import ConfigError, check_count
from ibro_lightning.guards.disk import write_json
from ibro_lightning.studies.job import Outcome, TrialJob

FOREVER_MIN = 60 * 24 * 365
"""Minutes that a local job may take: submitit's default is two."""
SHARED = ("timeout_min", "mem_gb", "nodes", "tasks_per_node")
"""Parameters that submitit names without ``slurm_``."""


@dataclass(frozen=True)
class Execution:
    """Where trials run.

    Args:
        executor: ``local``: processes on this machine; ``slurm``: one SLURM job per trial.
        at_once: trials at the same time; None: as many as this machine has cores for; with SLURM, all.
        threads: CPU threads of each trial.
        gpus: GPUs of each trial; local trials share out the machine's in their order.
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
        local = execution.executor == "local"
        self.executor = LocalExecutor(folder) if local else AutoExecutor(folder, cluster="slurm")
        self.running: dict[str, Job[Outcome]] = {}
        self._slots: dict[str, int] = {}

    def submit(self, job: TrialJob) -> None:
        """Start a job, unless an earlier study command has queued it on SLURM and it is still there."""
        name = job.trial.name
        if (queued := self._queued().get(name)) is not None:
            self.running[name] = queued
            return
        self._slots[name] = min(set(range(len(self._slots) + 1)) - set(self._slots.values()))
        self._prepare(name)
        self.running[name] = self.executor.submit(job)
        if self.execution.executor == "slurm":
            write_json(self._ids, {**self._read_ids(), name: self.running[name].job_id})

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
            gpus = range(first, first + execution.gpus)
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

    def _queued(self) -> dict[str, Job[Outcome]]:
        if self.execution.executor != "slurm":
            return {}
        jobs = {name: SlurmJob[Outcome](self.folder, job_id) for name, job_id in self._read_ids().items()}
        return {name: job for name, job in jobs.items() if name not in self.running and not job.done(force_check=True)}


def outcome_of(job: Job[Outcome]) -> Outcome:
    """How a job that is done has ended. One that left no result was killed: it is tried again."""
    error = job.exception()
    if error is None:
        return job.result()
    return Outcome("failed", str(error).strip().splitlines()[-1])


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
