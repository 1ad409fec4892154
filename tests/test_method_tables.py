"""The tables of methods say what the classes do, and their recipe lines can be used as they are."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ibro_lightning import regularizers
from ibro_lightning.errors import ConfigError
from ibro_lightning.methods import Method, table
from ibro_lightning.regularizers import EntropyRegularizer
from ibro_lightning.runs.recipes import recipe_folder
from ibro_lightning.studies.spec import read_study
from ibro_lightning.update.surrogates import LOSSES
from method_tables import PAGE, own, tables, written
from methods import chosen
from methods import table as results_table

FORMER = {"CorrectPathEntropySuppression"}
METHODS = dict(own((name, getattr(regularizers, name)) for name in regularizers.__all__))


def test_the_page_is_what_the_classes_say() -> None:
    page = PAGE.read_text()
    assert written(page) == page, "run python benchmarks/method_tables.py"


def test_every_entropy_method_has_a_row_of_its_own() -> None:
    concrete = {
        name
        for name in regularizers.__all__
        if isinstance(kind := getattr(regularizers, name), type)
        and issubclass(kind, EntropyRegularizer)
        and name not in ("EntropyRegularizer", "PolicyLossMethod")
    }
    assert set(METHODS) == concrete - FORMER
    assert len({method.formula for method in METHODS.values()}) == len(METHODS)


def test_every_surrogate_has_a_row() -> None:
    assert set(dict(own(LOSSES.items()))) == set(LOSSES)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_recipe_line_builds_the_method_with_its_defaults(name: str) -> None:
    chosen = yaml.safe_load(METHODS[name].recipe)["regularizer"]
    if name == "NoRegularizer":
        assert chosen is None
        return
    assert chosen["class_path"] == name
    parameters = inspect.signature(getattr(regularizers, name)).parameters
    for setting, value in chosen["init_args"].items():
        assert value == parameters[setting].default, setting
    assert isinstance(getattr(regularizers, name)(**chosen["init_args"]), EntropyRegularizer)


def test_a_table_is_markdown_whatever_the_formula() -> None:
    rows = [("A", Method("|A|/κ", "arXiv 1", "note", "x: 1"))]
    assert table(rows).splitlines()[2:] == ["| `A` | \\|A\\|/κ | arXiv 1 | note | `x: 1` |"]
    assert set(tables()) == {"entropy methods", "surrogates"}


def test_a_certainty_that_nobody_knows_is_refused() -> None:
    unknown: Any = "certain"
    with pytest.raises(ValueError, match="certainty is one of paper"):
        Method("A", "–", unknown, "x: 1")


def test_the_study_of_methods_has_all_of_them_as_they_come() -> None:
    study = read_study(recipe_folder() / "studies" / "methods.yaml")
    assert set(study.arms) == set(METHODS)
    for name, arm in study.arms.items():
        given = arm.settings["model.regularizer"]
        assert set(arm.settings) == {"model.regularizer"}
        if name != "NoRegularizer":
            assert given["class_path"] == name
            assert set(given.get("init_args", {})) <= {"template"}, "the task's, not the method's"


def test_a_part_of_the_study_can_be_chosen_and_shortened() -> None:
    study = read_study(recipe_folder() / "studies" / "methods.yaml")
    part = chosen(study, ["STEER", "SIREN"], 2)
    assert set(part.arms) == {"STEER", "SIREN"}
    assert part.name == "methods_2"
    for setting in ("trainer.max_epochs", "trainer.check_val_every_n_epoch"):
        assert part.settings[setting] == 2
    assert chosen(study, [], None) == study
    with pytest.raises(ConfigError, match=r"methods: 'Siren' - write one of "):
        chosen(study, ["Siren"], None)


def test_the_table_has_the_last_point_of_each_method_in_the_studys_order(tmp_path: Path) -> None:
    columns = ("trial", "arm", "seed", "iteration", "metric", "value")
    rows = [
        ("b/seed_1", "b", 1, 40, "val/number_path/avg@16", 0.25),
        ("b/seed_1", "b", 1, 120, "val/number_path/avg@16", 0.5),
        ("b/seed_1", "b", 1, 120, "policy/entropy", 0.25),
        ("a/seed_1", "a", 1, 120, "rollout/length", 20.0),
    ]
    timings = [("a/seed_1", "a", 1, 120, "trial/cpu_s", 99.6), ("base/seed_1", None, 1, 5, "trial/cpu_s", 7.0)]
    for name, content in (("results", rows), ("timings", timings)):
        table = pa.table([list(column) for column in zip(*content, strict=True)], names=list(columns))
        pq.write_table(table, tmp_path / f"{name}.parquet")
    assert results_table(tmp_path, ["a", "b", "c"]).splitlines()[2:] == [
        "| `a` | – | – | 20.0 | 100 |",
        "| `b` | 50.0 % | 0.250 | – | – |",
    ]
