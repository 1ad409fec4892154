"""One trial as a job: training, evaluations at other temperatures, and its rows of the results.

A job may be started again at any time, also while an earlier one of the same trial is still running on this or
another machine: it waits for that one, and then does what is left.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from subprocess import STDOUT, Popen, TimeoutExpired
from typing import Any, Literal

import yaml
from filelock import FileLock
from submitit.helpers import DelayedSubmission

from ibro_lightning.guards.disk import write_json
from ibro_lightning.guards.signals import end_with, ended
from ibro_lightning.studies.gather import gather, is_stored, set_at_temperature, temperature_folder
from ibro_lightning.studies.study_file import Study, Trial

STOPPED = (129, 130, 138, 143)
"""Exit codes of a command that was asked to stop (docs/endings.md)."""
PROGRAM = (sys.executable, "-m", "ibro_lightning")
POLL_S = 0.5
STOP = ".stop"
"""A file in the study's folder that asks all jobs to stop, on whatever machine they run."""


class TrialFailed(RuntimeError):
    """A command of the trial ended with an error: the last line that it printed."""


class TrialStopped(RuntimeError):
    """The trial was asked to stop. It resumes when the study does."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    state: Literal["finished", "stopped", "failed"]
    error: str = ""


@dataclass
class TrialJob:
    """Runs one trial; picklable, so that submitit can send it to another process or machine.

    Args:
        study: gives temperatures, and the curves to keep.
        output: the study's folder, absolute.
        threads: CPU threads of the trial.
        program: what runs a command.
    """

    study: Study
    trial: Trial
    output: Path
    threads: int = 1
    program: tuple[str, ...] = PROGRAM
    _child: Popen[bytes] | None = field(default=None, init=False, compare=False)

    @property
    def folder(self) -> Path:
        """The training run's."""
        return self.output / "trials" / self.trial.name

    def __call__(self) -> Outcome:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(f"{self.folder}.lock"):
                if not is_stored(self.folder, self.trial):
                    self._check_folder()
                    self.work()
        except TrialStopped:
            return Outcome("stopped")
        except TrialFailed as error:
            return Outcome("failed", str(error))
        return Outcome("finished")

    def work(self) -> None:
        """Whatever of the trial is left to do."""
        with self._timed():
            self.run(["fit", *self.trial.arguments, *self.base_policy(), *_place(self.folder), "--ckpt_path", "last"])
            if self.trial.arm is not None and self.study.temperatures:
                self.evaluate()
        disk = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()) / 1e6
        gather(self.study, self.trial, self.folder, {**self._begun["spent"], "trial/disk_mb": disk})

    def _check_folder(self) -> None:
        """Refuse a folder in which a trial of other settings has begun: its checkpoint would count as this one's."""
        if not self._begun_file.exists():
            write_json(
                self._begun_file, {"digest": self.trial.digest, "spent": {"trial/wall_s": 0.0, "trial/cpu_s": 0.0}}
            )
        elif self._begun["digest"] != self.trial.digest:
            raise TrialFailed(f"{self.folder} has a trial of other settings: give the study another --output")

    @property
    def _begun_file(self) -> Path:
        return self.folder.with_name(self.folder.name + ".begun.json")

    @property
    def _begun(self) -> dict[str, Any]:
        return json.loads(self._begun_file.read_text())

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Add the time of what runs within to that of earlier attempts."""
        started, used = time.monotonic(), _children_cpu_s()
        try:
            yield
        finally:
            begun = self._begun
            begun["spent"]["trial/wall_s"] += time.monotonic() - started
            begun["spent"]["trial/cpu_s"] += _children_cpu_s() - used
            write_json(self._begun_file, begun)

    def checkpoint(self) -> DelayedSubmission:
        """What SLURM queues again after its time limit or a preemption: this job, which resumes."""
        self._end_child()
        return DelayedSubmission(replace(self))  # without the child

    def base_policy(self) -> list[str]:
        """The setting that gives a trial its seed's base policy."""
        if self.trial.arm is None or (base := self.study.base(self.trial.seed)) is None:
            return []
        assert self.study.base_policy is not None
        return [f"--{self.study.base_policy.key}", str(self.output / "trials" / base.name / "model")]

    def evaluate(self) -> None:
        """Evaluate the trained policy on the recipe's sets at each of the study's temperatures, in one command."""
        config = yaml.safe_load((self.folder / "config.yaml").read_text())
        sets = at_temperatures(config["data"]["init_args"]["eval_sets"], self.study.temperatures)
        model = ["--model.policy", str(self.folder / "model"), "--data.eval_sets", json.dumps(sets)]
        self.run(["validate", *self.trial.arguments, *model, *_place(temperature_folder(self.folder))])

    def run(self, command: Sequence[str]) -> None:
        """Run a command of ``ibro_lightning``, with its output in the trial's log.

        Raises:
            TrialStopped: it was asked to stop.
            TrialFailed: it ended with another error.
        """
        # Not SLURM's: Lightning would take the one task of the job for the number of its processes.
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))
        }
        environment |= {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        with log_file(self.folder).open("a") as log:
            log.write(f"$ python -m ibro_lightning {shlex.join(command)}\n")
            log.flush()
            prepare = partial(_ends_with, os.getpid())
            self._child = Popen(
                [*self.program, *command], stdout=log, stderr=STDOUT, env=environment, preexec_fn=prepare
            )
            code = self._wait(self._child)
        if code in STOPPED or (code and self._asked_to_stop()):
            raise TrialStopped(self.trial.name)
        if code:
            raise TrialFailed(f"{ended(code)}; its last line: {last_line(log_file(self.folder))}")

    def _wait(self, child: Popen[bytes]) -> int:
        """The child's exit code. It is asked to stop when the study is, and never left behind: Ctrl-C in a terminal
        reaches this process, too, while the child writes its checkpoint."""
        while True:
            with suppress(KeyboardInterrupt, TimeoutExpired):
                return child.wait(POLL_S)
            if self._asked_to_stop():
                self._end_child()

    def _asked_to_stop(self) -> bool:
        return (self.output / STOP).exists()

    def _end_child(self) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
            with suppress(KeyboardInterrupt):
                self._child.wait()


def log_file(folder: Path) -> Path:
    """What a trial's commands print."""
    return folder.with_name(folder.name + ".log")


def last_line(path: Path) -> str:
    """The last line of a log that says something."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def at_temperatures(sets: Mapping[str, Mapping[str, Any]], temperatures: Sequence[float]) -> dict[str, Any]:
    """Evaluation sets, once per temperature; their names are those of :func:`set_at_temperature`."""
    return {
        set_at_temperature(name, number): {
            **settings,
            "sampling": {**(settings.get("sampling") or {}), "temperature": temperature},
        }
        for name, settings in sets.items()
        for number, temperature in enumerate(temperatures)
    }


def _ends_with(job: int) -> None:
    """In a trial's process before it starts: it ends with its job, and leaves to that SLURM's signal that its time is
    up, which it would not survive."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    end_with(job, signal.SIGTERM)


def _place(folder: Path) -> list[str]:
    return ["--trainer.default_root_dir", str(folder)]


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
