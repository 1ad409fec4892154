"""What a report consists of, and its two forms: HTML and Markdown, by templates beside this file."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ibro_lightning import __version__
from ibro_lightning.studies.report.figures import Figure

MARK = "written by ibro_lightning report"
"""In both files: how a later report knows that it may replace them."""
IMAGES = "report_images"
"""Folder of the images beside ``report.md``."""


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    paragraphs: Sequence[str]
    kind: str = "text"


@dataclass(frozen=True)
class Notice:
    """Something a reader must not miss."""

    text: str
    kind: str = "notice"


@dataclass(frozen=True)
class Items:
    """A list."""

    items: Sequence[str]
    kind: str = "items"


@dataclass(frozen=True)
class Table:
    """Rows of text under columns; all columns but the first ``words`` are aligned to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    words: int = 1
    kind: str = "table"


@dataclass(frozen=True)
class Figures:
    """Images side by side where there is room."""

    figures: Sequence[Figure]
    kind: str = "figures"


@dataclass(frozen=True)
class Code:
    """Text to be kept as it is; folded under ``summary`` if there is one."""

    text: str
    summary: str = ""
    kind: str = "code"


Block = Text | Notice | Items | Table | Figures | Code


@dataclass(frozen=True)
class Section:
    """A part of the report under its heading."""

    title: str
    blocks: Sequence[Block]
    exploratory: bool = False
    """Not planned, and marked as such."""


@dataclass(frozen=True)
class Report:
    """All of a report."""

    title: str
    sections: Sequence[Section]
    lead: Sequence[Block] = field(default_factory=tuple)
    """Before the first heading."""

    @property
    def figures(self) -> list[Figure]:
        """All images, in order."""
        blocks = [*self.lead, *(block for section in self.sections for block in section.blocks)]
        return [figure for block in blocks if isinstance(block, Figures) for figure in block.figures]


def html(report: Report) -> str:
    """One file that needs nothing beside it: images are inside."""
    return _environment(autoescape=True).get_template("report.html.jinja").render(**_context(report))


def markdown(report: Report) -> str:
    """For repositories; images are in :data:`IMAGES`."""
    text = _environment(autoescape=False).get_template("report.md.jinja").render(**_context(report))
    return re.sub(r"\n{3,}", "\n\n", text)


def _context(report: Report) -> dict[str, Any]:
    return {"report": report, "mark": f"{MARK} {__version__}", "images": IMAGES}


def _environment(*, autoescape: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "base64": lambda png: Markup(base64.b64encode(png).decode()),
        "md": _md,
        "cell": lambda text: _md(text).replace("|", "\\|").replace("\n", " "),
        "fence": lambda text: "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0)),
        "anchor": lambda text: "-".join(re.findall(r"\w+", text.lower())),
    }
    return environment


def _md(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*<~$])|\](?=\()|(?<!\w)_|_(?!\w)", lambda match: "\\" + match[0], text)
