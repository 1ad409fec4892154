"""Every method on the quick start with one seed: accuracy, entropy, length and CPU seconds, in one table.

python benchmarks/methods.py                                          # studies/methods.yaml as it is: an hour
python benchmarks/methods.py --methods NoRegularizer --seeds 1 2 3 4  # how far seeds alone lie apart, in the same table
python benchmarks/methods.py --methods SIREN STEER --iterations 2     # a part of it
python benchmarks/methods.py --table                                  # only the table of what is there

It is a study: killed, the same command goes on where it stopped, and a method that is finished is not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pyarrow.parquet as pq

from ibro_lightning.cli.study import main as run_study
from ibro_lightning.errors import check_one_of
from ibro_lightning.runs.recipes import recipe_folder
from ibro_lightning.studies.study_file import Study, as_yaml, read_study

COLUMNS = {
    "val/number_path/avg@16": ("accuracy, %", 100, 1),
    "policy/entropy": ("entropy, nats", 1, 3),
    "rollout/length": ("length, tokens", 1, 1),
    "trial/cpu_s": ("CPU s", 1, 0),
}
"""``{metric: (title, scale, digits)}``"""


def chosen(study: Study, methods: Sequence[str], seeds: Sequence[int], iterations: int | None) -> Study:
    """The study with these arms and seeds alone, if any are named, evaluated after this many iterations."""
    for name in methods:
        check_one_of("methods", name, list(study.arms))
    arms = {name: arm for name, arm in study.arms.items() if not methods or name in methods}
    study = replace(study, arms=arms, seeds=[*seeds] or study.seeds)
    if iterations is None:
        return study
    lengths = {"trainer.max_epochs": iterations, "trainer.check_val_every_n_epoch": iterations}
    name = f"{study.name}_{iterations}"  # of other settings, and so in another folder
    return replace(study, name=name, settings={**study.settings, **lengths})


def table(results: Path, arms: Sequence[str]) -> str:
    """The last point of each column, in Markdown: a row for the first seed of each arm, in the order of the study, and
    for arms with several seeds another row with their mean and standard deviation."""
    rows = [row for file in ("results", "timings") for row in pq.read_table(results / f"{file}.parquet").to_pylist()]
    found: dict[str, dict[int, dict[str, float]]] = {}
    for row in sorted(rows, key=lambda row: row["iteration"]):
        found.setdefault(row["arm"], {}).setdefault(row["seed"], {})[row["metric"]] = row["value"]
    lines = [
        f"| method | {' | '.join(title for title, *_ in COLUMNS.values())} |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    there = [arm for arm in arms if arm in found]
    lines += [line(f"`{arm}`", [found[arm][min(found[arm])]]) for arm in there]
    repeated = [arm for arm in there if len(found[arm]) > 1]
    lines += [line(f"`{arm}`, {len(found[arm])} seeds", list(found[arm].values())) for arm in repeated]
    return "\n".join(lines)


def line(name: str, trials: Sequence[Mapping[str, float]]) -> str:
    """One row: values of one trial, or mean ± standard deviation over several."""
    cells = []
    for metric, (_, scale, digits) in COLUMNS.items():
        values = [scale * trial[metric] for trial in trials if metric in trial]
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{mean(values):.{digits}f}{spread}" if values else "–")
    return f"| {name} | {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=[], help="arms of the study file; all of them by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="the study file's by default")
    parser.add_argument("--iterations", type=int, help="of each run; the study file's by default")
    parser.add_argument("--study", type=Path, default=recipe_folder() / "studies" / "methods.yaml")
    parser.add_argument("--output", type=Path, default=Path("runs/studies"), help="a folder of the study goes there")
    parser.add_argument("--results", type=Path, help="the results' folder, from which the study continues elsewhere")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    whole = read_study(options.study)
    study = chosen(whole, options.methods, options.seeds, options.iterations)
    folder = options.output / study.name
    results = options.results or folder / "results"
    if not options.table:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "chosen.yaml").write_text(as_yaml(study))
        run_study(["--config", str(folder / "chosen.yaml"), "--output", str(folder), "--results", str(results)])
    if not (results / "results.parquet").exists():
        parser.error(f"--table: there are no results in {results} yet; run this without --table first")
    print(table(results, list(whole.arms)))


if __name__ == "__main__":
    main()
