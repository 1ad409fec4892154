"""Studies: every trial is run once, failures are tried again and reported, and a stopped study continues."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from helpers import slurm, study_program
from helpers.processes import HANGS_S
from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.interruption import Interrupted
from ibro_lightning.studies import job, runner
from ibro_lightning.studies.gather import QUESTIONS, curves_table, stored_folder, write_table
from ibro_lightning.studies.job import Outcome, TrialJob
from ibro_lightning.studies.jobs import Execution, Jobs
from ibro_lightning.studies.progress_table import Progress
from ibro_lightning.studies.runner import StudyRunner
from ibro_lightning.studies.store import ResultsStore
from ibro_lightning.studies.study_file import Arm, BasePolicy, Plan, Study

PLAN = Plan(
    question="Which is better?",
    metric="val/paths/avg@2",
    comparisons=[["low", "high"]],
    answer="A difference.",
    chosen_by="Nothing.",
    difference_that_matters=0.1,
)
STUDY = Study(
    name="tiny",
    plan=PLAN,
    recipe="quickstart.yaml",
    arms={"low": Arm({"model.quality": 0.25}), "high": Arm({"model.quality": 0.75})},
    seeds=[1, 2],
    base_policy=BasePolicy("sft_quickstart.yaml"),
    temperatures=[0.5, 1.5],
)


PROGRAM = (sys.executable, study_program.__file__)


class Told:
    """Jobs that end at once, as a test says; they leave the results of a real one."""

    execution = Execution(at_once=2)

    def __init__(self, **ends: str) -> None:
        """Args: ``{trial with __ for /: how each start ends, e.g. "failed finished"}``; others finish."""
        self.ends = {name.replace("__", "/"): iter(end.split()) for name, end in ends.items()}
        self.submitted: list[str] = []
        self.running: list[TrialJob] = []
        self.most = 0

    def submit(self, given: TrialJob) -> None:
        self.submitted.append(given.trial.name)
        self.running.append(given)
        self.most = max(self.most, len(self.running))

    def finished(self) -> dict[str, Outcome]:
        ended, self.running = self.running[:1], self.running[1:]
        return {given.trial.name: self._end(given) for given in ended}

    def _end(self, given: TrialJob) -> Outcome:
        state: Any = next(self.ends.get(given.trial.name, iter(())), "finished")
        if state == "finished":
            leave_results(given)
        return Outcome(state, "model.quality: -1 - write 0 or more" if state == "failed" else "")


CONFIG = """# fit --config /home/somebody/x.yaml
model:
  policy: /home/somebody/model
  parts:
  - /data/x
