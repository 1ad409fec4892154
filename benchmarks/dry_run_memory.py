"""The dry run's memory estimate against the peak of real optimizer steps, each measured in processes of its own.

Two steps of DAPO or PPO through a Trainer, on the CPU and in float32, on scripted responses that are all equally long.
Measured twice:

- *allocator*: the most bytes that torch's allocator had handed out at any moment since the process began, from the
  memory events of torch's profiler. It is what ``torch.cuda.max_memory_allocated`` is on a GPU, and what the estimate
  is about: within 15 % is the goal.
- *resident*: how much the process grew (``VmHWM`` less what Python and its libraries took), without the profiler. It
  adds what the C library keeps of freed memory, code, threads, and whatever is not a tensor.

The profiler keeps a record of every operation, which takes several times the memory of what it measures (not counted):
24 GB are too little for two ranks with many micro-batches.

    python benchmarks/dry_run_memory.py --policy FOLDER [--case NAME …] [--threads 1]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from ibro_lightning.batches import Rollout
from ibro_lightning.dry_run.layout import Layout
from ibro_lightning.dry_run.memory import estimate_memory
from ibro_lightning.dry_run.shapes import Shapes
from ibro_lightning.models import PolicyOptions
from ibro_lightning.modules import DAPOModule, PPOModule
from ibro_lightning.regularizers import InformationBottleneck
from ibro_lightning.types import Completion, Group, Prompt, RewardResult

PROMPTS, GROUP, PROMPT_TOKENS, RESPONSE_TOKENS = 8, 4, 32, 96
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One measurement: 8 prompts of 32 tokens, 4 responses of 96 tokens to each, 4 prompts to an optimizer step."""

    algorithm: str = "dapo"
    strategy: str = "auto"
    ranks: int = 1
    checkpointing: bool = False
    micro_batch_tokens: int = 1024

    @property
    def name(self) -> str:
        where = f"{self.strategy}{self.ranks}" if self.ranks > 1 else "single"
        return f"{self.algorithm}-{where}-{'ckpt' if self.checkpointing else 'plain'}-{self.micro_batch_tokens}"

    def module(self, policy: str) -> Any:
        kind = {"dapo": DAPOModule, "ppo": PPOModule}[self.algorithm]
        return kind(
            policy,
            regularizer=InformationBottleneck(),
            mini_batch_prompts=PROMPTS // 2,
            micro_batch_tokens=self.micro_batch_tokens,
            policy_options=PolicyOptions(gradient_checkpointing=self.checkpointing),
        )

    def layout(self) -> Layout:
        kinds: Any = {"auto": "single", "ddp": "ddp", "fsdp2": "fsdp2"}
        return Layout(world=self.ranks, kind=kinds[self.strategy])


CASES = [
    *(Case(checkpointing=c, micro_batch_tokens=m) for c in (False, True) for m in (1024, 256)),
    Case("ppo"),
    Case("ppo", checkpointing=True, micro_batch_tokens=256),
    *(Case(strategy="fsdp2", ranks=2, checkpointing=c) for c in (False, True)),
    Case("ppo", "fsdp2", 2),
    Case(strategy="ddp", ranks=2),
]


class Scripted(pl.LightningDataModule):
    """One rollout whose responses are all as long as they may be."""

    def train_dataloader(self) -> list[Rollout]:
        ranks = self.trainer.lightning_module.ranks
        numbers = list(range(PROMPTS))[ranks.rank :: ranks.size]
        rollout = Rollout.from_groups(
            [_group(number) for number in numbers],
            numbers,
            name="train",
            iteration=1,
            temperature=1.0,
            total_groups=PROMPTS,
        )
        return _Batches([rollout])


class _Batches(list):
    """Lightning must not make a DataLoader of it, nor shard it."""


def _group(number: int) -> Group:
    prompt = Prompt(str(number), "", tuple((number + place) % 10 for place in range(PROMPT_TOKENS)), None)
    tokens = tuple((number + place) % 10 for place in range(RESPONSE_TOKENS))
    completions = tuple(
        Completion(tokens, (-1.0,) * RESPONSE_TOKENS, "stop", "", RESPONSE_TOKENS, sample) for sample in range(GROUP)
    )
    results = tuple(RewardResult(float(sample % 2), {"accuracy": float(sample % 2)}) for sample in range(GROUP))
    return Group(prompt, completions, results)


def estimate(case: Case, policy: str) -> dict[str, int]:
    module = case.module(policy)
    shapes = Shapes.of_rollouts(module, case.layout().data_parallel, PROMPTS, GROUP, PROMPT_TOKENS, RESPONSE_TOKENS)
    found = estimate_memory(module, shapes, case.layout())
    static = sum(network.weights + network.states for network in found.networks)
    return {"estimate": found.update, "static": static + max(network.gradients for network in found.networks)}


def train(case: Case, policy: str) -> None:
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=case.ranks,
        strategy=case.strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(case.module(policy), datamodule=Scripted())


def measure_allocator(case: Case, policy: str) -> int:
    """The largest sum of what the CPU allocator had handed out."""
    gc.collect()  # garbage of before, freed within, would count as less than nothing
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train(case, policy)
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def measure_resident(case: Case, policy: str) -> int:
    before = _status("VmRSS")
    train(case, policy)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes, as Linux accounts for this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


WORK = {"estimate": estimate, "allocator": measure_allocator, "resident": measure_resident}


def in_processes(what: str, case: Case, arguments: argparse.Namespace) -> Any:
    """What rank 0 answers, of as many fresh processes as the case has ranks."""
    ranks = 1 if what == "estimate" else case.ranks
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, __file__, "--policy", arguments.policy, "--case", case.name, "--measure", what]
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false"}
            if ranks > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks),
                    "GROUP_RANK": "0",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "TORCHELASTIC_RUN_ID": "dry_run_memory",
                }
            answer = str(Path(folder) / f"{rank}.json")
            processes.append(subprocess.Popen([*command, "--answer", answer], env=environment, stderr=subprocess.PIPE))
        with ThreadPoolExecutor() as pool:  # all at once: a full pipe would hold a rank up
            errors = [error for _, error in pool.map(subprocess.Popen.communicate, processes)]
        if any(process.returncode for process in processes):
            ends = [
                f"rank {rank} ended with {process.returncode}: {error.decode()[-1500:]}"
                for rank, (process, error) in enumerate(zip(processes, errors, strict=True))
            ]
            raise RuntimeError("\n".join([f"{case.name}, {what}", *ends]))
        return json.loads((Path(folder) / "0.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", required=True, help="a Hugging Face folder, such as SmolLM2-135M-Instruct")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = [case for case in CASES if arguments.case is None or case.name in arguments.case]
    if arguments.measure:
        warnings.simplefilter("ignore")
        answer = WORK[arguments.measure](cases[0], arguments.policy)
        Path(arguments.answer).write_text(json.dumps(answer))
        sys.stdout.flush()
        os._exit(0)  # gloo's threads now and then abort when the interpreter ends
    print(f"{'MiB':28}{'estimate':>10}{'allocator':>11}{'error':>8}{'resident':>10}  weights + gradients + optimizer")
    for case in cases:
        found = in_processes("estimate", case, arguments)
        allocator = in_processes("allocator", case, arguments)
        resident = in_processes("resident", case, arguments)
        error = found["estimate"] / allocator - 1
        print(
            f"{case.name:28}{found['estimate'] / MIB:10.0f}{allocator / MIB:11.0f}{error:8.1%}"
            f"{resident / MIB:10.0f}  {found['static'] / MIB:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
