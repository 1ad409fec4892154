"""Where a section writes its figures as it goes, so that one that is stopped leaves those it has."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Figures:
    """Rows of figures by name, in a file that is complete after each row."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, dict[str, Row]()

    @contextmanager
    def guarded(self, name: str) -> Iterator[Row]:
        """A row to fill. An error within becomes the row's "failed", and the section goes on."""
        row = self.rows[name] = {}
        try:
            yield row
        except Exception as error:
            traceback.print_exc()
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        self.write()

    def write(self) -> None:
        whole = self.path.with_suffix(".partial")
        whole.write_text(json.dumps(self.rows))
        whole.replace(self.path)
