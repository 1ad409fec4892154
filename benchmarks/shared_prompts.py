"""CPU seconds of scoring and update with each prompt run once per group, over those with it run once per response.

    python benchmarks/shared_prompts.py --shape quickstart --policy FOLDER    # the quick start's base policy
    python benchmarks/shared_prompts.py --shape sums                          # SmolLM2-135M's sizes, random weights
    python benchmarks/shared_prompts.py --shape sums --against CHECKOUT       # over another checkout of this project

``quickstart``: 48 × 8 responses that the base policy samples, two optimizer steps, as in quickstart.yaml. ``sums``: 8 ×
8 rows of 39 + 21…32 tokens, one step. A turn scores the rollout and updates the policy with ``Scorer`` and ``Updater``.
Every variant is a process of its own, with the same rollout, that takes a turn when it is told to: turns alternate, and
the machine's other work meets them all. The first turn of each is not counted. ``log-probs`` is the largest difference
of the first turn's old log-probs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from ibro_lightning.batches import Rollout
from ibro_lightning.functional import group_advantages
from ibro_lightning.models import Policy
from ibro_lightning.regularizers import InformationBottleneck
from ibro_lightning.update import PlainLoop, PolicyLoss, Scorer, Updater
from ibro_lightning.update.micro_batches import TokenBudget

GROUP = 8
SHAPES = {"quickstart": (24, 2048), "sums": (None, 2048)}  # prompts per optimizer step, tokens per micro-batch
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def sampled(folder: str) -> dict[str, Any]:
    """48 × 8 responses of the quick start."""
    from ibro_lightning.engines import HFEngine
    from ibro_lightning.models.spec import ModelSpec
    from ibro_lightning.tasks import NumberPathSource
    from ibro_lightning.types import SamplingParams

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    problems = list(NumberPathSource(split="train", min_distance=2, max_distance=8).problems())
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in problems[:: len(problems) // 48][:48]]
    engine = HFEngine(max_batch_size=256)
    engine.setup(ModelSpec(model.config, (tokenizer.eos_token_id,), torch.device("cpu")))
    engine.load_weights(model.state_dict().items())
    seeds = [[GROUP * prompt + sample for sample in range(GROUP)] for prompt in range(len(prompts))]
    completions = engine.generate(prompts, SamplingParams(temperature=1.0, max_tokens=56), seeds)
    rows = [(prompt, c) for prompt, samples in zip(prompts, completions, strict=True) for c in samples]
    return {
        "prompt_token_ids": [list(prompt) for prompt, _ in rows],
        "response_token_ids": [list(c.token_ids) for _, c in rows],
        "logp": [list(c.logp) for _, c in rows],
    }


def random_sums() -> dict[str, Any]:
    """8 × 8 rows of 39 + 21…32 random tokens."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(SMOLLM2["vocab_size"], (count,), generator=generator).tolist()

    lengths = torch.randint(21, 33, (8 * GROUP,), generator=generator).tolist()
    prompts = [tokens(39) for _ in range(8)]
    return {
        "prompt_token_ids": [prompt for prompt in prompts for _ in range(GROUP)],
        "response_token_ids": [tokens(length) for length in lengths],
        "logp": [[-11.0] * length for length in lengths],
    }


def work(shape: str, folder: str | None, data: Path, options: dict[str, Any], micro_batch_tokens: int | None) -> None:
    """A worker: a turn for each line on stdin; prints its CPU seconds of scoring and of the update."""
    torch.manual_seed(0)
    model = (
        AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2))
        if shape == "sums"
        else AutoModelForCausalLM.from_pretrained(folder)
    )
    policy = Policy(model, **options)
    columns = json.loads(data.read_text())
    rewards = [float(row % 3 == 0) for row in range(len(columns["logp"]))]
    rollout = Rollout.from_tokens(**columns, rewards=rewards, iteration=1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, betas=(0.9, 0.99), weight_decay=0.0)
    loop = PlainLoop({"policy": policy}, [optimizer])
    loss = PolicyLoss(InformationBottleneck(0.005), clip_ratio_high=0.28)
    per_step, tokens = SHAPES[shape]
    budget = TokenBudget(micro_batch_tokens or tokens)
    scorer, updater = Scorer(loop, loss, budget), Updater(loop, budget, mini_batch_prompts=per_step)
    for line in sys.stdin:
        context, start = scorer.context(), time.process_time()
        experience = scorer(rollout)
        scored = time.process_time()
        advantages = group_advantages(rollout.rewards, rollout.groups)
        experience = replace(experience, advantages=advantages[:, None].expand(experience.mask.shape))
        for step in updater.steps(experience, loss, context):
            updater.update(step, loss, context)
        answer: dict[str, Any] = {"score": scored - start, "update": time.process_time() - scored}
        if line.strip() == "first":
            answer["logp"] = experience.old_logp.tolist()
        print(json.dumps(answer), flush=True)


class Worker:
    """A process that takes turns."""

    def __init__(self, checkout: Path, arguments: list[str]) -> None:
        path = {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", __file__, *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env={**os.environ, **path}, text=True, **pipes)

    def turn(self, first: bool = False) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("first\n" if first else "next\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def quartiles(values: list[float], digits: int) -> str:
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="sums")
    parser.add_argument("--policy", help="the quick start's base policy, a folder")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--against", type=Path, help="another checkout to compare with, as it is")
    parser.add_argument("--micro_batch_tokens", type=int, help="of the new variant; the other keeps the shape's")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, default={}, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.shape, given.policy, given.worker, given.options, given.micro_batch_tokens)
    else:
        compare(given)


def compare(given: argparse.Namespace) -> None:
    here = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "rollout.json")
        columns = random_sums() if given.shape == "sums" else sampled(given.policy)
        data.write_text(json.dumps(columns))
        arguments = ["--shape", given.shape, "--worker", str(data)]
        arguments += ["--policy", given.policy] if given.policy else []
        budget = ["--micro_batch_tokens", str(given.micro_batch_tokens)] if given.micro_batch_tokens else []
        old = ["--options", "{}" if given.against else '{"share_prompts": false}']
        workers = {"new": Worker(here, arguments + budget), "old": Worker(given.against or here, arguments + old)}
        firsts = {name: worker.turn(first=True) for name, worker in workers.items()}
        turns = []
        for pair in range(given.pairs):
            order = ("new", "old") if pair % 2 else ("old", "new")
            turns.append({name: workers[name].turn() for name in order})
    prompt, response = (sum(map(len, columns[f"{part}_token_ids"])) for part in ("prompt", "response"))
    print(f"{given.shape}: {len(columns['logp'])} rows, {prompt} + {response} tokens, {given.pairs} pairs")
    difference = (torch.tensor(firsts["new"]["logp"]) - torch.tensor(firsts["old"]["logp"])).abs().max()
    print(f"log-probs: {difference:.1e}")
    for phase in ("score", "update"):
        new, old = ([turn[name][phase] for turn in turns] for name in ("new", "old"))
        ratios = [one / other for one, other in zip(new, old, strict=True)]
        print(f"{phase}: new {quartiles(new, 3)} s, old {quartiles(old, 3)} s, new / old {quartiles(ratios, 3)}")


if __name__ == "__main__":
    main()
