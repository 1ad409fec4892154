"""The same recipe in one process, on two DDP ranks and on two fsdp2 ranks: the same losses, curves and weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from helpers.processes import fit
from helpers.quick import slow_unless
from ibro_lightning.models import PolicyOptions, Qwen2FromScratch, export_folder
from ibro_lightning.tasks import NumberPath

SCRIPTED = '''
"""Completions by script: a function of the prompt and the seed, whatever the weights."""

import random
from collections.abc import Sequence

from ibro_lightning.sources import PromptSource
from ibro_lightning.engines import HFEngine
from ibro_lightning.rewards import VerifiableReward
from ibro_lightning.types import Generation, Problem, SamplingParams


class Script(HFEngine):
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[Sequence[int]]
    ) -> list[list[Generation]]:
        return [[self.write(prompt, sampling, seed) for seed in own] for prompt, own in zip(prompts, seeds)]

    def write(self, prompt, sampling, seed):
        dice = random.Random(seed)
        length = dice.randint(1, sampling.max_tokens)
        tokens = [dice.randrange(3, 20) for _ in range(length - 1)]
        reason = "length" if length == sampling.max_tokens else "stop"
        tokens.append(5 if reason == "length" else int(self._eos[0]))
        return Generation(tuple(tokens), tuple(-3.0 + dice.random() for _ in tokens), reason)


class Starts(PromptSource):
    def problems(self):
        for n in range(11):
            yield Problem(id=str(n), prompt=f"{n}>{n + 1}:" if n % 3 else f"{n}>{n + 1}:+7-3", answer=n + 1)


class Coin(VerifiableReward):
    """Right or wrong by the tokens; prompt 4 is always answered wrongly, which dynamic sampling drops."""

    def verify(self, prompt, completion):
        return prompt.answer != 5 and sum(completion.token_ids) % 3 == 0
'''

RECIPE = """
seed_everything: 3
num_threads: 1
trainer: {accelerator: cpu, max_epochs: 3, check_val_every_n_epoch: 3, default_root_dir: run}
model:
  class_path: DAPOModule
  init_args:
    policy: POLICY
    regularizer: {class_path: InformationBottleneck, init_args: {coef: 0.05}}
    kl: {coef: {class_path: AdaptiveKL, init_args: {start: 0.01, target: 0.001, horizon: 100}}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
    mini_batch_prompts: 3
    micro_batch_tokens: 40
    max_grad_norm: 0.1
data:
  class_path: RolloutDataModule
  init_args:
    source: {class_path: scripted.Starts}
    reward:
      class_path: RewardSum
      init_args:
        rewards: [{class_path: scripted.Coin}, {class_path: OverlongPenalty, init_args: {buffer_tokens: 3}}]
    sampling: {temperature: 1.0, max_tokens: 12}
    prompts_per_rollout: 5
    group_size: 4
    allow_overlap: true
    reward_pool: null
    weight_check: null
    engine: {class_path: scripted.Script}
    dynamic_sampling: {max_rounds: 2, on_exhausted: smaller}
    eval_sets:
      starts:
        source: {class_path: scripted.Starts}
        reward: {class_path: scripted.Coin}
        samples: 3
        sampling: {max_tokens: 6}
    eval_batch_prompts: 4
"""
PPO = {
    "class_path": "PPOModule",
    "clip_ratio_low": 0.2,
    "critic_optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
    "gae_lambda": 0.95,
    "micro_batch_tokens": 40,
    "mini_batch_prompts": 7,
}
CURRICULUM = {
    "class_path": "DifficultyPools",
    "init_args": {"source": {"class_path": "scripted.Starts"}, "low": 0.25, "high": 0.5, "easy_share": 0.2},
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DAPO": ({}, {}),
    "PPO": (PPO, {"group_size": 1, "prompts_per_rollout": 20, "dynamic_sampling": None}),
    # With two ranks, one of them has no group of a step, or of the whole rollout.
    "steps of one prompt": ({"mini_batch_prompts": 1}, {}),
    "rollouts of one prompt": ({"mini_batch_prompts": None, "update_epochs": 2}, {"prompts_per_rollout": 1}),
    # No scoring before the update, which fills in the old log-probs.
    "one step": ({"kl": None, "mini_batch_prompts": None}, {}),
    # All eligible tokens: a draw depends on their order, and ranks take every second prompt. The k highest of tokens
    # that differ by rounding alone are chosen otherwise in float32: test_training_step_on_ranks compares such methods.
    "sequence means": (
        {
            "aggregation": "seq-mean-token-mean",
            "overlong_filter": True,
            "regularizer": {"class_path": "ClipCov", "init_args": {"fraction": 1.0, "low": 0.05, "high": 5.0}},
        },
        {},
    ),
    "whitened over the rollout": ({"advantage": "reinforce++"}, {}),
    # Which prompts come depends on what all ranks' groups have shown.
    "curriculum": ({}, {"source": CURRICULUM}),
    # A forward pass whose hidden states the next one's head reads; and one before each step.
    "self-distillation": (
        {
            "regularizer": {
                "class_path": "SelfDistillation",
                "init_args": {"coef": 0.1, "template": "{prompt}{answer}>{prompt}"},
            }
        },
        {},
    ),
    # The same rows by other prompts, before each step.
    "marginal entropy": (
        {
            "regularizer": {
                "class_path": "MarginalEntropy",
                "init_args": {
                    "gamma": 0.1,
                    "base": {"class_path": "InformationBottleneck", "init_args": {"noise": 0.5}},
                },
            },
            "advantage_noise": 0.5,
        },
        {},
    ),
    # The reference's head, gathered in its own pass, is read in the policy's.
    "exact KL": ({"kl": {"coef": 0.1, "estimator": "exact"}}, {}),
    "SIREN": ({"regularizer": {"class_path": "SIREN", "init_args": {"coef": 5.0, "fraction": 1.0}}}, {}),
    "GMPO, MaxRL, a clip that moves": (
        {
            "surrogate": "gmpo",
            "aggregation": "seq-mean-token-mean",
            "advantage": "maxrl",
            "clip_ratio_high": {"class_path": "AdaptiveClip", "init_args": {"epsilon": 0.1, "target": 5.0}},
        },
        {},
    ),
}
TWO_RANKS = {
    "ddp": "ddp",
    "fsdp2": "fsdp2",
    "tensor parallel": "{class_path: FSDP2Strategy, init_args: {tensor_parallel_size: 2}}",
}
NOT_COMPARED = ("time/", "time_share/", "tokens_per_second/")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy whose heads two ranks can share."""
    source = Qwen2FromScratch(NumberPath(size=12), hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2)
    folder = tmp_path_factory.mktemp("policy") / "model"
    return export_folder(source.build(PolicyOptions()), source.tokenizer(), folder)


def write_recipe(folder: Path, case: str, policy: Path) -> Path:
    model, data = CASES[case]
    recipe = yaml.safe_load(RECIPE.replace("POLICY", str(policy)))
    settings = dict(model)
    recipe["model"]["class_path"] = settings.pop("class_path", "DAPOModule")
    recipe["model"]["init_args"] |= settings
    recipe["data"]["init_args"] |= data
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "scripted.py").write_text(SCRIPTED)
    return folder


