"""The state of a study while it runs: a table, with an estimate of the end."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Collection
from datetime import datetime, timedelta
from pathlib import Path

from ibro_lightning.studies.job import Outcome, log_file
from ibro_lightning.studies.store import ResultsStore
from ibro_lightning.studies.study_file import Study, Trial

ON_A_TERMINAL_S = 5.0
IN_A_FILE_S = 300.0
_ITERATION = re.compile(r"\]\s+(\d+)/(\d+)\s")
"""The iteration in a line of a run's progress."""


class Progress:
    """Prints a table of the whole study from time to time, and a line for whatever goes wrong.

    It shows no results: who sees them while a study runs is tempted to stop it when they please.

    Args:
        output: the study's folder.
        store: the study's results so far.
        at_once: how many trials run at the same time.
    """

    def __init__(self, study: Study, output: Path, store: ResultsStore, at_once: int) -> None:
        self.study, self.output, self.store, self.at_once = study, output, store, at_once
        self.finished_now = 0
        self.started = time.monotonic()
        self._shown = -float("inf")
        self._every = ON_A_TERMINAL_S if sys.stdout.isatty() else IN_A_FILE_S

    def say(self, text: str) -> None:
        print(f"[{datetime.now():%H:%M:%S}] {text}", flush=True)

    def tell(self, trial: Trial, outcome: Outcome, attempt: int) -> None:
        """A job has ended."""
        if outcome.state == "failed":
            self.say(f"{trial.name} failed, attempt {attempt}: {outcome.error}")
            self.say(f"  its log: {log_file(self.output / 'trials' / trial.name)}")
        if trial.arm is not None and outcome.state == "finished":
            self.finished_now += 1
            self.say(f"{trial.name} finished")

    def show(self, running: Collection[Trial], waiting: Collection[Trial]) -> None:
        """Print the table if the last one is old enough."""
        now = time.monotonic()
        if now - self._shown >= self._every and (running or waiting):
            self._shown = now
            print("\n".join(self.table(running, waiting)), flush=True)

    def table(self, running: Collection[Trial], waiting: Collection[Trial]) -> list[str]:
        """One line per arm, and one with the estimate."""
        names = list(self.study.all_arms())
        width = max(map(len, [*names, "base policies"]))
        at = defaultdict(list)
        for trial in running:
            at[trial.arm or "base policies"].append(f"seed {trial.seed}{self._iteration(trial)}")
        left = Counter(trial.arm for trial in waiting)
        done, failed = self.store.count("finished"), self.store.count("failed")
        lines = [f"{'arm':{width}}  finished  failed  waiting  running"]
        for name in [*names, *(["base policies"] if "base policies" in at else [])]:
            counts = f"{done[name]:8}  {failed[name]:6}  {left[name]:7}"
            lines.append(f"{name:{width}}  {counts}  {', '.join(at[name])}")
        return [*lines, self._estimate(len(waiting) + sum(trial.arm is not None for trial in running))]

    def _estimate(self, left: int) -> str:
        done, all_trials = self.store.count("finished").total(), len(self.study.seeds) * len(self.study.all_arms())
        start = f"{done} of {all_trials} trials finished, {elapsed(time.monotonic() - self.started)} so far"
        seconds = self.seconds_left(left)
        if seconds is None:
            return f"{start}; the end can be estimated when one is finished"
        return f"{start}; about {elapsed(seconds)} left, until {datetime.now() + timedelta(seconds=seconds):%a %H:%M}"

    def seconds_left(self, left: int) -> float | None:
        """From what trials have taken in this command, all that run at a time together; else from earlier ones."""
        if self.finished_now:
            return left * (time.monotonic() - self.started) / self.finished_now
        before = self.store.mean_of("trial/wall_s")
        return None if before is None else left * before / self.at_once

    def _iteration(self, trial: Trial) -> str:
        path = log_file(self.output / "trials" / trial.name)
        if not path.exists():
            return ""
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - 4000))
            found = _ITERATION.findall(log.read().decode(errors="replace"))
        return f" ({found[-1][0]}/{found[-1][1]})" if found else ""


def elapsed(seconds: float) -> str:
    """A duration as people write it.

    >>> elapsed(42), elapsed(150), elapsed(11_000)
    ('42 s', '2 min', '3 h 03 min')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds // 60:.0f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"
