"""What a rollout of the paper's size takes in memory and time, from the engine's answers to the first micro-batch.

    python benchmarks/rollout_memory.py
    python benchmarks/rollout_memory.py --baseline ../other_checkout --turns 5

Responses have log-normal lengths with a mean of 2,446 tokens and at most 20,480; a rank of the paper has 1,024 of them.
They go through the code of a run: a server's answers → ``Generation`` → ``Completion`` and its reward → ``Rollout`` →
``Experience`` (old log-probs, entropies, advantages, a critic's values) → optimizer step → micro-batch. A network that
computes nothing stands in for the model, and there is no text. Every size runs in a fresh process, on one thread.

``held`` is the memory of all objects that are alive after a stage, each counted once; ``peak`` is the most by which the
process grew. Both are in bytes per real token: prompts and responses, without padding.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent
SIZES = (128, 256, 512, 1024, 2048, 4096)
GROUP, PROMPT_TOKENS = 16, 150
MEAN, LONGEST, SIGMA = 2446, 20480, 1.0
"""Tokens of a response; σ of the lengths' logarithm."""
STEPS = 8
"""Optimizer steps on a rollout."""
STAGES = ("generations", "completions", "rollout", "experience", "first micro-batch")
LIMIT = 40
"""Bytes per real token."""


def lengths_of(responses: int, generator: Any, mean: float = MEAN, longest: int = LONGEST) -> Any:
    """``[responses]`` log-normal lengths, from 1 to ``longest``."""
    drawn = generator.lognormal(math.log(mean) - SIGMA**2 / 2, SIGMA, responses)
    return drawn.round().astype(int).clip(1, longest)


def bytes_of(*roots: Any) -> int:
    """The memory that objects hold together, in tensors, arrays and Python's own objects; each is counted once."""
    import numpy as np
    from torch import Tensor

    sizes: dict[Any, int] = {}
    waiting = list(roots)
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            sizes["memory", storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, memoryview):
            sizes[id(item)] = sys.getsizeof(item)
            waiting.append(item.obj)
        elif isinstance(item, np.ndarray):
            while isinstance(item.base, np.ndarray):
                item = item.base
            if isinstance(item.base, Tensor):
                waiting.append(item.base)
            else:
                sizes["memory", item.ctypes.data] = item.nbytes
        elif id(item) not in sizes and not isinstance(item, type | Callable):  # type: ignore[arg-type]
            sizes[id(item)] = sys.getsizeof(item)
            if isinstance(item, Mapping):
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, tuple | list | set):
                waiting += item
            elif is_dataclass(item):
                waiting += [getattr(item, field.name) for field in fields(item)]
            else:
                slots = getattr(type(item), "__slots__", ())
                waiting += [
                    getattr(item, name) for base in type(item).__mro__ for name in vars(base).get("__slots__", ())
                ]
                waiting += vars(item).values() if not slots and hasattr(item, "__dict__") else ()
    return sum(sizes.values())


