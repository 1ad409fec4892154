"""vLLM in a run of several processes: each has an engine of its own, with the weights that are spread over all."""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path

import pandas
import pytest
from safetensors.torch import load_file

from ibro_lightning.models import PolicyOptions, Qwen2FromScratch, export_folder
from ibro_lightning.tasks import NumberPath

sys.path.insert(0, str(Path(__file__).parents[1]))
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
    engine: {class_path: VLLMEngine, init_args: {dtype: float32, max_model_len: 200, max_num_seqs: 32}}
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


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads of 32, which vLLM's attention on CPUs knows."""
    source = Qwen2FromScratch(NumberPath(), hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2)
    folder = tmp_path_factory.mktemp("policy") / "model"
    return export_folder(source.build(PolicyOptions()), source.tokenizer(), folder)


def train(folder: Path, policy: Path, ranks: int, strategy: str | None) -> tuple[dict, list]:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE.replace("POLICY", str(policy)))
    (folder / "coin.py").write_text(COIN)
    fit(folder, ["--config", "recipe.yaml"], ranks, strategy)
    evaluation = pandas.read_parquet(folder / "run" / "evaluations" / "iteration_000002" / "heldout")
    return load_file(folder / "run" / "model" / "model.safetensors"), evaluation["response"].tolist()


def test_two_ranks_with_an_engine_each_train_and_evaluate_as_one_process_does(tmp_path: Path, policy: Path) -> None:
    faulthandler.dump_traceback_later(400, exit=True)  # three engines start here, not one
    weights, responses = train(tmp_path / "one", policy, 1, None)
    start = load_file(policy / "model.safetensors")
    assert max((weights[name] - start[name]).abs().max() for name in weights) > 1e-3
    two, others = train(tmp_path / "two", policy, 2, "fsdp2")
    assert max((weights[name] - two[name]).abs().max() for name in weights) < 1e-4
    assert others == responses
