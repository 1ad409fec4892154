"""What overlap gains: runs of a recipe with ``data.max_staleness`` 0 and 1 take turns, on the same cores.

    python benchmarks/overlap.py --policy runs/sft_quickstart/model
    python benchmarks/overlap.py --config smollm2_arithmetic.yaml --policy FOLDER --python .venv-vllm/bin/python

Prints medians [quartiles] over all iterations but the first two of each run: wall time of an iteration; its two sides
(generate: sync, check, generation and rewards; update: scoring and update); with overlap the ratio of the first to the
longer of these, and to the wall time without. CPU seconds of an iteration, of all processes, are those of a whole run
less those of one of two iterations. On a machine that does other work wall time says little, and CPU seconds whether
overlap costs any.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SHORT = 2
"""Iterations of the short run, and those left out at the beginning of a long one."""
SIDES = {"generate": ("sync", "verify", "generate", "reward"), "update": ("prepare", "update")}


def fit(settings: argparse.Namespace, staleness: int, iterations: int, folder: Path) -> float:
    """CPU seconds of a run, of all its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [
        *(settings.python, "-m", "ibro_lightning", "fit", "--config", settings.config),
        *("--model.policy", settings.policy, "--trainer.default_root_dir", str(folder)),
        *("--trainer.max_epochs", str(iterations), "--trainer.limit_val_batches", "0"),
        *("--data.max_staleness", str(staleness), "--checkpoint.every_n_iterations", "0"),
        *("--model.old_logp", "policy", *settings.others),  # as overlap needs; the same on both sides
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(done.stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def times(folder: Path) -> dict[str, list[float]]:
    """Seconds by iteration: ``wall``, and each side."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    ends = [event.wall_time for event in events.Scalars("rollout/reward")]
    found = {"wall": [end - start for start, end in zip(ends[SHORT - 1 :], ends[SHORT:], strict=False)]}
    for side, phases in SIDES.items():
        columns = [[event.value for event in events.Scalars(f"time/{phase}_s")] for phase in phases]
        found[side] = [sum(row) for row in zip(*columns, strict=True)][SHORT:]
    return found


def shown(values: Sequence[float]) -> str:
    if len(values) == 1:  # CPU seconds, with one run of each kind
        return f"{values[0]:.2f}"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="of the recipe, such as runs/sft_quickstart/model")
    parser.add_argument("--config", default="quickstart.yaml")
    parser.add_argument("--iterations", type=int, default=20, help="of each run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("others", nargs="*", help="after --: further settings of fit")
    settings = parser.parse_args()
    seconds: dict[int, dict[str, list[float]]] = {staleness: {} for staleness in (0, 1)}
    cpu: dict[int, list[float]] = {0: [], 1: []}
    for repeat in range(settings.repeats):
        for staleness in (0, 1) if repeat % 2 else (1, 0):
            with tempfile.TemporaryDirectory() as place:
                short = fit(settings, staleness, SHORT, Path(place, "short"))
                whole = fit(settings, staleness, settings.iterations, Path(place, "whole"))
                cpu[staleness].append((whole - short) / (settings.iterations - SHORT))
                for name, values in times(Path(place, "whole")).items():
                    seconds[staleness].setdefault(name, []).extend(values)
    for staleness, name in ((0, "off"), (1, "on")):
        own = seconds[staleness]
        parts = ", ".join(f"{part} {shown(own[part])}" for part in own)
        print(f"overlap {name}: seconds of an iteration: {parts}; CPU seconds {shown(cpu[staleness])}")
    on = seconds[1]
    longer = [wall / max(sides) for wall, *sides in zip(on["wall"], on["generate"], on["update"], strict=True)]
    off = statistics.median(seconds[0]["wall"])
    print(f"wall time / the longer side: {shown(longer)}")
    print(f"wall time on / off: {statistics.median(on['wall']) / off:.2f}")
    print(f"CPU seconds on / off: {statistics.median(cpu[1]) / statistics.median(cpu[0]):.2f}")


if __name__ == "__main__":
    main()