data: {limit: 3}
"""


def leave_results(given: TrialJob) -> None:
    out = stored_folder(given.folder)
    quality = float(given.trial.seed)
    for name in ("results", "timings"):
        write_table(out / f"{name}.parquet", curves_table(given.trial, [("val/paths/avg@2", 2, quality)]))
    write_table(out / "questions.parquet", QUESTIONS.empty_table())
    about = {"digest": given.trial.digest, "policy": f"p{given.trial.seed}", "config": CONFIG}
    (out / "trial.json").write_text(json.dumps(about))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "TICK_S", 0.01)
    monkeypatch.setattr(job, "POLL_S", 0.02)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # jobs find this checkout


def runs(jobs: Any, folder: Path, study: Study = STUDY, **options: Any) -> ResultsStore:
    store = ResultsStore(study, folder / "results")
    StudyRunner(study, jobs, folder, store, Progress(study, folder, store, 2), program=PROGRAM, **options).run()
    return store


def rows(folder: Path, name: str = "results") -> list[dict[str, Any]]:
    return pq.read_table(folder / f"results/{name}.parquet").to_pylist()


def test_trials_run_seed_after_seed_each_behind_its_base_policy(tmp_path: Path) -> None:
    jobs = Told()
    runs(jobs, tmp_path)
    assert sorted(jobs.submitted) == sorted(
        ["base/seed_1", "base/seed_2", *(f"{arm}/seed_{seed}" for arm in ("low", "high") for seed in (1, 2))]
    )
    for seed in (1, 2):
        first = jobs.submitted.index(f"base/seed_{seed}")
        assert all(jobs.submitted.index(f"{arm}/seed_{seed}") > first for arm in ("low", "high"))
    assert jobs.most == 2
    assert [row["trial"] for row in rows(tmp_path)] == ["low/seed_1", "high/seed_1", "low/seed_2", "high/seed_2"]
    assert [row["base_policy"] for row in rows(tmp_path, "trials")] == ["p1", "p1", "p2", "p2"]
    settings = (tmp_path / "results/configs/low.yaml").read_text()
    assert settings == "model:\n  policy: …\n  parts:\n  - …\ndata: {limit: 3}\n", "no place of this machine"


def test_a_failed_trial_is_tried_once_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = Told(low__seed_1="failed finished", high__seed_2="failed failed")
    runs(jobs, tmp_path)
    assert [jobs.submitted.count(name) for name in ("low/seed_1", "high/seed_1", "high/seed_2")] == [2, 1, 2]
    states = {row["trial"]: (row["state"], row["attempts"], row["error"]) for row in rows(tmp_path, "trials")}
    assert states["low/seed_1"] == ("finished", 2, "")
    assert states["high/seed_2"] == ("failed", 2, "model.quality: -1 - write 0 or more")
    assert "high/seed_2" not in {row["trial"] for row in rows(tmp_path)}
    assert "high/seed_2 failed, attempt 2: model.quality: -1" in capsys.readouterr().out
    again = Told()
    runs(again, tmp_path)
    assert again.submitted == []
    runs(again, tmp_path, retry_failed=True)
    assert again.submitted == ["base/seed_2", "high/seed_2"]
    assert {row["state"] for row in rows(tmp_path, "trials")} == {"finished"}


def test_without_its_base_policy_a_seed_fails_and_the_others_go_on(tmp_path: Path) -> None:
    jobs = Told(base__seed_1="failed failed")
    runs(jobs, tmp_path)
    states = {row["trial"]: (row["state"], row["error"]) for row in rows(tmp_path, "trials")}
    error = "its base policy: model.quality: -1 - write 0 or more"
    assert states["low/seed_1"] == states["high/seed_1"] == ("failed", error)
    assert states["low/seed_2"] == states["high/seed_2"] == ("finished", "")


def test_results_are_enough_to_go_on_elsewhere(tmp_path: Path) -> None:
    """Only the results folder is committed; the trials' own folders stay behind."""
    half = replace(STUDY, seeds=[1])
    runs(Told(), tmp_path, half)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "results").rename(elsewhere / "results")
    jobs = Told()
    runs(jobs, elsewhere)
    assert sorted(jobs.submitted) == ["base/seed_2", "high/seed_2", "low/seed_2"]
    assert len(rows(elsewhere)) == 4


def test_the_tables_do_not_depend_on_the_order_in_which_trials_end(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    runs(Told(), one)
    runs(Told(base__seed_1="stopped finished", base__seed_2="failed finished"), other)
    assert (one / "results/results.parquet").read_bytes() == (other / "results/results.parquet").read_bytes()
    assert (one / "results/trials.parquet").read_bytes() == (other / "results/trials.parquet").read_bytes()


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    runs(Told(), tmp_path)
    changed = replace(STUDY, arms={**STUDY.arms, "low": Arm({"model.quality": 0.3})})
    with pytest.raises(
        ConfigError, match=r"results: .* - the settings of 2 trials there have changed, such as low/seed_1"
    ):
        ResultsStore(changed, tmp_path / "results")
    more = replace(STUDY, seeds=[1, 2, 3], plan=replace(PLAN, answer="Another text."))
    assert ResultsStore(more, tmp_path / "results").count("finished").total() == 4
    fewer = replace(STUDY, seeds=[1])  # the other seed's results stay, and are not counted
    assert ResultsStore(fewer, tmp_path / "results").count("finished").total() == 2


def test_a_folder_with_other_files_under_these_names_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "results.parquet").write_text("mine")
    with pytest.raises(ConfigError, match=r"results: .* - results.parquet there is no study's: write another folder"):
        ResultsStore(STUDY, folder)
    assert [path.read_text() for path in folder.iterdir()] == ["mine"]
    (folder / "results.parquet").unlink()
    with ResultsStore(STUDY, folder).opened():
        pass
    with pytest.raises(ConfigError, match=r"study.yaml there is of the study tiny: write another folder"):
        ResultsStore(replace(STUDY, name="another"), folder)