def result(folder: Path) -> tuple[dict[str, Tensor], dict[str, list[float]], dict[str, Any], list[tuple]]:
    """Weights (the critic's, too), curves, last evaluation and all responses of a finished run."""
    weights = {
        f"{path.parent.name}.{name}": tensor
        for path in sorted((folder / "run").glob("*/model.safetensors"))
        for name, tensor in load_file(path).items()
    }
    events = EventAccumulator(str(folder / "run"))
    events.Reload()
    curves = {
        tag: [event.value for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith(NOT_COMPARED)
    }
    evaluation = json.loads((folder / "run" / "evaluations" / "iteration_000003.json").read_text())
    rollouts = pandas.read_parquet(folder / "run" / "rollouts")
    rows = rollouts[["iteration", "prompt_id", "seed", "response", "reward", "trained_on"]].values.tolist()
    return weights, curves, evaluation, sorted(map(tuple, rows))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, policy: Path) -> Mapping[str, Any]:
    """The run of each case in one process, made once."""
    finished: dict[str, Any] = {}

    class Runs(dict[str, Any]):
        def __missing__(self, case: str) -> Any:
            folder = write_recipe(tmp_path_factory.mktemp("alone") / "one", case, policy)
            fit(folder, ["--config", "recipe.yaml"])
            finished[case] = self[case] = result(folder)
            return finished[case]

    return Runs()


