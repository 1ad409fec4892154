"""The reward pool: how much faster two workers are than one, and what it adds to an iteration.

    python benchmarks/reward_pool.py throughput                                # 8,192 ordinary responses, math-verify
    python benchmarks/reward_pool.py iteration runs/sft_quickstart/model       # the quick start, rewards here and there

``throughput`` scores the same responses with one worker and with two, in turns, and prints the ratios of wall-clock
seconds; it needs two idle cores. ``iteration`` runs the quick start with its verifier in this process and in the pool,
iteration by iteration in turns, and prints the seconds that the pool adds as a share of an iteration.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings

import lightning.pytorch as pl
import torch

from ibro_lightning.batches import Rollout
from ibro_lightning.datamodules import DynamicSampling, RolloutDataModule
from ibro_lightning.engines import HFEngine
from ibro_lightning.modules import DAPOModule
from ibro_lightning.regularizers import InformationBottleneck
from ibro_lightning.rewards import (
    MathVerifyReward,
    OverlongPenalty,
    PoolOptions,
    RewardPool,
    RewardSum,
    judge_all,
    judge_here,
)
from ibro_lightning.tasks import NumberPathReward, NumberPathSource
from ibro_lightning.types import Completion, Prompt, SamplingParams

GOLDS = (
    "34",
    "-7",
    "116",
    "\\frac{3}{8}",
    "0.25",
    "3\\sqrt{13}",
    "\\left( 3, \\frac{\\pi}{2} \\right)",
    "2^{10}",
    "x+2",
)
TEXT = "therefore we note that the sum of both sides equals twice $x^2 + 3x$ so by symmetry it follows"


def ordinary_responses(count: int, group_size: int = 16) -> list[tuple[Prompt, list[Completion]]]:
    """Groups of responses of 100 to 600 words that end in an answer, right or wrong, in the ways models write them."""
    rng, vocabulary = random.Random(0), TEXT.split()
    groups = []
    for index in range(count // group_size):
        gold = rng.choice(GOLDS)
        responses = []
        for sample in range(group_size):
            words = " ".join(rng.choice(vocabulary) for _ in range(rng.randint(100, 600)))
            said = gold if rng.random() < 0.5 else rng.choice([str(rng.randint(0, 999)), "\\frac{5}{8}", "2\\sqrt{13}"])
            form = rng.choice(
                ["\\boxed{{{}}}", "Answer: ${}$", "**Answer:** \\boxed{{{}}}.", "so it is $\\boxed{{{}}}$."]
            )
            text = f"{words}\n{form.format(said)}"
            responses.append(Completion((1,), (0.0,), "stop", text, 20480, sample))
        groups.append((Prompt(f"p{index}", "question", (1,), gold), responses))
    return groups


def throughput(count: int, repeats: int) -> None:
    reward = MathVerifyReward()
    answered = ordinary_responses(count)
    pools = {workers: RewardPool([reward], PoolOptions(workers=workers)) for workers in (1, 2)}
    for pool in pools.values():
        judge_all(reward, answered[:8], pool)  # start-up is not what is measured
    ratios, rates = [], []
    for repeat in range(repeats):
        seconds = {}
        for workers in (1, 2)[:: 1 if repeat % 2 else -1]:
            start = time.perf_counter()
            judge_all(reward, answered, pools[workers])
            seconds[workers] = time.perf_counter() - start
        ratios.append(seconds[1] / seconds[2])
        rates.append(count / seconds[1])
        print(f"1 worker {seconds[1]:.2f} s, 2 workers {seconds[2]:.2f} s: {ratios[-1]:.2f} times as fast", flush=True)
    stopped = sum(pools[2].counts.values())
    print(
        f"{count} responses: {statistics.median(ratios):.2f} times as fast with two workers as with one "
        f"({min(ratios):.2f} to {max(ratios):.2f}); one worker {statistics.median(rates):.0f} responses/s; "
        f"{stopped} stopped"
    )
    for pool in pools.values():
        pool.close()


class PooledNumberPathReward(NumberPathReward):
    """The quick start's verifier, which is quick enough to stay here, sent to the workers all the same."""

    pooled = True


class Alternating(RolloutDataModule):
    """Every other rollout is judged in this process."""

    def next_rollout(self) -> Rollout:
        assert self.collector.pool is not None
        self.collector.judge = self.collector.pool if self.iteration % 2 else judge_here
        return super().next_rollout()


class Seconds(pl.Callback):
    """Seconds spent on rewards and on everything, per response, by where rewards were judged."""

    def __init__(self) -> None:
        self.reward: dict[bool, list[float]] = {True: [], False: []}
        self.total: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        times = {**batch.metrics, **outputs}
        responses = len(batch) + sum(len(group.completions) for group in batch.dropped)
        pooled = batch.iteration % 2 == 0  # iterations count from 1, the datamodule's parity from 0
        rest = sum(
            float(value) for name, value in times.items() if name.startswith("time/") and name != "time/reward_s"
        )
        if batch.iteration > 4:  # the pool's start and the first calls of everything
            self.reward[pooled].append(times["time/reward_s"] / responses)
            self.total.append(rest / responses)


def iteration(policy: str, iterations: int) -> None:
    warnings.filterwarnings("ignore")
    data = Alternating(
        source=NumberPathSource(),
        reward=RewardSum([PooledNumberPathReward(), OverlongPenalty(16)]),
        sampling=SamplingParams(max_tokens=56),
        prompts_per_rollout=48,
        group_size=8,
        dynamic_sampling=DynamicSampling(max_rounds=3),
        engine=HFEngine(max_batch_size=256),
        reward_pool=PoolOptions(workers=2),
    )
    module = DAPOModule(
        policy,
        regularizer=InformationBottleneck(0.005),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-4, betas=(0.9, 0.99), weight_decay=0.0),
        warmup_steps=10,
        mini_batch_prompts=24,
        micro_batch_tokens=2048,
    )
    seconds = Seconds()
    pl.Trainer(
        accelerator="cpu",
        max_epochs=iterations,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[seconds],
    ).fit(module, datamodule=data)
    here, there = (statistics.median(seconds.reward[pooled]) for pooled in (False, True))
    whole = statistics.median(seconds.total) + here
    print(
        f"per response: judged here {1e6 * here:.0f} us, in the pool {1e6 * there:.0f} us, iteration {1e6 * whole:.0f} "
        f"us; the pool adds {(there - here) / whole:+.1%} to an iteration ({len(seconds.total)} iterations)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("throughput")
    first.add_argument("--responses", type=int, default=8192)
    first.add_argument("--repeats", type=int, default=3)
    second = commands.add_parser("iteration")
    second.add_argument("policy", help="the quick start's base policy: runs/sft_quickstart/model")
    second.add_argument("--iterations", type=int, default=44)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "throughput":
        throughput(arguments.responses, arguments.repeats)
    else:
        iteration(arguments.policy, arguments.iterations)


if __name__ == "__main__":
    main()