def test_a_study_of_real_jobs(tmp_path: Path) -> None:
    (tmp_path / "behaviour.json").write_text(json.dumps({"low/seed_2": "fail once", "high/seed_1": "fail"}))
    runs(Jobs(Execution(at_once=2), tmp_path / "jobs"), tmp_path)
    states = {row["trial"]: (row["state"], row["error"]) for row in rows(tmp_path, "trials")}
    assert states.pop("high/seed_1") == (
        "failed",
        "exit code 1; its last line: error: model.quality: -1 - write 0 or more",
    )
    assert set(states.values()) == {("finished", "")}
    found = {(row["trial"], row["metric"], row["iteration"]): row["value"] for row in rows(tmp_path)}
    for trial, quality in (("low/seed_1", 0.25), ("low/seed_2", 0.25), ("high/seed_2", 0.75)):
        assert found[trial, "val/paths/avg@2", 0] == found[trial, "val/paths/avg@2", 2] == quality
        assert found[trial, "rollout/length", 2] == 3.5  # the mean of iterations 1 to 10, of which there are two
        assert found[trial, "at_temperature/0.5/paths/avg@2", 2] == quality
        for temperature in ("0.5", "1", "1.5"):  # 1 is that of the recipe's own last evaluation
            assert found[trial, f"at_temperature/{temperature}/paths/entropy", 2] == 0.5
    assert not any(metric.startswith("time/") for _, metric, _ in found)
    assert {row["question"]: row["avg"] for row in rows(tmp_path, "questions") if row["arm"] == "high"} == {
        "a": 0.75,
        "b": 0,
    }
    assert {row["metric"] for row in rows(tmp_path, "timings")} == {
        *("time/total_s", "trial/wall_s", "trial/cpu_s", "trial/disk_mb")
    }


@pytest.mark.slow
def test_a_stopped_study_waits_for_its_trials_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = replace(STUDY, seeds=[1], base_policy=None, temperatures=[])
    (tmp_path / "behaviour.json").write_text(json.dumps({"low/seed_1": "wait"}))
    jobs = Jobs(Execution(at_once=1), tmp_path / "jobs")

    def show(progress: Progress, running: Any, waiting: Any) -> None:
        if (tmp_path / "trials/low/seed_1/is_waiting").exists():
            raise Interrupted("SIGTERM")

    monkeypatch.setattr(Progress, "show", show)
    with pytest.raises(Interrupted):
        runs(jobs, tmp_path, study)
    assert not jobs.running, "it has waited for the trial"
    assert started(tmp_path) == ["low/seed_1"]
    monkeypatch.undo()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    runs(Jobs(Execution(at_once=1), tmp_path / "jobs"), tmp_path, study)
    assert started(tmp_path) == ["low/seed_1", "low/seed_1", "high/seed_1"]
    assert {row["attempts"] for row in rows(tmp_path, "trials")} == {1}


