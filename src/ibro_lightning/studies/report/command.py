"""``python -m ibro_lightning report``: reads results, and writes ``report.html``, ``report.md`` and its images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ibro_lightning.errors import ConfigError
from ibro_lightning.guards.disk import free_name, written_atomically
from ibro_lightning.runs.arguments import OneLineArguments
from ibro_lightning.studies.history import History, history_of
from ibro_lightning.studies.report.blocks import IMAGES, MARK, html, markdown
from ibro_lightning.studies.report.content import report_of
from ibro_lightning.studies.report.figures import SOFTWARE
from ibro_lightning.studies.results import STUDY, read_results
from ibro_lightning.studies.run_folders import read_runs


def report_parser() -> OneLineArguments:
    """The arguments of ``report``."""
    parser = OneLineArguments(
        prog="python -m ibro_lightning report",
        description="Report on a study, or on runs: tables with intervals and tests, curves, and sentences that say "
        "what the numbers show. Writes report.html, which needs no other file, report.md, and its images.",
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER",
        help="a study's results, or the folders of runs; those with equal settings but for the seed are one arm",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="folder to write to; a study's results folder if left out")
    parser.add_argument("--metric", default="", help="of runs: the outcome to compare, such as val/aime/avg@32")
    parser.add_argument(
        "--overwrite", action="store_true", help="move files of the same names that are in the way aside"
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Run ``python -m ibro_lightning report``."""
    arguments = report_parser().parse_args(argv)
    page = write_report(arguments.folders, arguments.output, metric=arguments.metric, overwrite=arguments.overwrite)
    print(f"report    {page}\nmarkdown  {page.with_suffix('.md')}")


def write_report(
    folders: Sequence[Path], output: Path | None = None, *, metric: str = "", overwrite: bool = False
) -> Path:
    """Write a report, and return the path of its ``report.html``.

    Args:
        folders: one results folder of a study, or the folders of runs.
        output: folder to write to; for a study its results folder by default.
        metric: of runs, the outcome to compare.
        overwrite: move files that no report wrote aside where they are in the way, in place of an error.

    Raises:
        ConfigError: there are no results, or something else has a name that the report needs.
    """
    is_study = [(folder / STUDY).is_file() for folder in folders]
    if any(is_study) and len(folders) > 1:
        raise ConfigError("report", str(folders[is_study.index(True)]), "this is a study: report on one at a time")
    if is_study[0] or not _looks_like_run(folders[0]):
        if metric:
            raise ConfigError("metric", metric, "a study's outcome is in its plan: leave this out")
        results = read_results(folders[0])
        history = history_of(folders[0], results.study)
    else:
        if output is None:
            raise ConfigError("output", None, "write the folder for the report, as these are runs: --output FOLDER")
        results, history = read_runs(folders, metric), History()
    report = report_of(results, history)
    folder = output or folders[0]
    files = {folder / IMAGES / f"{figure.name}.png": figure.png for figure in report.figures}
    files |= {folder / "report.md": markdown(report).encode(), folder / "report.html": html(report).encode()}
    for path in files:
        _clear(path, overwrite)
    for path in _outdated(folder / IMAGES, {*files}):
        path.unlink()
    for path, content in files.items():
        with written_atomically(path) as partial:
            partial.write_bytes(content)
    return folder / "report.html"


def _looks_like_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def _clear(path: Path, overwrite: bool) -> None:
    """Make sure that ``path`` is free or an earlier report's."""
    if any(parent.exists() and not parent.is_dir() for parent in path.parents):
        raise ConfigError("output", str(path.parent), "no folder can be there: write another name")
    if not os.path.lexists(path) or _is_ours(path):
        return
    if not overwrite:
        raise ConfigError(
            "output", str(path), "no report wrote it: --overwrite moves it aside, or write another folder"
        )
    aside = free_name(path)
    path.rename(aside)
    print(f"what was in {path} is in {aside}")


def _is_ours(path: Path) -> bool:
    if not path.is_file() or path.is_symlink():
        return False
    with path.open("rb") as file:
        start = file.read(4096)
    return (SOFTWARE if path.suffix == ".png" else MARK).encode() in start


def _outdated(folder: Path, needed: set[Path]) -> list[Path]:
    """Images of an earlier report that this one does not have."""
    return [path for path in sorted(folder.glob("*.png")) if path not in needed and _is_ours(path)]
