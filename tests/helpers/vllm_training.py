"""Two iterations and an evaluation on an engine of vLLM, in a folder of their own."""

from __future__ import annotations

from pathlib import Path

import pandas
from safetensors.torch import load_file

from helpers.processes import fit

RECIPE = """
seed_everything: 3
num_threads: 1
trainer: {accelerator: cpu, max_epochs: 2, check_val_every_n_epoch: 2, default_root_dir: run}
model:
  class_path: DAPOModule
  init_args:
    policy: POLICY
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
    mini_batch_prompts: 2
data:
  class_path: RolloutDataModule
  init_args:
    source: {class_path: NumberPathSource, init_args: {split: train}}
    reward: {class_path: coin.Coin}
    sampling: {temperature: 1.0, max_tokens: 8}
    prompts_per_rollout: 5
    group_size: 4
    reward_pool: null
    engine: ENGINE
    eval_sets:
      heldout:
        source: {class_path: NumberPathSource, init_args: {split: heldout}}
        reward: {class_path: coin.Coin}
        samples: 2
        limit: 6
        sampling: {max_tokens: 8}
"""


COIN = """
from ibro_lightning.rewards import VerifiableReward


class Coin(VerifiableReward):
    def verify(self, prompt, completion):
        return sum(completion.token_ids) % 3 == 0
"""


def train(folder: Path, policy: Path, engine: str, ranks: int, strategy: str | None) -> tuple[dict, list]:
    """The trained weights by name, and the responses of the last evaluation. ``engine`` is written as in a recipe."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE.replace("POLICY", str(policy)).replace("ENGINE", engine))
    (folder / "coin.py").write_text(COIN)
    fit(folder, ["--config", "recipe.yaml"], ranks, strategy)
    evaluation = pandas.read_parquet(folder / "run" / "evaluations" / "iteration_000002" / "heldout")
    return load_file(folder / "run" / "model" / "model.safetensors"), evaluation["response"].tolist()
