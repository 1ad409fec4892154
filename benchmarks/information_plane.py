"""What the curves ``information/…`` cost: CPU seconds of the callback over those of the iterations around it.

    python benchmarks/information_plane.py --policy runs/sft_quickstart/model
    python benchmarks/information_plane.py --policy runs/sft_quickstart/model --prompts 16 24
    python benchmarks/information_plane.py --policy runs/sft_quickstart/model --data.dynamic_sampling null

One run of the quick start, in which every second iteration is measured, with each size in turn. The share is the CPU
seconds of a measurement over ``period`` times those of the iterations before and after it, without measurements: what
a run with that period spends on it. The processes in which rewards run are not counted, which makes the share larger.
Further arguments go to the command line.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ibro_lightning.callbacks.information_plane as callback
from ibro_lightning.callbacks import InformationPlane, MetricsLog
from ibro_lightning.cli.main import main as command_line

RECIPE = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
TEMPLATE = "{meta[solution]}!{prompt}"
PARTS = {"answer_parts": "answer", "regularizer_share": "gradient", "ending_parts": "endings"}


class Clock:
    """CPU seconds of iterations, and of measurements and their parts."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.ends: list[float] = []
        self.spent: dict[int, dict[str, float]] = defaultdict(dict)
        """By iteration, from 1."""

    @property
    def iteration(self) -> int:
        return len(self.ends) + 1

    def size(self, iteration: int) -> int:
        return self.sizes[iteration // 2 % len(self.sizes)]

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **settings: Any) -> Any:
            start = time.process_time()
            result = work(*arguments, **settings)
            self.spent[self.iteration][name] = time.process_time() - start
            return result

        return run

    def install(self) -> None:
        measure = self.timed("all", InformationPlane.on_experience)
        log = MetricsLog.on_train_batch_end

        def sized(plane: InformationPlane, *arguments: Any) -> Any:
            plane.prompts = self.size(self.iteration)
            return measure(plane, *arguments)

        def logged(metrics_log: MetricsLog, *arguments: Any) -> None:
            log(metrics_log, *arguments)
            self.ends.append(time.process_time())

        replacements: list[tuple[Any, str, Callable[..., Any]]] = [
            (InformationPlane, "on_experience", sized),
            (InformationPlane, "plane", self.timed("plane", InformationPlane.plane)),
            (MetricsLog, "on_train_batch_end", logged),
            *((callback, name, self.timed(part, getattr(callback, name))) for name, part in PARTS.items()),
        ]
        for owner, name, replacement in replacements:
            setattr(owner, name, replacement)

    def own(self, iteration: int) -> float:
        """CPU seconds of an iteration, from the end of the one before, without its measurement."""
        return self.ends[iteration - 1] - self.ends[iteration - 2] - self.spent[iteration].get("all", 0.0)


def report(clock: Clock, period: int) -> None:
    measured = [n for n in range(3, len(clock.ends)) if "plane" in clock.spent[n]]
    for size in clock.sizes:
        mine = [n for n in measured if clock.size(n) == size]
        around = {n: (clock.own(n - 1) + clock.own(n + 1)) / 2 for n in mine}
        print(f"M = {size}, every {period} iterations, n = {len(mine)}; an iteration takes "
              f"{statistics.median(around.values()):.3f} CPU s")  # fmt: skip
        for part in ("all", "plane", "answer", "gradient", "endings"):
            shares = [clock.spent[n][part] / (period * around[n]) for n in mine]
            low, middle, high = statistics.quantiles(shares, n=4)
            print(f"  {part:9} {middle:7.2%} of the run (quartiles {low:.2%} to {high:.2%})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="runs/sft_quickstart/model", help="the quick start's base policy")
    parser.add_argument("--iterations", type=int, default=40, help="of the run; the first two do not count")
    parser.add_argument("--prompts", type=int, nargs="+", default=[InformationPlane().prompts], help="M, in turn")
    parser.add_argument("--period", type=int, default=InformationPlane().every_n_iterations)
    options, others = parser.parse_known_args()
    clock = Clock(options.prompts)
    clock.install()
    with tempfile.TemporaryDirectory() as folder:
        run = ["--config", str(RECIPE), "--model.policy", options.policy, "--data.eval_sets", "null"]
        epochs = ["--trainer.max_epochs", str(options.iterations), "--trainer.default_root_dir", folder]
        plane = ["--information_plane.every_n_iterations", "2", "--information_plane.template", TEMPLATE]
        command_line(["fit", *run, *epochs, *plane, *others])
    report(clock, options.period)


if __name__ == "__main__":
    main()
