"""Runs a study: starts trials as others finish, tries a failed one once more, and keeps the results up to date."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from filelock import FileLock, Timeout

from ibro_lightning.errors import ConfigError
from ibro_lightning.studies.gather import is_stored
from ibro_lightning.studies.job import PROGRAM, STOP, Outcome, TrialJob
from ibro_lightning.studies.jobs import Jobs
from ibro_lightning.studies.progress_table import Progress
from ibro_lightning.studies.store import ResultsStore
from ibro_lightning.studies.study_file import Study, Trial

ATTEMPTS = 2
"""How often a trial is started before it counts as failed."""
TICK_S = 0.5
FAREWELL_S = 120.0
"""How long a study that is asked to stop waits for its trials' checkpoints."""


class StudyRunner:
    """Runs what is left of a study.

    Args:
        jobs: starts trials.
        output: the folder of its trials. It may be lost: then unfinished trials start from the beginning.
        store: its results.
        progress: is told what happens, and shows it.
        retry_failed: start trials again that have failed for good before.
        program: what runs a command of a trial.
        file: the study file, for the report.
    """

    def __init__(
        self,
        study: Study,
        jobs: Jobs,
        output: Path,
        store: ResultsStore,
        progress: Progress,
        *,
        retry_failed: bool = False,
        program: tuple[str, ...] = PROGRAM,
        file: str = "",
    ) -> None:
        self.study, self.jobs, self.output, self.program = study, jobs, output.absolute(), program
        self.store, self.progress, self.file = store, progress, file
        done = ("finished",) if retry_failed else ("finished", "failed")
        self.waiting = [trial for trial in study.trials() if store.state_of(trial) not in done]
        self.limit = jobs.execution.limit(len(self.waiting))
        self.failures = Counter[str]()
        self.bases: dict[int, Outcome] = {}
        """How the training of each seed's base policy has ended."""
        self.trials: dict[str, Trial] = {}
        """Those whose jobs run, base policies among them."""

    def run(self) -> None:
        """Run until every trial is finished or has failed.

        Raises:
            ConfigError: another command runs this study in the same folder.
            Interrupted: this process was asked to stop; so were the trials, which resume with the study.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.output / ".study.lock").acquire(timeout=0)
        except Timeout as error:
            raise ConfigError("output", str(self.output), "another command runs this study there") from error
        with lock, self.store.opened(self.file):
            (self.output / STOP).unlink(missing_ok=True)
            try:
                while self.waiting or self.trials:
                    self.step()
                    self.progress.show(self.trials.values(), self.waiting)
                    time.sleep(TICK_S)
            except BaseException:
                self.stop()
                raise

    def step(self) -> None:
        """Start what can be started, and take what has ended."""
        while len(self.trials) < self.limit and (trial := self._next()) is not None:
            threads = self.jobs.execution.threads
            self.jobs.submit(TrialJob(self.study, trial, self.output, threads, self.program))
            self.trials[trial.name] = trial
        for name, outcome in self.jobs.finished().items():
            self._take(self.trials.pop(name), outcome)

    def _next(self) -> Trial | None:
        """The first trial that can start: an arm whose base policy is there, or the base policy of the first that waits
        for one."""
        for position, trial in enumerate(self.waiting):
            base = self.study.base(trial.seed)
            if base is None or trial.seed in self.bases:
                return self.waiting.pop(position)
            if base.name not in self.trials:
                return base
        return None

    def _take(self, trial: Trial, outcome: Outcome) -> None:
        if outcome.state == "stopped":  # not by this command, which would not be here
            outcome = Outcome("failed", "somebody stopped it")
        if outcome.state == "finished" and not is_stored(self._folder(trial), trial):
            outcome = Outcome("failed", "its job has left no results of these settings")
        self.failures[trial.name] += outcome.state == "failed"
        attempts = self.failures[trial.name] + (outcome.state == "finished")
        self.progress.tell(trial, outcome, attempts)
        if outcome.state == "failed" and attempts < ATTEMPTS:
            if trial.arm is not None:
                self.waiting.insert(0, trial)
        elif trial.arm is None:
            self._take_base(trial, outcome)
        elif outcome.state == "finished":
            base = self.study.base(trial.seed)
            self.store.add(trial, self._folder(trial), self._folder(base) if base else None, attempts)
        else:
            self.store.add_failure(trial, attempts, outcome.error)

    def _take_base(self, base: Trial, outcome: Outcome) -> None:
        self.bases[base.seed] = outcome
        if outcome.state == "failed":
            for trial in [trial for trial in self.waiting if trial.seed == base.seed]:
                self.waiting.remove(trial)
                self.store.add_failure(trial, 0, f"its base policy: {outcome.error}")

    def _folder(self, trial: Trial) -> Path:
        return self.output / "trials" / trial.name

    def stop(self) -> None:
        """Ask the trials to stop, and wait until they have saved where they are. On SLURM they stay queued."""
        if self.jobs.execution.executor == "slurm":
            self.progress.say(f"{len(self.trials)} jobs stay in SLURM's queue: the same command finds them again")
            return
        (self.output / STOP).touch()
        self.progress.say(f"waiting for {len(self.trials)} trials to save where they are")
        until = time.monotonic() + FAREWELL_S
        while self.trials and time.monotonic() < until:
            for name, outcome in self.jobs.finished().items():
                trial = self.trials.pop(name)
                if trial.arm is not None and outcome.state == "finished":
                    self._take(trial, outcome)
            time.sleep(TICK_S)
