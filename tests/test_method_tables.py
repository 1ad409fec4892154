"""The tables of methods say what the classes do, and their recipe lines can be used as they are."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from helpers.models import TinySource
from ibro_lightning.errors import ConfigError
from ibro_lightning.modules import DAPOModule
from ibro_lightning.regularizers import AdaptiveClip
from ibro_lightning.regularizers.method import Method, table
from ibro_lightning.runs.recipes import recipe_folder
from ibro_lightning.studies.study_file import read_study
from ibro_lightning.update import PolicyLoss
from ibro_lightning.update.advantages import GROUP_RELATIVE
from ibro_lightning.update.surrogates import LOSSES
from method_tables import PAGE, entropy_methods, moving, rows, tables, written
from methods import chosen
from methods import main as run_methods
from methods import table as results_table

METHODS = entropy_methods()


def test_the_page_is_what_the_classes_say() -> None:
    page = PAGE.read_text()
    assert written(page) == page, "run python benchmarks/method_tables.py"
    with pytest.raises(ValueError, match="no place for the table of entropy methods"):
        written(page.replace("<!-- table: entropy methods -->", ""))


def test_every_class_has_a_row_of_its_own() -> None:
    """One that says nothing, or what its base says, would raise KeyError; no two say the same."""
    for classes in (METHODS, moving(), LOSSES, GROUP_RELATIVE):
        said = dict(rows(classes.items()))
        assert len({method.formula for method in said.values()}) == len(said) == len(classes)
        assert len({method.recipe for method in said.values()}) == len(said)
    assert {"SIREN", "EntroPIC", "NoRegularizer"} <= METHODS.keys()
    assert {"TargetEntropy", "AdaptiveClip", "AdaptiveKL"} <= moving().keys()


CHOICES = {**METHODS, **moving()}


@pytest.mark.parametrize("name", CHOICES)
def test_a_recipe_line_builds_the_method_with_its_defaults(name: str) -> None:
    kind = CHOICES[name]
    *others, chosen = yaml.safe_load(vars(kind)["method"].recipe).values()
    assert others == ([0.6] if name == "AdaptiveClip" else []), "its ε, which is clip_ratio_low, too"
    if name == "NoRegularizer":
        assert chosen is None
        return
    assert chosen["class_path"] == name
    parameters = inspect.signature(kind).parameters
    for setting, value in chosen["init_args"].items():
        assert value == parameters[setting].default, setting
    assert isinstance(kind(**chosen["init_args"]), kind)


def test_an_advantages_recipe_line_is_its_name() -> None:
    for name, method in rows(GROUP_RELATIVE.items()):
        assert yaml.safe_load(method.recipe) == {"advantage": name}


PAPERS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "gspo": {"aggregation": "seq-mean-token-mean", "clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4},
    "cispo": {"clip_ratio_low": 1, "clip_ratio_high": 4},
    "gmpo": {"aggregation": "seq-mean-token-mean", "clip_ratio_low": 0.4, "clip_ratio_high": 0.4},
    "dppo": {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2},
    "sapo": {"aggregation": "seq-mean-token-mean"},
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_surrogates_recipe_line_is_the_method_of_its_paper_and_builds_it(name: str) -> None:
    (line,) = (method.recipe for found, method in rows(LOSSES.items()) if found == name)
    settings = yaml.safe_load(line)
    assert settings == {"surrogate": name, **PAPERS[name]}
    loss = DAPOModule(TinySource(), **settings).policy_loss
    assert type(loss) is LOSSES[name]
    defaults = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "aggregation": "token-mean"}
    assert {setting: getattr(loss, setting) for setting in defaults} == {**defaults, **PAPERS[name]}


def test_adaptive_clips_recipe_line_has_one_epsilon_for_both_bounds() -> None:
    """[1 − 0.6, 1/(1 − 0.6)] before it widens."""
    settings = yaml.safe_load(AdaptiveClip.method.recipe)
    clip = AdaptiveClip(**settings["clip_ratio_high"]["init_args"])
    loss = PolicyLoss(clip_ratio_low=settings["clip_ratio_low"], clip_ratio_high=clip)
    assert (1 - loss.clip_ratio_low, 1 + loss.clip_ratio_high) == pytest.approx((0.4, 2.5))


def test_a_table_is_markdown_whatever_the_formula() -> None:
    rows = [("A", Method("|A|/κ", "arXiv 1", "note", "x: 1"))]
    assert table(rows).splitlines()[2:] == ["| `A` | \\|A\\|/κ | arXiv 1 | note | `x: 1` |"]
    assert set(tables()) == {"entropy methods", "coefficients", "surrogates", "advantages", "the quick start"}


def test_a_certainty_that_nobody_knows_is_refused() -> None:
    unknown: Any = "certain"
    with pytest.raises(ValueError, match="certainty is one of paper"):
        Method("A", "–", unknown, "x: 1")


def test_the_study_of_methods_has_all_of_them_as_they_come() -> None:
    study = read_study(recipe_folder() / "studies" / "methods.yaml")
    others = {**dict.fromkeys(LOSSES, "surrogate"), **dict.fromkeys(GROUP_RELATIVE, "advantage")}
    del others["ppo"], others["grpo"]  # those of NoRegularizer
    assert set(study.arms) == {*METHODS, *others, "adaptive_clip"}
    for name in METHODS:
        settings = study.arms[name].settings
        assert set(settings) == {"model.regularizer"}
        if name != "NoRegularizer":
            assert settings["model.regularizer"]["class_path"] == name
            arguments = settings["model.regularizer"].get("init_args", {})
            assert set(arguments) <= {"template"}, "the task's, not the method's"
    lines = dict(rows([*LOSSES.items(), *GROUP_RELATIVE.items()]))
    for name in others:
        chosen = {f"model.{setting}": value for setting, value in yaml.safe_load(lines[name].recipe).items()}
        assert study.arms[name].settings == {"model.regularizer": None, **chosen}
    clip = study.arms["adaptive_clip"].settings
    line = yaml.safe_load(AdaptiveClip.method.recipe)
    assert clip["model.clip_ratio_low"] == line["clip_ratio_low"]
    assert clip["model.clip_ratio_high"] == {"class_path": line["clip_ratio_high"]["class_path"]}


def test_a_part_of_the_study_can_be_chosen_and_shortened() -> None:
    study = read_study(recipe_folder() / "studies" / "methods.yaml")
    part = chosen(study, ["STEER", "SIREN"], [3, 4], 2)
    assert set(part.arms) == {"STEER", "SIREN"}
    assert part.name == "methods_2"
    assert [trial.seed for trial in part.trials()] == [3, 3, 4, 4]
    for setting in ("trainer.max_epochs", "trainer.check_val_every_n_epoch"):
        assert part.settings[setting] == 2
    assert chosen(study, [], [], None) == study
    with pytest.raises(ConfigError, match=r"methods: 'Siren' - write one of "):
        chosen(study, ["Siren"], [], None)


def test_the_table_has_the_last_point_of_each_method_in_the_studys_order(tmp_path: Path) -> None:
    columns = ("trial", "arm", "seed", "iteration", "metric", "value")
    rows = [
        ("b/seed_1", "b", 1, 40, "val/number_path/avg@16", 0.25),
        ("b/seed_1", "b", 1, 120, "val/number_path/avg@16", 0.5),
        ("b/seed_1", "b", 1, 120, "policy/entropy", 0.25),
        ("b/seed_2", "b", 2, 120, "val/number_path/avg@16", 0.6),
        ("b/seed_3", "b", 3, 120, "val/number_path/avg@16", 0.7),
        ("a/seed_1", "a", 1, 120, "rollout/length", 20.0),
    ]
    timings = [("a/seed_1", "a", 1, 120, "trial/cpu_s", 99.6), ("base/seed_1", None, 1, 5, "trial/cpu_s", 7.0)]
    for name, content in (("results", rows), ("timings", timings)):
        table = pa.table([list(column) for column in zip(*content, strict=True)], names=list(columns))
        pq.write_table(table, tmp_path / f"{name}.parquet")
    assert results_table(tmp_path, ["a", "b", "c"]).splitlines()[2:] == [
        "| `a` | – | – | 20.0 | 100 |",
        "| `b` | 50.0 | 0.250 | – | – |",
        "| `b`, 3 seeds | 60.0 ± 10.0 | 0.250 | – | – |",
    ]


def test_a_table_of_nothing_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_methods(["--table", "--output", str(tmp_path)])
    assert "run this without --table first" in capsys.readouterr().err
