"""What the report reads: results folders, study files and their history, curves of runs, and runs as arms."""

from __future__ import annotations

import math
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from helpers.studies import ARMS, PLAN, final_rows, invented_study, study_file, write_results
from ibro_lightning.errors import ConfigError
from ibro_lightning.studies.analysis import at_entropy, changed_questions, comparisons, matched_entropy, other_outcomes
from ibro_lightning.studies.curves import Point, read_curves
from ibro_lightning.studies.history import history_of
from ibro_lightning.studies.plan import read_reported, study_of
from ibro_lightning.studies.results import read_results
from ibro_lightning.studies.run_folders import read_runs

METRIC = str(PLAN["metric"])
NAN = math.nan


def test_arms_by_seeds_at_the_last_iteration(tmp_path: Path) -> None:
    values = {"none": [0.8, 0.7, 0.9], "ib": [0.85, 0.75, 0.88], "naive": [0.6, 0.7, 0.8]}
    results = read_results(write_results(tmp_path, final_rows(values), study_file([1, 2, 3])))
    assert (results.arms, results.seeds) == (("none", "ib", "naive"), (1, 2, 3))
    assert results.last(METRIC).tolist() == [*values.values()]
    iterations, curves = results.curves(METRIC)
    assert iterations.tolist() == [0, 100]
    assert curves[:, :, 0].tolist() == [[0.3] * 3] * 3
    first, second = comparisons(results)
    assert first.paired.difference.estimate == pytest.approx((0.05 + 0.05 - 0.02) / 3)
    assert (second.reference, second.other, second.missing) == ("none", "naive", ())


def test_failed_and_running_trials_have_curves_and_no_result(tmp_path: Path) -> None:
    rows = final_rows({"none": [0.8, 0.7], "ib": [0.85, 0.75], "naive": [0.6, 0.7]})
    failed, running = {("ib", 2): "RankError: rank 1 failed"}, [("naive", 1)]
    results = read_results(write_results(tmp_path, rows, study_file([1, 2, 3]), failed=failed, running=running))
    np.testing.assert_equal(results.last(METRIC), [[0.8, 0.7, NAN], [0.85, NAN, NAN], [NAN, 0.7, NAN]])
    assert results.curves(METRIC)[1][1, 1].tolist() == [0.3, 0.75]
    assert (len(results.finished), results.planned_trials) == (4, 9)
    assert comparisons(results)[0].missing == (2, 3)


def test_a_trial_that_ended_earlier_than_its_arm_has_no_last_value(tmp_path: Path) -> None:
    rows = [row for row in final_rows({"none": [0.8, 0.7], "ib": [0.85, 0.75]}) if row[:3] != ("ib", 2, 100)]
    results = read_results(write_results(tmp_path, rows, study_file([1, 2])))
    np.testing.assert_equal(results.last(METRIC)[1], [0.85, NAN])
    assert results.last_iterations(METRIC) == {"none": 100, "ib": 100}


