"""TRL's side: GRPO with DAPO's loss on the same recipe, prompts and verifier, in TRL's own environment.

python -m peers.trl_side JOB.json

The verifier is ours, imported from our source tree: it needs neither Lightning nor any other package that TRL lacks.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from ibro_lightning.types import Completion, Prompt
from peers.work import Iteration, Job, Report, built, cpu_seconds, peak_mib, read_recipe


class Recorder(TrainerCallback):
    """The reward function's and the trainer's observations, put together at the end of each iteration."""

    def __init__(self, steps_per_iteration: int) -> None:
        self.steps_per_iteration = steps_per_iteration
        self.iterations: list[Iteration] = []
        self.sampled: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._mark = (cpu_seconds(), time.perf_counter(), 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step % self.steps_per_iteration:
            return
        before, self._mark = self._mark, (cpu_seconds(), time.perf_counter(), state.global_step)
        cpu_s, wall_s, steps = (now - then for now, then in zip(self._mark, before, strict=True))
        self.iterations.append(Iteration(cpu_s, wall_s, optimizer_steps=int(steps), **self.sampled))


class RecordingTrainer(GRPOTrainer):
    """Remembers how long the prompts are that it generates from."""

    prompt_lengths: Sequence[int] = ()

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        tokenized = super()._tokenize_prompts(prompts)
        self.prompt_lengths = [len(ids) for ids in tokenized[0]]
        return tokenized


class Verifier:
    """The recipe's reward as TRL calls it. The columns of the dataset arrive as further arguments, one per response."""

    __name__ = "verifier"

    def __init__(self, reward: Any, tokenizer: Any, group_size: int, max_tokens: int, recorder: Recorder) -> None:
        reward.setup(tokenizer)
        self.reward, self.tokenizer, self.recorder = reward, tokenizer, recorder
        self.group_size, self.max_tokens = group_size, max_tokens
        self.trainer: RecordingTrainer | None = None

    def __call__(self, completion_ids: list[list[int]], problem: list[str], **others: Any) -> list[float]:
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        prompts, lengths, accuracies, rewards = [], list[float](), list[float](), list[float]()
        for first in range(0, len(problem), self.group_size):
            rows = slice(first, first + self.group_size)
            assert len(set(problem[rows])) == 1, "TRL's groups are not consecutive"
            stated = json.loads(problem[first])
            prompt = Prompt(stated["id"], "", (), stated["answer"])
            completions = list(map(self.completion, completion_ids[rows], texts[rows]))
            results = self.reward(prompt, completions)
            prompts.append(prompt.id)
            lengths.append(sum(len(ids) for ids in completion_ids[rows]) / self.group_size)
            accuracies.append(sum(result.parts["accuracy"] for result in results) / self.group_size)
            rewards += [result.reward for result in results]
        assert self.trainer is not None
        self.recorder.sampled = {
            "prompts": prompts,
            "prompt_tokens": list(self.trainer.prompt_lengths[:: self.group_size]),
            "completions": len(completion_ids),
            "lengths": lengths,
            "accuracies": accuracies,
        }
        return rewards

    def completion(self, ids: list[int], text: str) -> Completion:
        ended = bool(ids) and ids[-1] == self.tokenizer.eos_token_id
        return Completion(tuple(ids), (), "stop" if ended else "length", text, self.max_tokens, 0)


def settings(recipe: dict[str, Any], job: Job, folder: str) -> GRPOConfig:
    """The recipe in TRL's words."""
    model, data = recipe["model"]["init_args"], recipe["data"]["init_args"]
    optimizer, group_size = model["optimizer"]["init_args"], data["group_size"]
    per_step = model.get("mini_batch_prompts", data["prompts_per_rollout"]) * group_size
    micro_batch = job.micro_batch or per_step
    steps = steps_per_iteration(recipe)
    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=per_step // micro_batch,
        generation_batch_size=per_step * steps,
        num_generations=group_size,
        max_completion_length=data["sampling"]["max_tokens"],
        temperature=data["sampling"]["temperature"],
        top_k=0,
        top_p=1.0,
        max_steps=job.iterations * steps,
        learning_rate=model["learning_rate"],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=model["warmup_steps"],
        adam_beta1=optimizer["betas"][0],
        adam_beta2=optimizer["betas"][1],
        weight_decay=optimizer["weight_decay"],
        max_grad_norm=model.get("max_grad_norm", 1.0),
        epsilon=model.get("clip_ratio_low", 0.2),
        epsilon_high=model.get("clip_ratio_high", 0.28),
        beta=0.0,
        loss_type="dapo",
        shuffle_dataset=False,
        gradient_checkpointing=False,
        logging_steps=steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=job.seed,
    )


def steps_per_iteration(recipe: dict[str, Any]) -> int:
    prompts = recipe["data"]["init_args"]["prompts_per_rollout"]
    return int(prompts // recipe["model"]["init_args"].get("mini_batch_prompts", prompts))


def run(job: Job) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    recipe = read_recipe(job.recipe)
    data = recipe["data"]["init_args"]
    tokenizer = AutoTokenizer.from_pretrained(job.policy)
    tokenizer.padding_side = "left"
    recorder = Recorder(steps_per_iteration(recipe))
    verifier = Verifier(built(data["reward"]), tokenizer, data["group_size"], data["sampling"]["max_tokens"], recorder)
    rows = [json.loads(line) for line in Path(job.problems).read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = RecordingTrainer(
            model=AutoModelForCausalLM.from_pretrained(job.policy, dtype=torch.float32),
            reward_funcs=verifier,
            args=settings(recipe, job, folder),
            train_dataset=Dataset.from_list([{"prompt": row["prompt"], "problem": json.dumps(row)} for row in rows]),
            processing_class=tokenizer,
            callbacks=[recorder],
        )
        verifier.trainer = trainer
        trainer.train()
        versions = {name: version(name) for name in ("torch", "transformers", "trl")}
        Report(job.side, recorder.iterations, peak_mib(), torch.get_num_threads(), versions).write(job.report)


if __name__ == "__main__":
    run(Job.read(sys.argv[1]))
