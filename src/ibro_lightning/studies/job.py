"""One trial as a job: training, evaluations at other temperatures, and its rows of the results.

A job may be started again at any time, also while an earlier one of the same trial is still running on this or
another machine: it waits for that one, and then does what is left.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from subprocess import STDOUT, Popen, TimeoutExpired
from typing import Any, Literal

import yaml
from filelock import FileLock
from submitit.helpers import DelayedSubmission

from ibro_lightning.studies.gather import gather, is_stored, set_at_temperature, temperature_folder
from ibro_lightning.studies.spec import Study, Trial

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
                    self.work()
        except TrialStopped:
            return Outcome("stopped")
        except TrialFailed as error:
            return Outcome("failed", str(error))
        return Outcome("finished")

    def work(self) -> None:
        """Whatever of the trial is left to do."""
        started, spent = time.monotonic(), _children_cpu_s()
        self.run(["fit", *self.trial.arguments, *self.base_policy(), *_place(self.folder), "--ckpt_path", "last"])
        if self.trial.arm is not None and self.study.temperatures:
            self.evaluate()
        used = {
            "trial/wall_s": time.monotonic() - started,
            "trial/cpu_s": _children_cpu_s() - spent,
            "trial/disk_mb": sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()) / 1e6,
        }
        gather(self.study, self.trial, self.folder, used)

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
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        with log_file(self.folder).open("a") as log:
            log.write(f"$ python -m ibro_lightning {shlex.join(command)}\n")
            log.flush()
            self._child = Popen([*self.program, *command], stdout=log, stderr=STDOUT, env=environment)
            code = self._wait(self._child)
        if code in STOPPED or (code and self._asked_to_stop()):
            raise TrialStopped(self.trial.name)
        if code:
            raise TrialFailed(last_line(log_file(self.folder)) or f"exit code {code}")

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


def _place(folder: Path) -> list[str]:
    return ["--trainer.default_root_dir", str(folder)]


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