def test_a_study_on_slurm_finds_its_queued_jobs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command may end while its jobs wait or run; the same command takes them up instead of sending them again."""
    cluster = slurm.install(tmp_path / "cluster")
    monkeypatch.setenv("PATH", f"{cluster}{os.pathsep}{os.environ['PATH']}")
    study = replace(STUDY, seeds=[1], base_policy=None, temperatures=[])
    execution = Execution("slurm", threads=3, gpus=2, slurm={"partition": "gpu", "timeout_min": 720, "mem_gb": 64})
    first = Jobs(execution, tmp_path / "jobs")
    for trial in study.trials():
        first.submit(TrialJob(study, trial, tmp_path, program=PROGRAM))
    runs(Jobs(execution, tmp_path / "jobs"), tmp_path, study)
    assert sorted(started(tmp_path)) == ["high/seed_1", "low/seed_1"]
    assert {row["state"] for row in rows(tmp_path, "trials")} == {"finished"}
    script = (cluster / "jobs/1000/script.sh").read_text()
    for flag in ("partition=gpu", "time=720", "mem=64GB", "cpus-per-task=3", "gpus-per-node=2", "job-name=low-seed_1"):
        assert f"#SBATCH --{flag}\n" in script


def test_results_of_other_settings_in_a_trials_folder_are_not_taken(tmp_path: Path) -> None:
    """A checkpoint of other settings would go on as if it were this trial's."""
    study = replace(STUDY, seeds=[1], base_policy=None, temperatures=[])
    trial = next(study.trials())
    assert TrialJob(study, trial, tmp_path, program=PROGRAM)().state == "finished"
    changed = next(replace(study, settings={"model.quality": 0.5}, every=3).trials())
    outcome = TrialJob(study, changed, tmp_path, program=PROGRAM)()
    assert outcome.state == "failed"
    assert outcome.error.endswith("has a trial of other settings: give the study another --output")


def test_a_run_ends_with_its_job(tmp_path: Path) -> None:
    """Or the next attempt would meet it in its folder."""
    study = replace(STUDY, seeds=[1], base_policy=None, temperatures=[])
    (tmp_path / "behaviour.json").write_text(json.dumps({"low/seed_1": "wait"}))
    jobs = Jobs(Execution(at_once=1), tmp_path / "jobs")
    jobs.submit(TrialJob(study, next(study.trials()), tmp_path, program=PROGRAM))
    waits = tmp_path / "trials/low/seed_1/is_waiting"
    until(waits.exists)
    (controller,) = [child for child in psutil.Process().children() if "submitit" in " ".join(child.cmdline())]
    (task,) = controller.children()
    (run,) = task.children()
    task.kill()
    until(lambda: not run.is_running() or run.status() == psutil.STATUS_ZOMBIE)
    until(lambda: jobs.running["low/seed_1"].done())
    ((_, outcome),) = jobs.finished().items()
    assert outcome.state == "failed"
    assert "its job left no result: was it killed?" in outcome.error


def until(happens: Callable[[], object]) -> None:
    end = time.monotonic() + HANGS_S
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_commands_do_not_write_the_same_results(tmp_path: Path) -> None:
    store = ResultsStore(STUDY, tmp_path / "results")
    assert not (tmp_path / "results/study.yaml").exists(), "nothing is written before the study runs"
    with store.opened(), pytest.raises(ConfigError, match="another study command writes there"):
        runs(Told(), tmp_path)
    runs(Told(), tmp_path)


def test_what_slurm_queues_again_is_the_same_trial(tmp_path: Path) -> None:
    given = TrialJob(STUDY, next(STUDY.trials()), tmp_path, program=PROGRAM)
    assert given.checkpoint().function == given


def test_slurm_needs_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="executor: 'slurm' - there is no sbatch here"):
        Execution("slurm")
    with pytest.raises(ConfigError, match="these are for SLURM"):
        Execution(slurm={"partition": "gpu"})
    with pytest.raises(ConfigError, match="at_once"):
        Execution(gpus=1)


def started(folder: Path) -> list[str]:
    return (folder / "trials/started.txt").read_text().split()
