"""Study files: what they mean, what is refused in them, and what a dry run says."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from ibro_lightning.cli import study as command
from ibro_lightning.cli.main import main
from ibro_lightning.errors import ConfigError
from ibro_lightning.runs.recipes import recipe_folder
from ibro_lightning.studies.gather import thinned
from ibro_lightning.studies.job import at_temperatures
from ibro_lightning.studies.jobs import Execution
from ibro_lightning.studies.progress_table import Progress
from ibro_lightning.studies.runner import StudyRunner
from ibro_lightning.studies.store import ResultsStore
from ibro_lightning.studies.study_file import Arm, Study, Trial, as_yaml, read_study

CONTENT = {
    "name": "tiny",
    "recipe": "quickstart.yaml",
    "plan": {
        "question": "Which is better?",
        "metric": "val/number_path/avg@16",
        "comparisons": [["none", "ib,coef=0.1"]],
        "answer": "A difference.",
        "chosen_by": "A pilot.",
        "difference_that_matters": 0.02,
        "paired_sd": 0.02,
    },
    "settings": {"trainer.max_epochs": 2},
    "arms": {
        "none": {"settings": {"model.regularizer": None}},
        "ib": {"label": "IB", "grid": {"model.regularizer.coef": [0.1, 0.2]}},
    },
    "seeds": [1, 2],
    "base_policy": {"recipe": "sft_quickstart.yaml", "settings": {"trainer.max_epochs": 1}},
}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return written(tmp_path, **CONTENT)


def written(folder: Path, **content: object) -> Study:
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return read_study(folder / "tiny.yaml")


def test_every_arm_runs_with_every_point_of_the_grid_and_every_seed(study: Study) -> None:
    trials = list(study.trials())
    names = ["none", "ib,coef=0.1", "ib,coef=0.2"]
    assert [arm.label for arm in study.all_arms().values()] == [None, "IB, coef=0.1", "IB, coef=0.2"]
    assert [trial.name for trial in trials] == [f"{arm}/seed_{seed}" for seed in (1, 2) for arm in names]
    assert trials[5].arguments == (
        *("--config", "quickstart.yaml", "--trainer.max_epochs", "2"),
        *("--model.regularizer.coef", "0.2", "--seed_everything", "2"),
    )
    base = study.base(2)
    assert base is not None
    assert base.name == "base/seed_2"
    assert base.arguments == (
        *("--config", "sft_quickstart.yaml", "--trainer.max_epochs", "1", "--seed_everything", "2"),
    )


def test_settings_of_an_arm_come_after_those_of_all(tmp_path: Path) -> None:
    arms = {"a": {"settings": {"trainer.max_epochs": 3, "model.regularizer": {"class_path": "EntropyBonus"}}}}
    content = {**CONTENT, "arms": arms, "seeds": [5], "plan": {**CONTENT["plan"], "comparisons": []}}
    (trial,) = written(tmp_path, **content).trials()
    assert trial.arguments == (
        *("--config", "quickstart.yaml", "--trainer.max_epochs", "3"),
        *("--model.regularizer", '{"class_path": "EntropyBonus"}', "--seed_everything", "5"),
    )


def test_a_trials_digest_is_that_of_its_settings(study: Study) -> None:
    first = next(study.trials())
    assert first.digest == Trial("another", 1, first.arguments, first.context).digest
    assert len({trial.digest for trial in study.trials()}) == 6
    assert study.base_policy is not None
    other_base = replace(study.base_policy, settings={"trainer.max_epochs": 2})
    for changes in ({"temperatures": [0.5]}, {"every": 3}, {"curves": ["val/"]}, {"base_policy": other_base}):
        assert next(replace(study, **changes).trials()).digest != first.digest, changes


def test_a_trials_digest_is_that_of_its_recipes_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = {**CONTENT, "recipe": "mine.yaml"}
    digests = []
    for text in ("a: 1", "a: 2"):
        Path("mine.yaml").write_text(text)
        digests.append(next(written(tmp_path, **content).trials()).digest)
    assert digests[0] != digests[1]


def test_a_study_is_read_back_as_it_was_written(study: Study, tmp_path: Path) -> None:
    (tmp_path / "again.yaml").write_text(as_yaml(study))
    assert read_study(tmp_path / "again.yaml") == study


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, "seeds: [1, 1] - write different whole numbers, one at least"),
        ({"seeds": []}, "seeds: [] - write different whole numbers, one at least"),
        ({"arms": {}}, "arms: {} - write one arm at least"),
        ({"arms": {"base": {}}}, "arms: 'base' - write letters, digits, _, +, - and . only"),
        ({"arms": {"..": {}}}, "arms: '..' - write letters, digits, _, +, - and . only"),
        ({"arms": {"a": {"grid": {"x": []}}}}, "arms.a.grid: {'x': []} - write numbers or names to try, one at least"),
        ({"arms": {"a": {"grid": {"x": ["a/b"]}}}}, "write an arm for each"),
        ({"seeds": [-1]}, "seeds: -1 - write 0 or more"),
        ({"temperatures": [1, 1]}, "temperatures: [1.0, 1.0] - write each of them once"),
        ({"name": "../x"}, "name: '../x' - write letters, digits, - and _"),
        ({"temperatures": [0]}, "temperatures: [0.0] - write numbers above 0"),
        ({"every": 0}, "every: 0 - write 1 or more"),
        ({"plan": {"answer": " "}}, "plan.answer: '' - write it before the first trial runs"),
        ({"plan": {"level": 5}}, "plan.level: 5.0 - write a number between 0 and 1"),
        (
            {"plan": {"comparisons": [["none", "ib"]]}},
            "plan.comparisons: ['none', 'ib'] - write pairs [reference, other]",
        ),
        ({"plan": {"test": "t"}}, "plan.test: 't' - write one of sign_flip"),
    ],
)
def test_what_is_wrong_is_refused_by_name(changes: dict, message: str, tmp_path: Path) -> None:
    content = {**CONTENT, **changes}
    if "plan" in changes:
        content["plan"] = {**CONTENT["plan"], **changes["plan"]}
    with pytest.raises(ConfigError) as refused:
        written(tmp_path, **content)
    assert message in str(refused.value)


def test_a_misspelt_field_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sedes"):
        written(tmp_path, **CONTENT, sedes=[1])


def test_training_curves_are_averaged_in_blocks_and_evaluations_are_not() -> None:
    curves = [
        ("val/a", 0, 1.0),
        ("val/a", 7, 2.0),
        *(("policy/entropy", i, float(i)) for i in range(1, 8)),
        ("x", 1, 0.0),
    ]
    assert list(thinned(curves, ["val/", "policy/"], 5)) == [
        *(("val/a", 0, 1.0), ("val/a", 7, 2.0)),
        *(("policy/entropy", 5, 3.0), ("policy/entropy", 7, 6.5)),
    ]


def test_sets_are_repeated_at_each_temperature() -> None:
    sets = at_temperatures({"a": {"samples": 4, "sampling": {"temperature": 1.0, "max_tokens": 9}}}, [0.5, 2.0])
    assert sets == {
        f"a-t{number}": {"samples": 4, "sampling": {"temperature": temperature, "max_tokens": 9}}
        for number, temperature in enumerate((0.5, 2.0))
    }


def test_a_dry_run_says_what_a_study_takes_and_can_find(study: Study, tmp_path: Path) -> None:
    store = ResultsStore(study, tmp_path / "results")
    lines = command.dry_run(study, Execution(at_once=3), tmp_path, store)
    assert lines == [
        "tiny: 3 arms x 2 seeds = 6 trials, 0 of them done; 3 at once, 1 threads each",
        "time and disk: unknown until one trial is finished",
        "smallest difference in val/number_path/avg@16 that 2 seeds find in 80 % of such studies: 0.231, and 0.231 "
        "after correction for 1 comparisons; 0.02 matters",
        "warning: with 2 seeds the test cannot reach 0.05 for 1 comparisons: 6 can",
    ]


def test_the_table_has_an_estimate_once_a_trial_is_finished(study: Study, tmp_path: Path) -> None:
    progress = Progress(study, tmp_path, ResultsStore(study, tmp_path / "results"), at_once=2)
    trials = list(study.trials())
    log = tmp_path / "trials/ib,coef=0.2/seed_1.log"
    log.parent.mkdir(parents=True)
    log.write_text("[   76 s]    66/120  reward  0.356\n[   83 s]    72/120  reward  0.329\n")
    lines = progress.table([trials[2]], trials[3:])
    assert lines[3] == "ib,coef=0.2           0       0        1  seed 1 (72/120)"
    assert "the end can be estimated when one is finished" in lines[-1]
    progress.started -= 100.0
    progress.finished_now = 2
    assert "about 250 s left" in progress.table([trials[2]], trials[3:])[-1] or progress.seconds_left(
        5
    ) == pytest.approx(250, abs=2)


def test_settings_that_the_recipe_refuses_are_refused_before_the_first_trial(study: Study) -> None:
    assert [command.refusal_of(trial.arguments) for trial in list(study.trials())[:2]] == ["", ""]
    wrong = Arm({"model.regularizer.coeff": 0.1})
    with pytest.raises(ConfigError, match=r"arms: 'wrong' - model.regularizer.coeff"):
        command.check_trials(replace(study, arms={**study.arms, "wrong": wrong}))


@pytest.mark.parametrize("path", sorted((recipe_folder() / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_can_be_read(path: Path) -> None:
    study = read_study(path)
    assert study.name == path.stem
    assert all(arm.label for arm in study.arms.values())


def test_without_a_study_the_command_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["study", "--seeds", "[1]"])
    assert stop.value.code == 2
    assert "name" in capsys.readouterr().err


def test_failed_trials_end_the_command_with_code_2(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(runner: StudyRunner) -> None:
        for trial in runner.waiting[:2]:
            runner.store.add_failure(trial, 2, "exit code 2")

    monkeypatch.setattr(command, "check_trials", lambda study: None)
    monkeypatch.setattr(StudyRunner, "run", run)
    with pytest.raises(SystemExit) as stop:
        main(["study", "--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "out")])
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == ("error: 2 trials have failed, such as none/seed_1: exit code 2; --retry_failed starts them again")


def test_a_study_file_is_named_by_its_place_in_its_repository(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "plans").mkdir()
    assert command.in_repository([tmp_path / "plans/idea.yaml"]) == "plans/idea.yaml"
    assert command.in_repository(None) == ""