QUICK = {("curriculum", "ddp"), ("PPO", "fsdp2")}
# Ranks of a tensor-parallel group share their data: nothing is split, so two cases are enough.
PAIRS = [(case, name) for case in CASES for name in TWO_RANKS if name != "tensor parallel" or case in ("DAPO", "PPO")]


@pytest.mark.parametrize(("case", "strategy"), slow_unless(lambda pair: pair in QUICK, PAIRS))
def test_two_ranks_do_what_one_process_does(
    alone: Mapping[str, Any], tmp_path: Path, policy: Path, case: str, strategy: str
) -> None:
    folder = write_recipe(tmp_path / "two", case, policy)
    fit(folder, ["--config", "recipe.yaml"], ranks=2, strategy=TWO_RANKS[strategy])
    weights, curves, evaluation, responses = alone[case]
    other_weights, other_curves, other_evaluation, other_responses = result(folder)
    assert other_responses == responses
    assert evaluation["starts"]["questions"] == 11
    assert other_evaluation == evaluation
    assert curves["update/steps"][0] >= 1
    assert sum(curves["update/steps"]) >= 5 or case in ("rollouts of one prompt", "one step")
    assert weights.keys() == other_weights.keys()
    assert len({name.split(".")[0] for name in weights}) == (2 if case == "PPO" else 1)
    for name in weights:
        assert (weights[name] - other_weights[name]).abs().max() < 1e-5, name
    assert curves.keys() == other_curves.keys()
    for name in curves:
        for ours, theirs in zip(curves[name], other_curves[name], strict=True):
            assert math.isclose(ours, theirs, rel_tol=1e-5, abs_tol=1e-5), name


SFT = """
seed_everything: 3
num_threads: 1
trainer: {accelerator: cpu, max_epochs: 1, default_root_dir: run}
model:
  class_path: SFTModule
  init_args:
    policy: POLICY
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data:
  class_path: SFTDataModule
  init_args:
    source:
      class_path: NumberPathDemonstrations
      init_args: {task: {class_path: ibro_lightning.tasks.NumberPath, init_args: {size: 12}}, max_steps: 5}
    batch_size: 7
    steps_per_epoch: 5
"""


def test_two_ranks_share_the_demonstrations_of_a_warm_start(tmp_path: Path, policy: Path) -> None:
    results = []
    for ranks, strategy in ((1, None), (2, "ddp"), (2, "fsdp2")):
        folder = tmp_path / str(strategy)
        folder.mkdir()
        (folder / "recipe.yaml").write_text(SFT.replace("POLICY", str(policy)))
        fit(folder, ["--config", "recipe.yaml"], ranks, strategy)
        events = EventAccumulator(str(folder / "run"))
        events.Reload()
        losses = [event.value for event in events.Scalars("sft/loss")]
        results.append((load_file(folder / "run" / "model" / "model.safetensors"), losses))
    (weights, losses), *others = results
    assert losses[-1] < losses[0]
    for other_weights, other_losses in others:
        assert other_losses == pytest.approx(losses, rel=1e-5)
        for name in weights:
            assert (weights[name] - other_weights[name]).abs().max() < 1e-5, name
