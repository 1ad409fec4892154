"""The tables of methods say what the classes do, and their recipe lines can be used as they are."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import yaml

from ibro_lightning import regularizers
from ibro_lightning.methods import Method, table
from ibro_lightning.regularizers import EntropyRegularizer
from ibro_lightning.update.surrogates import LOSSES
from method_tables import PAGE, own, tables, written

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
