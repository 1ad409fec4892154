"""What scoring before the update costs: CPU seconds of ``prepare`` and of the whole training step on the quick start.

    python benchmarks/old_logp.py --policy runs/sft_quickstart/model

One run, whose iterations take turns: the rollout is scored as a whole before the update (as up to 0.2.0), all but the
first step's rows are (``old_logp: policy``), or none (``old_logp: sampler``).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from ibro_lightning.batches import Rollout
from ibro_lightning.batches.experience import Experience
from ibro_lightning.cli.main import main as command_line
from ibro_lightning.modules import DAPOModule

TURNS = ("all first", "policy", "sampler")
Taken = dict[str, float]


def take_turns(taken: dict[str, list[Taken]]) -> None:
    """Make every DAPOModule take turns, and write down what each iteration took."""
    prepare, training_step = DAPOModule.prepare, DAPOModule.training_step
    latest: Taken = {}

    def timed(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        start = time.process_time()
        result = work(*arguments)
        latest[name] = time.process_time() - start
        return result

    def timed_prepare(self: DAPOModule, rollout: Rollout) -> Experience:
        return timed("prepare", prepare, self, rollout)

    def timed_step(self: DAPOModule, rollout: Rollout, batch_idx: int) -> dict[str, float]:
        turn = TURNS[sum(map(len, taken.values())) % len(TURNS)]
        self.advantages_need_scores = turn == "all first"
        self.scorer.old_logp = "sampler" if turn == "sampler" else "policy"
        metrics: dict[str, float] = timed("step", training_step, self, rollout, batch_idx)
        apart = {name: metrics[f"sampler/logp_difference_{name}"] for name in ("max", "mean")}
        taken[turn].append({**latest, **apart, "scored first": metrics["update/scored_first"]})
        return metrics

    DAPOModule.prepare, DAPOModule.training_step = timed_prepare, timed_step  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="runs/sft_quickstart/model", help="the quick start's base policy")
    parser.add_argument("--iterations", type=int, default=48, help="of the run; the first of each turn does not count")
    options = parser.parse_args()
    taken: dict[str, list[Taken]] = {turn: [] for turn in TURNS}
    take_turns(taken)
    with tempfile.TemporaryDirectory() as folder:
        run = ["--config", "quickstart.yaml", "--model.policy", options.policy, "--data.eval_sets", "null"]
        epochs = ["--trainer.max_epochs", str(options.iterations), "--trainer.default_root_dir", folder]
        command_line(["fit", *run, *epochs])
    for turn, found in taken.items():
        for phase in ("prepare", "step"):
            quartiles = statistics.quantiles([each[phase] for each in found[1:]], n=4)
            low, median, high = (f"{seconds:.4f}" for seconds in quartiles)
            print(f"{turn:10} {phase:8} {median} ({low} to {high}) CPU s, n = {len(found) - 1}")
    every = [each for found in taken.values() for each in found]
    print(f"|Δlogp| of the engine: at most {max(each['max'] for each in every):.1e} nats")
    print(f"in the mean {statistics.mean(each['mean'] for each in every):.1e} nats")


if __name__ == "__main__":
    main()
