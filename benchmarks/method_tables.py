"""Writes the tables of docs/methods.md: from what each method's class says of itself, and from docs/studies/methods.

python benchmarks/method_tables.py                # a test says when it is due
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ibro_lightning import regularizers
from ibro_lightning.regularizers import EntropyRegularizer, coefficients
from ibro_lightning.regularizers.coefficients import Coefficient
from ibro_lightning.regularizers.method import Method, table
from ibro_lightning.runs.recipes import recipe_folder
from ibro_lightning.studies.study_file import read_study
from ibro_lightning.update.advantages import GROUP_RELATIVE
from ibro_lightning.update.surrogates import LOSSES
from methods import table as quick_start_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
RESULTS = PAGE.parent / "studies" / "methods"
Named = Iterable[tuple[str, type]]


def entropy_methods() -> dict[str, type]:
    """The package's concrete ones, without the former name of one of them."""
    exported = {name: getattr(regularizers, name) for name in regularizers.__all__}
    left_out = ("EntropyRegularizer", "PolicyLossMethod", "CorrectPathEntropySuppression")
    return {n: kind for n, kind in exported.items() if issubclass(kind, EntropyRegularizer) and n not in left_out}


def moving() -> dict[str, type]:
    """The coefficients that follow a measurement."""
    found = {name: getattr(coefficients, name) for name in coefficients.__all__}
    kinds = {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, Coefficient)}
    return {name: kind for name, kind in sorted(kinds.items()) if kind.measures is not None}


def rows(classes: Named) -> Iterator[tuple[str, Method]]:
    """What each class says of itself. Raises KeyError where one says nothing."""
    yield from ((name, vars(kind)["method"]) for name, kind in classes)


def tables() -> dict[str, str]:
    """Each table by the name in its markers."""
    classes: dict[str, Named] = {
        "entropy methods": entropy_methods().items(),
        "coefficients": moving().items(),
        "surrogates": LOSSES.items(),
        "advantages": GROUP_RELATIVE.items(),
    }
    arms = list(read_study(recipe_folder() / "studies" / "methods.yaml").arms)
    of_classes = {name: table(rows(named)) for name, named in classes.items()}
    return {**of_classes, "the quick start": quick_start_table(RESULTS, arms)}


def written(page: str) -> str:
    """The page with its tables as they should be, between ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    for name, content in tables().items():
        before, found, after = page.partition(f"<!-- table: {name} -->\n")
        _, end, after = after.partition("<!-- end -->")
        if not (found and end):
            raise ValueError(f"docs/methods.md has no place for the table of {name}")
        page = f"{before}{found}{content}\n{end}{after}"
    return page


def main() -> None:
    PAGE.write_text(written(PAGE.read_text()))


if __name__ == "__main__":
    main()