@pytest.mark.parametrize("name", ["study.yaml", "results.parquet", "trials.parquet"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = invented_study(tmp_path, 2)
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=name):
        read_results(folder)


def test_files_of_another_form_are_named(tmp_path: Path) -> None:
    folder = invented_study(tmp_path, 2)
    pq.write_table(pa.table({"arm": ["none"]}), folder / "trials.parquet")
    with pytest.raises(ConfigError, match=r"trials\.parquet.*no column seed, state"):
        read_results(folder)
    (folder / "results.parquet").write_text("nothing")
    with pytest.raises(ConfigError, match=r"results\.parquet.*cannot be read"):
        read_results(folder)


def test_a_point_that_is_there_twice_is_named(tmp_path: Path) -> None:
    rows = final_rows({"none": [0.8], "ib": [0.9]})
    folder = write_results(tmp_path, [*rows, rows[1]], study_file([1]))
    with pytest.raises(ConfigError, match=r"none/seed_1 has val/number_path/avg@16 twice at iteration 100"):
        read_results(folder)


def test_a_metric_that_no_trial_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"val/number_path/avg@4.*choose one of val/number_path/avg@16"):
        read_results(invented_study(tmp_path, 2)).last("val/number_path/avg@4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": None}, "no study file"),
        ({"arms": {"none": {}}}, "name ib, naive, which is no arm"),
        ({"plan": {**PLAN, "test": "t"}}, "its test is t"),
        ({"seeds": "one"}, "no study file"),
    ],
)
def test_what_is_no_study_file(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study_of({**study_file([1]), **change}, "study.yaml")


def test_arms_of_a_grid_are_those_that_were_run() -> None:
    grid = {"grid": {"model.regularizer.coef": [0.1, 0.2]}, "label": "IB"}
    study = study_of(study_file([1], {"none": {}, "ib": grid}, comparisons=[["none", "ib,coef=0.2"]]), "study.yaml")
    assert study.labels == {"none": "none", "ib,coef=0.1": "IB, coef=0.1", "ib,coef=0.2": "IB, coef=0.2"}


def test_the_shipped_studies_can_be_reported_on() -> None:
    for path in sorted(Path(__file__).parents[1].glob("configs/studies/*.yaml")):
        plan = read_reported(path).plan
        assert bool(plan.comparisons) == (path.stem != "methods")  # one seed each, which compares nothing


def test_accuracy_is_interpolated_to_an_entropy_and_not_beyond() -> None:
    entropy, accuracy = np.array([0.4, 0.1, 0.2]), np.array([0.6, 0.9, 0.8])
    assert at_entropy(0.15, entropy, accuracy) == pytest.approx(0.85)
    assert at_entropy(0.4, entropy, accuracy) == 0.6
    assert math.isnan(at_entropy(0.41, entropy, accuracy))
    assert math.isnan(at_entropy(0.09, entropy, accuracy))
    assert math.isnan(at_entropy(0.2, np.array([NAN, 0.1, NAN]), accuracy))


def test_accuracy_at_matched_entropy_is_paired_by_seed(tmp_path: Path) -> None:
    """The reference has entropy 0.2 at temperature 1; the other arm's accuracy there is halfway between its own at
    0.1 and 0.3 nats on seed 1, and out of reach on seed 2."""
    rows = final_rows({"none": [0.8, 0.8], "ib": [0.9, 0.9]})
    points = {("none", 1): {1.0: (0.8, 0.2)}, ("none", 2): {1.0: (0.8, 0.2)}}
    points |= {("ib", 1): {0.6: (0.9, 0.1), 1.0: (0.86, 0.3)}, ("ib", 2): {0.6: (0.9, 0.3), 1.0: (0.86, 0.4)}}
    for (arm, seed), temperatures in points.items():
        for temperature, (accuracy, entropy) in temperatures.items():
            name = f"at_temperature/{temperature}/number_path"
            rows += [(arm, seed, 100, f"{name}/avg@16", accuracy), (arm, seed, 100, f"{name}/entropy", entropy)]
    arms = {name: ARMS[name] for name in ("none", "ib")}
    results = read_results(write_results(tmp_path, rows, study_file([1, 2], arms, comparisons=[["none", "ib"]])))
    (matched,) = matched_entropy(results)
    assert matched.difference.difference.estimate == pytest.approx(0.88 - 0.8)
    assert (matched.difference.difference.count, matched.outside, matched.entropy) == (1, 1, 0.2)


def test_one_temperature_matches_nothing(tmp_path: Path) -> None:
    arms = {name: ARMS[name] for name in ("none", "ib")}
    rows = final_rows({"none": [0.8, 0.8], "ib": [0.9, 0.9]})
    for arm in arms:
        rows += [(arm, 1, 100, f"at_temperature/1/number_path/{name}", 0.2) for name in ("avg@16", "entropy")]
    results = read_results(write_results(tmp_path, rows, study_file([1, 2], arms, comparisons=[["none", "ib"]])))
    assert matched_entropy(results) == []


def test_questions_that_changed_most(tmp_path: Path) -> None:
    gained, lost = changed_questions(read_results(invented_study(tmp_path, 2)), "none", "ib", most=2)
    assert [(change.question, round(change.change, 6)) for change in gained] == [("q8", 0.4), ("q7", 0.3)]
    assert [(change.question, round(change.change, 6)) for change in lost] == [("q0", -0.4), ("q1", -0.3)]


def test_of_several_pass_at_k_the_report_shows_the_largest(tmp_path: Path) -> None:
    names = other_outcomes(read_results(invented_study(tmp_path, 2)))
    assert "val/number_path/pass@16" in names
    assert "val/number_path/pass@4" not in names
    assert METRIC not in names


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", message)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """With a committed study file in ``configs/studies/``."""
    git(tmp_path, "init", "-q")
    path = tmp_path / "configs" / "studies" / "invented.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(study_file([1, 2])))
    commit(tmp_path, "the plan")
    return tmp_path


def sentences(repository: Path) -> str:
    folder = repository / "docs" / "studies" / "invented"
    return " ".join(history_of(folder, read_results(folder).study).sentences())


def test_a_plan_that_is_older_than_its_results(repository: Path) -> None:
    folder = write_results(repository / "docs/studies/invented", final_rows({"none": [0.8]}), study_file([1, 2]))
    said = sentences(repository)
    assert "configs/studies/invented.yaml was introduced by commit" in said
    assert "not committed yet" in said
    commit(repository, "results")
    assert "has not been changed since" in sentences(repository)
    assert "WARNING" not in sentences(repository)
    (folder / "more.txt").write_text("later")
    commit(repository, "something else")
    assert "WARNING" not in sentences(repository)


def test_a_plan_that_was_changed_after_the_results_is_reported(repository: Path) -> None:
    write_results(repository / "docs/studies/invented", final_rows({"none": [0.8]}), study_file([1, 2]))
    commit(repository, "results")
    path = repository / "configs" / "studies" / "invented.yaml"
    path.rename(path.with_name("moved.yaml"))
    commit(repository, "another name")
    path.with_name("moved.yaml").rename(path)
    commit(repository, "and back")
    assert "WARNING" not in sentences(repository)
    path.write_text(yaml.safe_dump(study_file([1, 2, 3], difference_that_matters=0.01)))
    commit(repository, "a better plan")
    said = sentences(repository)
    assert "changed plan and seeds of the study file" in said
    assert "another plan and seeds than committed" in said


def test_without_a_repository_nothing_shows_when_a_plan_was_written(tmp_path: Path) -> None:
    folder = invented_study(tmp_path / "results", 2)
    history = history_of(folder, read_results(folder).study)
    assert history.introduced is None
    assert "not committed" in history.sentences()[0]


def run(folder: Path, seed: int = 1, coef: float = 0.005, accuracy: float = 0.5, *, iterations: int = 2) -> Path:
    """What ``fit`` leaves of a run, as far as the report reads it."""
    folder.mkdir(parents=True)
    settings = {
        "seed_everything": seed,
        "trainer": {"max_epochs": 2, "default_root_dir": str(folder)},
        "model": {"class_path": "DAPOModule", "init_args": {"policy": f"runs/base_{seed}/model", "coef": coef}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "summary.json").write_text(f'{{"iterations": {iterations}}}')
    with SummaryWriter(str(folder)) as writer:
        for iteration in range(iterations + 1):
            writer.add_scalar("val/number_path/avg@4", accuracy + 0.1 * iteration, iteration)
        writer.add_scalar("policy/entropy", 0.25, 1)
        writer.add_text("samples", "no curve", 1)
        writer.add_scalar("policy/entropy", math.nan, 2)
    return folder


def test_curves_of_a_run_are_its_scalars(tmp_path: Path) -> None:
    assert read_curves(run(tmp_path / "run")) == [
        Point("policy/entropy", 1, 0.25),
        Point("val/number_path/avg@4", 0, 0.5),
        Point("val/number_path/avg@4", 1, pytest.approx(0.6)),
        Point("val/number_path/avg@4", 2, pytest.approx(0.7)),
    ]


def test_a_point_that_a_resumed_run_wrote_again_counts_once(tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    os.utime(next(folder.glob("events.*")))
    with SummaryWriter(str(folder), filename_suffix=".later") as writer:
        writer.add_scalar("val/number_path/avg@4", 0.75, 2)
        writer.add_scalar("val/number_path/avg@4", 0.875, 3)
    points = read_curves(folder)
    assert [(point.iteration, round(point.value, 3)) for point in points[1:]] == [
        (0, 0.5),
        (1, 0.6),
        (2, 0.75),
        (3, 0.875),
    ]


def test_curves_of_a_killed_run_end_where_it_was_killed(tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    whole = read_curves(folder)
    path = next(folder.glob("events.*"))
    os.truncate(path, path.stat().st_size - 7)
    assert set(read_curves(folder)) <= set(whole)


def test_curves_of_a_csv_logger(tmp_path: Path) -> None:
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "metrics.csv").write_text("a/b,epoch,step\n0.125,0,3\n,1,4\n0.5,1,5\n")
    assert read_curves(tmp_path) == [Point("a/b", 3, 0.125), Point("a/b", 5, 0.5)]
    with pytest.raises(ConfigError, match="no curves are there"):
        read_curves(tmp_path / "version_1")


def test_runs_with_equal_settings_but_for_the_seed_are_one_arm(tmp_path: Path) -> None:
    """A base policy of its own for every seed is the same setting."""
    folders = [
        run(tmp_path / f"{coef}_{seed}", seed, coef, 0.5 + coef) for coef in (0.0, 0.01) for seed in (1, 2)
    ]  # fmt: skip
    results = read_runs(folders)
    assert (results.arms, results.seeds, results.planned) == (("coef=0.0", "coef=0.01"), (1, 2), False)
    assert results.study.plan.metric == "val/number_path/avg@4"
    assert results.last("val/number_path/avg@4") == pytest.approx(np.array([[0.7, 0.7], [0.71, 0.71]]))
    assert results.study.plan.comparisons == (("coef=0.0", "coef=0.01"),)


def test_a_run_that_has_not_ended_has_no_result(tmp_path: Path) -> None:
    folders = [run(tmp_path / "a", 1), run(tmp_path / "b", 2, iterations=1), run(tmp_path / "c", 3)]
    (folders[2] / "summary.json").unlink()
    trials = read_runs(folders).trials
    assert [trial.state for trial in trials] == ["finished", "unfinished", "unfinished"]
    assert trials[1].error == "it has ended after 1 of 2 iterations"


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    first, second = run(tmp_path / "a", 1), run(tmp_path / "b", 1)
    with pytest.raises(ConfigError, match=r"the settings and the seed of .*/a"):
        read_runs([first, second])
    with pytest.raises(ConfigError, match=r"no trial has it"):
        read_runs([first], "val/aime/avg@32")
    with pytest.raises(ConfigError, match=r"config\.yaml.*name folders that `fit` has written"):
        read_runs([tmp_path])