class Clock:
    """CPU seconds of the code that is measured, without what surrounds it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds += time.process_time() - start


class Answers:
    """An engine that takes its samples from a server's answers, which it makes up."""

    def __init__(self, lengths: Any, generator: Any, clock: Any) -> None:
        self.lengths, self.generator, self.clock = lengths, generator, clock
        self.made: list[list[Any]] = []

    def setup(self, spec: Any) -> None:
        """There is nothing to set up."""

    def generate(self, prompts: Any, sampling: Any, seeds: Any) -> list[list[Any]]:
        made, self.made = self.made, []
        return made

    def make(self) -> None:
        """Read the answers that :meth:`generate` returns."""
        from ibro_lightning.engines.vllm_completions import generation_of

        lengths = iter(self.lengths.tolist())
        for _ in range(len(self.lengths) // GROUP):
            self.made.append([])
            for _ in range(GROUP):
                length = next(lengths)
                tokens = self.generator.integers(1000, 150_000, length).tolist()
                logp = (-self.generator.exponential(0.5, length)).tolist()
                reason = "length" if length == LONGEST else "stop"
                answer = {"token_ids": tokens, "finish_reason": reason, "logprobs": {"token_logprobs": logp}}
                with self.clock():
                    self.made[-1].append(generation_of({"choices": [answer]}))


def stand_ins() -> tuple[Any, Any]:
    """A policy and a critic that compute nothing."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

    class Policy(Network):
        def forward(self, sequences: Any, *, temperature: float, with_entropy: bool = True) -> Any:
            logp = torch.full(sequences.response_mask.shape, -0.5)
            return logp, torch.full_like(logp, 0.5) if with_entropy else None

    class Critic(Network):
        def forward(self, sequences: Any) -> Any:
            mask = sequences.response_mask
            return torch.full((len(mask), mask.shape[1] + 1), 0.1)

    return Policy(), Critic()


def measured(
    responses: int,
    kind: str = "dapo",
    mean: float = MEAN,
    longest: int = LONGEST,
    *,
    resident: bool = True,
    count: bool = True,
) -> dict[str, Any]:
    """Take a rollout from the engine to its first micro-batch; what it took, in bytes and CPU seconds.

    Args:
        kind: ``dapo`` or ``ppo``.
        resident: read the memory of the process, too.
        count: count the memory that objects hold, which takes longer than all the rest where they are Python's own.
    """
    import numpy as np
    import torch

    from ibro_lightning.batches import Rollout
    from ibro_lightning.datamodules.collector import Collector
    from ibro_lightning.modules import DAPOModule, PPOModule
    from ibro_lightning.ranks import ALONE
    from ibro_lightning.regularizers import InformationBottleneck
    from ibro_lightning.rewards import VerifiableReward
    from ibro_lightning.timing import PhaseTimer
    from ibro_lightning.types import Group, Prompt, SamplingParams
    from ibro_lightning.update import PlainLoop, PolicyLoss, Scorer, Updater
    from ibro_lightning.update.advantages import GRPO

    class Even(VerifiableReward):
        pooled = False

        def verify(self, prompt: Prompt, completion: Any) -> bool:
            return len(completion.token_ids) % 2 == 0

    generator, clock, held = np.random.default_rng(responses), Clock(), dict.fromkeys(STAGES, 0)
    lengths = lengths_of(responses, generator, mean, longest)
    size_of = bytes_of if count else lambda *_: 0
    prompts = [
        Prompt(f"p{number}", "", tuple(generator.integers(1000, 150_000, PROMPT_TOKENS).tolist()), None)
        for number in range(responses // GROUP)
    ]
    tokens = int(lengths.sum()) + responses * PROMPT_TOKENS
    policy, critic = stand_ins()
    loop = PlainLoop({"policy": policy, "critic": critic}, [])
    loss = PolicyLoss(InformationBottleneck(0.005))
    scorer, updater = Scorer(loop, loss), Updater(loop, mini_batch_prompts=max(1, len(prompts) // STEPS))
    # The parts of a module that prepare() reads, without a model.
    options = {"gae_lambda": 0.95, "critic_gae_lambda": 1.0, "gamma": 1.0, "length_adaptive_alpha": None}
    module = SimpleNamespace(
        **options,
        scorer=scorer,
        updater=updater,
        critic=critic,
        group_advantage=GRPO(),
        advantage_noise=0.0,
        ranks=ALONE,
        scores_first=lambda rollout: True,
        bootstrap_truncated=True,
        whiten_advantages=True,
    )
    module.advantages = partial(DAPOModule.advantages, module)
    prepare = PPOModule.prepare if kind == "ppo" else DAPOModule.prepare
    engine = Answers(lengths, generator, clock)
    collector = Collector(engine, None, None)  # type: ignore[arg-type]
    tokenizer = SimpleNamespace(batch_decode=lambda rows, skip_special_tokens: [""] * len(rows))
    collector.provider = SimpleNamespace(tokenizer=tokenizer, eos_token_ids=(0,))  # type: ignore[assignment]
    seeds = [[number * GROUP + sample for sample in range(GROUP)] for number in range(len(prompts))]
    sampling = SamplingParams(max_tokens=longest)

    gc.collect()
    start = _reset_peak() if resident else 0
    engine.make()
    held["generations"] = size_of(engine.made)
    with clock():
        groups: list[Group] = collector.collect(prompts, seeds, sampling, Even(), PhaseTimer())
    held["completions"] = size_of(groups)
    with clock():
        rollout = Rollout.from_groups(groups, name="train", iteration=1, temperature=1.0)
    del groups
    if resident:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # Python uses the place of freed arrays again, but not for tensors
    held["rollout"] = size_of(rollout)
    with clock(), torch.no_grad():
        experience = prepare(module, rollout)  # type: ignore[arg-type]
    held["experience"] = size_of(rollout, experience)
    with clock():
        step = next(iter(updater.steps(experience, loss, scorer.context())))
        rows, _ = scorer.budget.micro_batches(step.sequences, network=policy)[0]
        micro = step.micro_batch(rows) if hasattr(step, "micro_batch") else step.select(rows)  # up to 0.2
    held["first micro-batch"] = size_of(rollout, experience, step, micro)
    peak = _peak() - start if resident else 0
    per_token = {stage: size / tokens for stage, size in held.items()}
    return {"tokens": tokens, "held": per_token, "peak": peak / tokens, "seconds": clock.seconds / tokens}


def _reset_peak() -> int:
    """Bytes that this process has, from where its peak is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def in_a_process(tree: Path, responses: int, kind: str, *, count: bool) -> dict[str, Any]:
    """:func:`measured`, in a fresh process with another tree's code."""
    # Large blocks are given back at once, so that what the process has is what it uses.
    settings = {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--one", str(responses), "--kind", kind, *["--count"] * count]
    done = subprocess.run(command, env={**os.environ, **settings}, cwd=tree, check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def quartiles(values: list[float], digits: str) -> str:
    if len(values) == 1:
        return format(values[0], digits)
    low, median, high = (format(value, digits) for value in statistics.quantiles(values, n=4, method="inclusive"))
    return f"{median} ({low} - {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="responses of a rollout, multiples of 16")
    parser.add_argument("--kind", choices=["dapo", "ppo"], default="dapo")
    parser.add_argument("--turns", type=int, default=3, help="each runs every size once, with every tree")
    parser.add_argument("--baseline", type=Path, help="another checkout of ours, as a second side")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measured(2 * GROUP, options.kind, mean=50, longest=200, resident=False)  # torch loads what it needs
        print(json.dumps(measured(options.one, options.kind, count=options.count)))
        return
    sides = {"this tree": ROOT, **({} if options.baseline is None else {"baseline": options.baseline.resolve()})}
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for turn in range(options.turns):
        for size in options.sizes:
            for side in list(sides)[:: -1 if turn % 2 else 1]:
                found.setdefault((side, size), []).append(in_a_process(sides[side], size, options.kind, count=not turn))
    for side in sides:
        print(f"\n{side}, {options.kind}: bytes per real token held after each stage, peak; CPU seconds per million")
        print("| responses | tokens |", " | ".join(STAGES), "| peak | CPU s / 1e6 |")
        print("|", " --- |" * (len(STAGES) + 4))
        for size in options.sizes:
            runs = found[side, size]
            held = " | ".join(f"{runs[0]['held'][stage]:.1f}" for stage in STAGES)
            peak = quartiles([run["peak"] for run in runs], ".1f")
            seconds = quartiles([1e6 * run["seconds"] for run in runs], ".3f")
            print(f"| {size:,} | {runs[0]['tokens']:,} | {held} | {peak} | {seconds} |")
        most = max(max(found[side, size][0]["held"].values()) for size in options.sizes)
        print(f"held at most {most:.1f} bytes per real token: {'within' if most <= LIMIT else 'MORE THAN'} {LIMIT}")
        first, last = (found[side, size] for size in (min(options.sizes), max(options.sizes)))
        held = [max(runs[0]["held"].values()) for runs in (first, last)]
        seconds = [statistics.median(run["seconds"] for run in runs) for runs in (first, last)]
        for name, (smallest, largest) in (("memory", held), ("time", seconds)):
            ratio = largest / smallest
            verdict = "grows linearly" if ratio <= 1.1 else "GROWS FASTER"
            print(f"{name} per token of the largest rollout over the smallest's: {ratio:.2f}, {verdict}")
    if "baseline" in sides:
        print("\nthis tree / baseline, within a turn")
        for size in options.sizes:
            pairs = list(zip(found["this tree", size], found["baseline", size], strict=True))
            seconds = [one["seconds"] / other["seconds"] for one, other in pairs]
            held = max(pairs[0][0]["held"].values()) / max(pairs[0][1]["held"].values())
            print(f"{size:,} responses: CPU seconds {quartiles(seconds, '.3f')}, memory held {held:.3f}")


if __name__ == "__main__":
    main()
