"""TRL and ours on the same work, in turns, one thread each: CPU seconds per iteration and peak memory. See README.md.

    python benchmarks/against_trl.py quickstart --policy runs/sft_quickstart/model
    python benchmarks/against_trl.py sums [--smollm2 FOLDER]
    python benchmarks/against_trl.py quickstart --baseline ../another_checkout [--no_trl]

Each turn runs every side once, in processes of their own: A B A B. Figures are medians with quartiles; ratios are taken
within a turn. Both must have done the same work, which is checked; --learn checks that both learn from it, too.
TRL gets an environment of its own, made when it is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from peers.environment import PINS, environment
from peers.figures import differences, learned, median_cpu_s
from peers.tables import learning_table, phase_table, side_table, summary
from peers.work import Job, Report, comparable, read_recipe

HERE = Path(__file__).resolve().parent
TREE = HERE.parent
RECIPES = {"quickstart": "quickstart.yaml", "sums": "smollm2_arithmetic.yaml"}


class Bench:
    """The sides, their recipes, and a folder for jobs, reports and logs."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.trees = {"ours": TREE} | ({"baseline": options.baseline.resolve()} if options.baseline else {})
        self.recipes = {side: folder / f"recipe-{side}.yaml" for side in self.trees}
        """By tree, because a setting may be newer than the baseline. TRL reads ours."""
        for side, tree in self.trees.items():
            shipped = read_recipe(tree / "configs" / RECIPES[options.task])
            self.recipes[side].write_text(yaml.safe_dump(comparable(shipped)))
        self.settings = read_recipe(self.recipes["ours"])["data"]["init_args"]
        self.trl_python = None if options.no_trl else environment(options.env)
        self.policy = self._policy()
        self.micro_batch: int | None = None

    @property
    def sides(self) -> list[str]:
        return [*self.trees, *(["trl"] if self.trl_python else [])]

    def _policy(self) -> Path:
        named = self.options.policy if self.options.task == "quickstart" else self.options.smollm2
        if named is not None:
            if not (named / "config.json").exists():
                remedies = {
                    "quickstart": f"--policy: there is no model in {named}: run make quickstart, or name another",
                    "sums": f"--smollm2: there is no model in {named}: name another folder, or leave it out",
                }
                raise SystemExit(remedies[self.options.task])
            return named.resolve()
        print("sums: random weights of SmolLM2-135M's sizes, since no --smollm2 names a folder with trained ones")
        made = self.folder / "smollm2"
        if not (made / "config.json").exists():
            self._python("ours", ["-m", "peers.smollm2", str(made)], "smollm2")
        return made

    def run(self, side: str, turn: int, iterations: int, micro_batch: int | None = None) -> Report:
        """One run of one side; the turn is the seed."""
        name = f"{side}-{turn}" if micro_batch is None else f"{side}-{micro_batch}-{turn}"
        job, report = self.folder / f"{name}.job.json", self.folder / f"{name}.json"
        report.unlink(missing_ok=True)
        Job(
            side=side,
            recipe=str(self.recipes.get(side, self.recipes["ours"])),
            policy=str(self.policy),
            problems=str(self._problems(turn, iterations)),
            iterations=iterations,
            seed=turn,
            report=str(report),
            micro_batch=micro_batch,
            arguments=tuple(self.options.ours_args.split()) if side == "ours" else (),
        ).write(job)
        self._python(side, ["-m", f"peers.{'trl_side' if side == 'trl' else 'ours'}", str(job)], name)
        return Report.read(report)

    def _problems(self, turn: int, iterations: int) -> Path:
        count = iterations * self.settings["prompts_per_rollout"]
        file = self.folder / f"problems-{turn}-{count}.jsonl"
        if not file.exists():
            self._python(
                "ours",
                ["-m", "peers.problems", str(self.recipes["ours"]), str(turn), str(count), str(file)],
                "problems",
            )
        return file

    def _python(self, side: str, arguments: list[str], log: str) -> None:
        """Run ``arguments`` with the side's interpreter and source tree; its output goes to ``log``."""
        python = str(self.trl_python) if side == "trl" else sys.executable
        threads = str(self.options.trl_threads if side == "trl" else self.options.threads)
        tree = self.trees.get(side, TREE)
        own = {
            "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(HERE)]),
            "OMP_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        path = self.folder / f"{log}.log"
        with path.open("w") as output:
            ended = subprocess.run(
                [python, *arguments], env=os.environ | own, cwd=self.folder, stdout=output, stderr=subprocess.STDOUT
            )
        if ended.returncode:
            end = "\n".join(path.read_text().splitlines()[-15:])
            raise SystemExit(f"{side} ended with {ended.returncode}; the end of {path}:\n{end}")

    def fastest(self, micro_batches: Sequence[int]) -> int:
        """TRL's fastest micro-batch: they take turns, and the lowest median CPU time wins."""
        if len(micro_batches) == 1:
            return micro_batches[0]
        turns, iterations = {"quickstart": (2, 4), "sums": (1, 2)}[self.options.task]
        taken: dict[int, list[float]] = {size: [] for size in micro_batches}
        for turn in range(turns):
            for size in micro_batches:
                taken[size].append(median_cpu_s(self.run("trl", turn, iterations, size)))
        medians = {size: statistics.median(values) for size, values in taken.items()}
        print("trl by micro-batch, CPU s / iteration: " + ", ".join(f"{k}: {v:.3g}" for k, v in medians.items()))
        return min(medians, key=lambda size: medians[size])


def measure(bench: Bench, turns: int, iterations: int) -> dict[str, list[Report]]:
    """``turns`` reports of each side. Every other turn runs the sides in the opposite order."""
    reports: dict[str, list[Report]] = {side: [] for side in bench.sides}
    for turn in range(turns):
        for side in bench.sides[:: 1 if turn % 2 == 0 else -1]:
            reports[side].append(bench.run(side, turn, iterations, bench.micro_batch if side == "trl" else None))
            print(
                f"turn {turn + 1}/{turns} {side}: {median_cpu_s(reports[side][-1]):.3f} CPU s / iteration", flush=True
            )
    return reports


def verdicts(reports: dict[str, list[Report]], learn: bool) -> list[str]:
    """What forbids to compare the figures: other work, or a side that does not learn."""
    found = []
    for side in [side for side in reports if side != "ours"]:
        found += [f"ours and {side} differ: {text}" for text in differences(reports["ours"], reports[side])]
    if learn:
        found += [f"{side} does not learn" for side, own in reports.items() if not learned(own)]
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=RECIPES)
    parser.add_argument("--policy", type=Path, default=Path("runs/sft_quickstart/model"), help="of the quick start")
    parser.add_argument("--smollm2", type=Path, help="SmolLM2-135M-Instruct's folder; random weights without it")
    parser.add_argument("--turns", type=int, help="runs of each side; by default 5, and 3 of sums")
    parser.add_argument("--iterations", type=int, help="per run, after one to warm up; by default 6, and 2 of sums")
    parser.add_argument(
        "--env", type=Path, help=f"folder of TRL's environment ({' '.join(PINS)}); made if it is missing"
    )
    parser.add_argument(
        "--micro_batches", type=int, nargs="+", default=[], help="of TRL, responses: the fastest is taken"
    )
    parser.add_argument("--baseline", type=Path, help="another source tree of ours, as a further side")
    parser.add_argument("--no_trl", action="store_true", help="only our own trees")
    parser.add_argument("--learn", action="store_true", help="fail unless every side's accuracy rises")
    parser.add_argument("--threads", type=int, default=1, help="of our sides")
    parser.add_argument("--trl_threads", type=int, default=1)
    parser.add_argument(
        "--ours_args", default="", help="further arguments of our fit (not the baseline's), in one text"
    )
    parser.add_argument("--folder", type=Path, help="keeps jobs, reports and logs; by default a temporary one")
    parser.add_argument("--json", type=Path, help="writes the figures here, too")
    options = parser.parse_args(arguments)
    if options.learn and options.task == "sums" and options.smollm2 is None:
        parser.error("--learn: random weights do not learn sums: give --smollm2 FOLDER, or compare on quickstart")
    if options.no_trl and options.baseline is None:
        parser.error("--no_trl: nothing is left to compare with: give --baseline FOLDER")
    options.turns = options.turns or {"quickstart": 5, "sums": 3}[options.task]
    options.iterations = options.iterations or {"quickstart": 6, "sums": 2}[options.task]
    return options


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(options, (options.folder or Path(temporary)).resolve())
        if bench.trl_python and options.micro_batches:
            bench.micro_batch = bench.fastest(options.micro_batches)
        reports = measure(bench, options.turns, options.iterations + 1)
    print(f"\n{options.task}: {options.turns} turns of {options.iterations} iterations after one to warm up")
    print(side_table(reports), phase_table(reports), *([learning_table(reports)] if options.learn else []), sep="\n")
    failed = verdicts(reports, options.learn)
    print("same work: " + ("; ".join(failed) if failed else "yes"))
    if options.json:
        options.json.write_text(json.dumps(summary(reports, failed) | {"micro_batch": bench.micro_batch}, indent=1))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
