"""Every method on the quick start with one seed: accuracy, entropy, length and CPU seconds, in one table.

python benchmarks/methods.py                                          # studies/methods.yaml as it is: hours
python benchmarks/methods.py --methods SIREN STEER --iterations 2     # a part of it
python benchmarks/methods.py --table                                  # only the table of what is there

It is a study: killed, the same command goes on where it stopped, and a method that is finished is not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ibro_lightning.cli.study import main as run_study
from ibro_lightning.errors import check_one_of
from ibro_lightning.runs.recipes import recipe_folder
from ibro_lightning.studies.spec import Study, as_yaml, read_study

COLUMNS = {
    "val/number_path/avg@16": ("accuracy", lambda value: f"{100 * value:.1f} %"),
    "policy/entropy": ("entropy, nats", lambda value: f"{value:.3f}"),
    "rollout/length": ("length, tokens", lambda value: f"{value:.1f}"),
    "trial/cpu_s": ("CPU s", lambda value: f"{value:.0f}"),
}


def chosen(study: Study, methods: Sequence[str], iterations: int | None) -> Study:
    """The study with these arms alone, if any are named, and of this length, with an evaluation at its end."""
    for name in methods:
        check_one_of("methods", name, list(study.arms))
    arms = {name: arm for name, arm in study.arms.items() if not methods or name in methods}
    if iterations is None:
        return replace(study, arms=arms)
    lengths = {"trainer.max_epochs": iterations, "trainer.check_val_every_n_epoch": iterations}
    name = f"{study.name}_{iterations}"  # of other settings, and so in another folder
    return replace(study, name=name, arms=arms, settings={**study.settings, **lengths})


def table(results: Path, arms: Sequence[str]) -> str:
    """The last point of each column for each arm, in the order of the study, in Markdown."""
    rows = [row for file in ("results", "timings") for row in pq.read_table(results / f"{file}.parquet").to_pylist()]
    found: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["iteration"]):
        found.setdefault(row["arm"], {})[row["metric"]] = row["value"]
    lines = [
        f"| method | {' | '.join(title for title, _ in COLUMNS.values())} |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join(lines + [line(arm, found[arm]) for arm in arms if arm in found])


def line(arm: str, values: Mapping[str, float]) -> str:
    cells = (shown(values[metric]) if metric in values else "–" for metric, (_, shown) in COLUMNS.items())
    return f"| `{arm}` | {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=[], help="arms of the study file; all of them by default")
    parser.add_argument("--iterations", type=int, help="of each run; the study file's by default")
    parser.add_argument("--study", type=Path, default=recipe_folder() / "studies" / "methods.yaml")
    parser.add_argument("--output", type=Path, default=Path("runs/studies"), help="a folder of the study goes there")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    whole = read_study(options.study)
    study = chosen(whole, options.methods, options.iterations)
    folder = options.output / study.name
    if not options.table:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "chosen.yaml").write_text(as_yaml(study))
        run_study(["--config", str(folder / "chosen.yaml"), "--output", str(folder)])
    print(table(folder / "results", list(whole.arms)))


if __name__ == "__main__":
    main()
