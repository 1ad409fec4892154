"""Writes the tables of docs/methods.md from what each method's class says of itself.

python benchmarks/method_tables.py                # a test says when it is due
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ibro_lightning import regularizers
from ibro_lightning.methods import Method, table
from ibro_lightning.update.surrogates import LOSSES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"


def own(classes: Iterable[tuple[str, object]]) -> Iterator[tuple[str, Method]]:
    """Those with an attribute ``method`` of their own."""
    for name, found in classes:
        if isinstance(method := getattr(found, "__dict__", {}).get("method"), Method):
            yield name, method


def tables() -> dict[str, str]:
    """Each table by the name in its markers."""
    entropy = ((name, getattr(regularizers, name)) for name in regularizers.__all__)
    return {"entropy methods": table(own(entropy)), "surrogates": table(own(LOSSES.items()))}


def written(page: str) -> str:
    """The page with its tables as they should be, between ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    for name, content in tables().items():
        before, found, after = page.partition(f"<!-- table: {name} -->\n")
        _, end, after = after.partition("<!-- end -->")
        assert found, f"docs/methods.md has no place for the table of {name}"
        assert end, f"docs/methods.md has no place for the table of {name}"
        page = f"{before}{found}{content}\n{end}{after}"
    return page


def main() -> None:
    PAGE.write_text(written(PAGE.read_text()))


if __name__ == "__main__":
    main()
